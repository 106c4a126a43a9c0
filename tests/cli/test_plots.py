"""Plots: what they show, read back from the SVG that matplotlib writes."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from networks import NETWORKS
from PIL import Image

import fastscore
from fastscore import plots
from fastscore.pruning.plots import pruning
from fastscore.pruning.report import Candidate, Timing


def drawn(scores, path):
    """The text and the number of dots in the plot of `scores`."""
    plots.importances(scores, path)
    svg = Path(path).read_text()
    texts = [line.split("<!-- ")[1].split(" -->")[0] for line in svg.splitlines() if "<!-- " in line]
    return texts, svg.count("<use")


def test_every_channel_is_drawn_and_zeros_are_counted(tmp_path):
    scores = {"stem": torch.tensor([0.0, 0.0, 0.0, 1e-9]), "block.conv1": torch.rand(50) + 0.1, "one": torch.ones(1)}
    texts, marks = drawn(scores, tmp_path / "s.svg")
    assert set(scores) <= set(texts)
    assert "3" in texts
    assert any("red" in text for text in texts)
    _, fewer = drawn({**scores, "block.conv1": torch.rand(20) + 0.1}, tmp_path / "t.svg")
    assert marks - fewer == 30
    assert not any("red" in text for text in drawn({"one": torch.ones(5)}, tmp_path / "u.svg")[0])


def test_the_names_of_many_layers_give_way(tmp_path):
    texts, _ = drawn({f"layer{i}": torch.rand(4) for i in range(200)}, tmp_path / "s.svg")
    assert "layer7" not in texts
    assert "200 layers, from input to output" in texts


def test_scores_plot_themselves_even_when_all_are_zero(tmp_path):
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 3), torch.nn.Flatten())
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    scores = fastscore.score(model, [torch.rand(2, 1, 8, 8)], progress=False)
    scores.plot(tmp_path / "s.png")
    assert Image.open(tmp_path / "s.png").size == (960, 720)


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"torch-fastscore\[plot\]"):
        plots.importances({"one": torch.ones(1)}, tmp_path / "s.png")


def test_the_cut_is_the_one_that_a_mask_makes(tmp_path):
    network = NETWORKS["residual"]
    model, x = network.traced(), network.inputs(8)
    scores = fastscore.score(model, [x], progress=False)
    for fraction in (0.0, 0.3, 0.8):
        with fastscore.mask(model, scores, fraction, x) as removed:
            below = plots.lowest(scores, fraction)
        assert {layer: goes.nonzero()[:, 0].tolist() for layer, goes in below.items() if goes.any()} == \
            {layer: channels.tolist() for layer, channels in removed.items()}
    scores.plot(tmp_path / "s.svg", fraction=0.3)
    assert f"orange: the {-(-3 * sum(map(len, scores.values())) // 10)} lowest, 30% of all" in \
        (tmp_path / "s.svg").read_text()
    with pytest.raises(ValueError, match=r"fraction: 1\.5"):
        scores.plot(tmp_path / "t.svg", fraction=1.5)
    assert not (tmp_path / "t.svg").exists()


def test_a_pruned_model_plots_its_layers_and_its_curve(tmp_path):
    model, x = NETWORKS["residual"].traced(), NETWORKS["residual"].inputs(2)
    result = fastscore.prune(model, fastscore.score(model, [x], progress=False), x, macs=0.5)
    result.plot(tmp_path / "p.png")
    size = Image.open(tmp_path / "p.png").size
    result.plot(tmp_path / "p.svg")
    svg = (tmp_path / "p.svg").read_text()
    report = result.report
    for text in (*(row.layer for row in report.groups), "before", "after",
                 f"channels: {report.channels[1]:,} of 26 remain", f"of {report.macs[0]:,} remain"):
        assert text in svg
    tried = Candidate(0.5, 0.5, 0.5, Timing((2e-3, 1e-3), 0.1), True)
    pruning(replace(report, candidates=(replace(tried, macs=0.9, chosen=False), tried)), tmp_path / "c.png")
    assert Image.open(tmp_path / "c.png").size[1] > size[1]
    with pytest.raises(ValueError, match=r"a plot's suffix is one of"):
        result.plot(tmp_path / "p.txt")


def test_bars_are_as_high_as_layers_are_wide(tmp_path, monkeypatch):
    """Read back from what matplotlib is asked to draw."""
    model, x = NETWORKS["residual"].traced(), NETWORKS["residual"].inputs(2)
    result = fastscore.prune(model, fastscore.score(model, [x], progress=False), x, channels=0.5)
    drawing = plots.figure()
    monkeypatch.setattr(plots, "figure", lambda *size: drawing)
    result.plot(tmp_path / "p.png")
    for axes, unit in zip(drawing.axes, ("channels", "macs"), strict=True):
        heights = [bar.get_height() for bar in axes.patches]
        assert heights == [getattr(row, unit)[side] for side in (0, 1) for row in result.report.groups]
