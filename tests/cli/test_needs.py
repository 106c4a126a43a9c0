"""Options without effect, files of the wrong kind, and errors in the words of the command line: before any work."""

import json
import re
from pathlib import Path

import pytest
import torch
import working_folder

import fastscore
from fastscore.cli import main, options
from fastscore.cli.spelling import as_options

NETS = """
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
"""
NET = ("nets.py:build", "--size", "8")
PRUNE = ("prune", *NET, "--macs", "0.7", "--out", "small.safetensors")
WEIGHTS = ("--importance", "magnitude-l2")


@pytest.fixture(scope="module")
def scores() -> fastscore.Scores:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
                                torch.nn.Flatten(), torch.nn.Linear(8, 5))
    return fastscore.score(model, [torch.randn(2, 3, 8, 8)], progress=False)


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scores: fastscore.Scores) -> None:
    """nets.py, 8 images, scores in s.safetensors, and files that are none."""
    working_folder.enter(tmp_path, monkeypatch, NETS, torch.randint(256, (8, 8, 8, 3)).byte())
    scores.save("s.safetensors")
    Path("curve.json").write_text(json.dumps({"rows": []}))
    Path("page.html").write_text("<html></html>")
    Path("picture.png").write_bytes(b"\x89PNG")
    Path("small.onnx").write_bytes(bytes(range(256)))


def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """What a command says that is refused, without a model made and a file written."""
    with monkeypatch.context() as patch:
        patch.setattr(options, "model", lambda *_: pytest.fail("said after the model was made"))
        before = set(Path().iterdir())
        try:
            code = main(arguments)
        except SystemExit as stop:
            code = int(stop.code or 0)
        assert set(Path().iterdir()) == before
    said = capsys.readouterr()
    assert (code, said.out) == (2, "")
    (line,) = (line for line in said.err.splitlines() if line.startswith("fastscore: error: "))
    return line.removeprefix("fastscore: error: ")


SCORED = "it says how to score, and --scores has been scored"
UNREAD = "magnitude-l2 reads weights and no gradients: leave it out, or give --importance taylor-sq"
BARE = "nothing is repaired here, which takes images: give --images FOLDER"


@pytest.mark.parametrize(("arguments", "option", "why"), [
    *(((*PRUNE, "--scores", "s.safetensors", *given), given[0], SCORED) for given in (
        WEIGHTS, ("--units", "blocks"), ("--reduction", "sum"), ("--ablation=mean",), ("--layerwise", "l2"),
        ("--probes", "2"), ("--distribution", "normal"), ("--center",), ("--no-normalize",),
        ("--precision", "float32"), ("--compile",))),
    *((("score", *NET, "--images", "photos", *WEIGHTS, *given), given[0], UNREAD) for given in (
        ("--units", "blocks"), ("--reduction", "sum"), ("--ablation", "zero"), ("--probes", "2"), ("--center",))),
    *(((*PRUNE, "--scores", "s.safetensors", *given), given[0], BARE) for given in (
        ("--repair", "auto"), ("--repair", "linear"), ("--outputs", "error"), ("--measured",))),
    *(((*PRUNE, "--images", "photos", no, *given), given[0], BARE) for no, given in (
        ("--no-compensate", ("--repair", "linear")), ("--no-repair", ("--outputs", "error")))),
    *(((*PRUNE, *WEIGHTS, *given), given[0], "give --images FOLDER") for given in (
        ("--samples", "4"), ("--batch-size", "4"))),
    ((*PRUNE, "--images", "photos", "--confidence", "0.9"), "--confidence", "give --agreement 0.98, too"),
    ((*PRUNE, "--images", "photos", "--macs", "0.5", "--held-out", "others"), "--held-out", "or leave it out"),
    ((*PRUNE, "--images", "photos", "--clock", "onnxruntime"), "--clock", "give --latency 0.7, too"),
    ((*PRUNE, "--images", "photos", "--agreement", "0.9"), "--agreement", "leave it out, or --macs"),
    (("curve", *NET, "--images", "photos", "--scores", "s.safetensors", "--probes", "2"), "--probes", SCORED),
    (("curve", *NET, "--images", "photos", "--no-repair", "--measured"), "--measured", "leave it out, or --no-repair"),
    (("compare", *NET, "--images", "photos", "--no-repair", "--measured"), "--measured", "or --no-repair"),
    (("score", *NET, "--images", "photos", "--probes", "exact", "--distribution", "rademacher"), "--distribution",
     "--probes exact draws no gradients"),
    (("report", "s.safetensors", "--size", "8"), "--size", "fastscore report SCORES MODEL"),
    (("bench", "--batch-size", "8"), "--batch-size", "fastscore bench MODEL"),
    (("info", "--weights", "DEFAULT"), "--weights", "fastscore info MODEL"),
    (("info", "s.safetensors", "--size", "8"), "--size", "fastscore info MODEL"),
], ids=lambda value: " ".join(value) if isinstance(value, tuple) else "")
def test_no_option_is_ignored(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
                              arguments: tuple[str, ...], option: str, why: str) -> None:
    said = refused(capsys, monkeypatch, *arguments)
    assert said.startswith(f"{option.partition('=')[0]}: ")
    assert why in said


