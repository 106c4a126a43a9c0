"""The demo on real digits, shortened to one network and few epochs."""

import sys

import pytest
import torch
from PIL import Image

from fastscore import cli
from fastscore.cli import digits
from fastscore.pruning.budgets.costs import total_macs


@pytest.fixture(scope="module")
def result():
    """Pruned to two shares of those that the picture has a point for; they stand for the module."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "SHARES", (0.9, digits.TARGET))
        try:
            torch.manual_seed(5)
            state = torch.get_rng_state()
            found = digits.run(networks=1, epochs=4, progress=False)
            assert torch.get_num_threads() == 2
            assert torch.equal(torch.get_rng_state(), state)
        finally:
            torch.set_num_threads(threads)
        yield found


def test_no_image_is_both_trained_and_tested_on():
    split = digits.Digits.split(3)
    everything = torch.cat([split.train[0], split.test[0]]).flatten(1)
    assert (len(split.train[0]), len(split.test[0])) == (1198, 599)
    assert everything.shape == (1797, 64)
    other = digits.Digits.split(4)
    assert not torch.equal(split.test[1], other.test[1])
    # the digits hold no image twice, so a third that is also in the rest would show
    assert len(everything.unique(dim=0)) == 1797


def test_the_networks_learn_and_every_criterion_prunes_to_half_the_macs(result):
    (dense,) = result.outcomes["dense"]
    assert dense.before > 0.95
    assert dense.macs == total_macs(digits.network().eval(), torch.zeros(1, 1, 8, 8))
    for name in digits.IMPORTANCES:
        (pruned,) = result.outcomes[name]
        assert 0.48 < pruned.macs / dense.macs <= 0.5
        assert pruned.params < dense.params
        assert len(pruned.curve) == len(digits.SHARES)
        assert pruned.curve[digits.SHARES.index(digits.TARGET)] == pruned.before
        assert pruned.curve[0] > 0.9  # with a tenth of the MACs gone
        assert pruned.after > 0.9
        assert pruned.repaired > pruned.before
        assert pruned.after > pruned.before


def test_the_command_prints_what_was_measured_and_draws_it(result, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(digits, "run", lambda networks, seed: result)
    assert cli.main(["demo", "--networks", "1", "--out", str(tmp_path / "demo.png")]) == 0
    table = capsys.readouterr().out
    for name, (outcome,) in result.outcomes.items():
        (row,) = [line for line in table.splitlines() if line.startswith(f"{name} ")]
        assert f"{100 * outcome.before:.1f} %" in row
        assert f"{100 * outcome.repaired:.1f} %" in row
        assert f"{outcome.macs:,}" in row
        assert f"{outcome.params:,}" in row
    assert Image.open(tmp_path / "demo.png").convert("L").getextrema()[0] < 50


def test_without_scikit_learn_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert cli.main(["demo"]) == 2
    assert "pip install 'torch-fastscore[demo]'" in capsys.readouterr().err
