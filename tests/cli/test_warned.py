"""Warnings on the command line are one line each, with options as they are typed."""

import warnings

from photographed import MODEL

import fastscore
from fastscore.cli import main
from fastscore.cli.spelling import in_one_line


def test_what_fastscore_warns_of_is_one_line_and_names_options(folder, capsys, monkeypatch):
    score = fastscore.score

    def warns(*arguments, **options):
        warnings.warn('scores: all alike: give more images, or importance="taylor-abs"', stacklevel=2)
        return score(*arguments, **options)

    monkeypatch.setattr(fastscore, "score", warns)
    assert main(["score", *MODEL, "--images", "photos", "--size", "48"]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "all alike" in line]
    assert said == ["fastscore: warning: scores: all alike: give more images, or --importance taylor-abs"]


def test_what_others_warn_of_stays_as_it_is(recwarn, capsys):
    with in_one_line(str.upper):
        warnings.warn_explicit("the model's own", UserWarning, "nets.py", 1)
        warnings.warn_explicit("fastscore's", UserWarning, fastscore.__file__, 1)
    assert [str(each.message) for each in recwarn] == ["the model's own"]
    assert capsys.readouterr().err == "fastscore: warning: FASTSCORE'S\n"
    before = warnings.showwarning
    with in_one_line(str):
        pass
    assert warnings.showwarning is before