def test_images_that_nothing_reads_are_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", *NET, *WEIGHTS, "--images", "photos", "--out", "w"]) == 0
    assert "note: --images: magnitude-l2 reads weights, and no image" in capsys.readouterr().err
    assert main([*PRUNE, "--scores", "w", "--images", "photos", "--no-repair"]) == 0
    assert "note: --images: nothing reads an image here" in capsys.readouterr().err
    assert main([*PRUNE, *WEIGHTS, "--images", "photos", "--repair", "mean"]) == 0
    assert "--images: " not in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "suffix"), [
    (("score", *NET, "--images", "photos", "--out", "y.json"), ".safetensors (scores"),
    (("curve", *NET, "--images", "photos", "--out", "c.csv"), ".json (for report --curve"),
    (("report", "s.safetensors", "--out", "x.pdf"), ".html (a page)"),
    (("prune", *NET, "--images", "photos", "--macs", "0.7", "--out", "x.tflite"), ".safetensors (weights"),
])
def test_a_suffix_of_another_kind_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
                                             arguments: tuple[str, ...], suffix: str) -> None:
    assert f"out: {arguments[-1]}: its suffix must be {suffix}" in refused(capsys, monkeypatch, *arguments)


@pytest.mark.parametrize(("arguments", "words"), [
    *((("info", file), "info: it reads scores, pruned models (.safetensors, .pt2, .onnx, .pt) and runs that are kept, "
       f"and {file} is none of them") for file in ("curve.json", "page.html", "picture.png")),
    (("report", "small.onnx"), "not a readable safetensors file, which a score file is: it is of another kind"),
    (("report", "s.safetensors", "--curve", "s.safetensors"), "writes: make it with fastscore curve --scores"),
    (("report", "s.safetensors", "--curve", "curve.json"), "writes: make it with fastscore curve --scores"),
    (("prune", "build", *PRUNE[2:], "--scores", "s.safetensors"), "hf:NAME and module:function"),
    ((*PRUNE, "--images", "photos", "--units", "channels"), "such as \"blocks+heads_and_dims\""),
])
def test_errors_say_what_was_meant(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
                                   arguments: tuple[str, ...], words: str) -> None:
    assert words in refused(capsys, monkeypatch, *arguments)


@pytest.mark.parametrize("file", ["curve.json", "page.html", "picture.png", "small.onnx"])
def test_no_advice_to_unpickle_what_is_no_pickle(capsys: pytest.CaptureFixture[str], file: str) -> None:
    assert main(["score", *NET, "--images", "photos", "--checkpoint", file]) == 2
    said = capsys.readouterr().err
    assert f"checkpoint: {file} is no file of weights: torch.save did not write it" in said
    assert "torch.load" not in said


def test_the_librarys_errors_name_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*PRUNE, "--images", "photos", "--units", "blocks", "--ablation", "mean"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "--importance taylor-sq, --ablation mean, --reduction sum" in said
    assert "with --ablation zero and --reduction sum, or --units groups" in said


@pytest.mark.parametrize(("text", "expected"), [
    ("leave macs= out", "leave --macs out"), ("use compile=False, or seed=3", "use no --compile, or --seed 3"),
    ("normalize: use normalize=False", "normalize: use --no-normalize"), ("ablation='mean'.", "--ablation mean."),
    ("give calibration=batches, scope=\"global\"", "give --images FOLDER, --scope global"),
    ("cost_aware=True", "--cost-aware"), ("gradient=\"loss\"", "gradient=\"loss\""),
    ("outputs={\"\": 1}", "outputs={\"\": 1}"), ("runs/seed=3/x.pt", "runs/seed=3/x.pt"),
])
def test_keywords_become_options(text: str, expected: str) -> None:
    known = ("--macs", "--compile", "--seed", "--no-normalize", "--ablation", "--images", "--scope", "--cost-aware",
             "--outputs")
    assert as_options(text, known) == expected
    assert as_options("a: seed=3.pth", known, ("--checkpoint", "seed=3.pth")) == "a: seed=3.pth"
    assert as_options("give seed=3", known, ("--seed=2",)) == "give --seed 3"


@pytest.mark.parametrize(("arguments", "said"), [
    (("prune", *NET, "--mac", "0.7"), "--mac: there is no such option; did you mean --macs?"),
    (("prune", *NET, "--macs=0.7", "--outt=x.pt2"), "--outt: there is no such option; did you mean --out?"),
    (("prune", *NET, "--zzz"), "--zzz: there is no such option (see"),
    (("curve", *NET, "--budgets", "0.7"), "--budgets: there is no such option (see"),  # is like --units by its hyphens
    (("inf",), "'info'); did you mean info? (see"),
    (("compare", *NET, "--images", "photos", "--repair", "linera"), "'none'); did you mean linear? (see"),
])
def test_slips_are_told_what_may_be_meant(arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str],
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    assert said in refused(capsys, monkeypatch, *arguments)


def test_no_repair_has_two_spellings_everywhere(capsys: pytest.CaptureFixture[str]) -> None:
    """Without images, too, where nothing is repaired anyway."""
    shown = []
    for spelling in (("--no-repair",), ("--repair", "none")):
        assert main([*PRUNE, *WEIGHTS, *spelling, "--json"]) == 0
        assert main([*PRUNE, *WEIGHTS, *spelling, "--images", "photos", "--json"]) == 0
        assert main(["compare", *NET, "--images", "photos", "--macs", "0.8", "--importances", "magnitude-l2",
                     *spelling, "--json"]) == 0
        shown.append(re.sub(r'"date": "[^"]*"', "", capsys.readouterr().out))
    assert shown[0] == shown[1]
