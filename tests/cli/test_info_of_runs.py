"""fastscore info on the files of runs that can go on."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import fastscore
from fastscore.cli import main


class Stopped(Exception):
    """In the middle of a run."""


def _model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


BATCHES = list(torch.randn(16, 6, generator=torch.Generator().manual_seed(0)).split(4))


def _told(capsys: pytest.CaptureFixture[str], path: Path) -> dict[str, str]:
    assert main(["info", str(path), "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out)[str(path)])


def test_each_says_what_it_is_of_and_how_far_it_is(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model, path = _model(), tmp_path / "run.safetensors"
    steps = []

    def finetune(smaller: nn.Module) -> None:
        steps.append(smaller)
        if len(steps) == 2:
            raise Stopped

    with pytest.raises(Stopped):
        fastscore.prune_iteratively(model, BATCHES, steps=4, channels=0.5, finetune=finetune, resume=path,
                                    progress=False)
    told = _told(capsys, path)
    left = [sum(p.numel() for p in each.parameters()) for each in (steps[0], model)]
    assert told["run"].startswith("of prune_iteratively, ")
    assert told["done"] == "1 of 4 steps"
    assert told["remains"].endswith(f"{left[0] / left[1]:.1%} of the parameters")

    scores = fastscore.score(model, BATCHES, progress=False)
    result, path = fastscore.prune(model, scores, BATCHES[0], channels=0.5, progress=False), tmp_path / "moments"
    fastscore.reconstruct(model, result, BATCHES, "mean", resume=path, progress=False)
    told = _told(capsys, path)
    assert told["run"].startswith("of reconstruct, ")
    assert told["done"] == "fit: 4 batches, all; held out: 4 batches, all"

    path = tmp_path / "distilling"
    fastscore.distill(model, result, BATCHES, steps=3, resume=path, progress=False)
    told = _told(capsys, path)
    assert told["run"].startswith("of distill, ")
    assert told["done"] == "3 steps"
    assert 0 <= float(told["agreement on held-out samples, last looked at"]) <= 1

    scorer, path = fastscore.Scorer(model, BATCHES[0]), tmp_path / "scorer"
    with scorer:
        for batch in BATCHES[:3]:
            model(batch).square().sum().backward()
    scorer.save(path)
    assert _told(capsys, path)["done"] == "12 samples"
    assert main(["info", str(path)]) == 0
    assert "of a Scorer" in capsys.readouterr().out
    path.write_bytes(path.read_bytes()[:-3])
    assert main(["info", str(path)]) == 2
