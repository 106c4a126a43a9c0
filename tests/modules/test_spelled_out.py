"""Convolutions whose settings are changed after they were made are those that are made with them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastscore

X = torch.randn(12, 3, 9, 9, generator=torch.Generator().manual_seed(0))


class Own(nn.Conv2d):
    """Its code reads a number that it sets itself."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.padding = 1

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(nn.functional.pad(x, [self.padding] * 4), self.weight, self.bias)


def model(**settings: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, **settings), nn.ReLU(), nn.Conv2d(6, 5, 3),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4)).eval()


def pruned(model: nn.Module) -> dict[str, Tensor]:
    scores = fastscore.score(model, [X], progress=False)
    result = fastscore.prune(model, scores, X[:1], channels=0.6, calibration=[X], repair="asymmetric", progress=False)
    return {**result.model.state_dict(), "output": result.model(X)}


def test_numbers_that_pytorch_does_not_print(tmp_path: Path) -> None:
    """nn.Conv2d's own repr takes the length of its padding."""
    def build(dilation: Any = 2) -> nn.Module:
        changed = model()
        changed[2].padding, changed[2].stride, changed[2].dilation = 2, 2, dilation
        return changed

    changed = build()
    with pytest.raises(TypeError):
        repr(changed[2])
    made = pruned(changed)
    torch.testing.assert_close(made, pruned(model(padding=2, dilation=2, stride=2)), rtol=0, atol=0)
    fastscore.score(changed, [X], resume=tmp_path / "run", progress=False)
    result = fastscore.prune(changed, fastscore.score(changed, [X], progress=False), X[:1], channels=0.6)
    fastscore.save_pruned(result, tmp_path / "small.safetensors")
    small = fastscore.load_pruned(build, tmp_path / "small.safetensors")
    torch.testing.assert_close(small(X), result.model(X), rtol=0, atol=0)
    for other, said in ((1, "dilation=1"), ((2, 1), r"dilation=\(2, 1\)")):
        with pytest.raises(ValueError, match=f"dilation=2,.* and is .*{said}"):
            fastscore.load_pruned(lambda other=other: build(other), tmp_path / "small.safetensors")


@pytest.mark.parametrize("changes", [{"padding": (2, 2), "dilation": (2, 2), "stride": (2, 2)},
                                     {"padding": (2,), "dilation": (2,), "stride": 2}], ids=["of two", "of one"])
def test_scored_pruned_and_repaired_as_made_so(changes: dict[str, Any]) -> None:
    changed = model()
    for name, value in changes.items():
        setattr(changed[2], name, value)
    before = dict(vars(changed[2]))
    torch.testing.assert_close(pruned(changed), pruned(model(padding=2, dilation=2, stride=2)), rtol=0, atol=0)
    assert dict(vars(changed[2])) == before


def test_what_code_reads_stays() -> None:
    changed = model()
    changed[2] = Own(8, 6, 3)
    assert pruned(changed)["output"].shape == changed(X).shape
