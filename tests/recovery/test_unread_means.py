"""Layers that are called on nothing: an empty slice, or an expert that no token chose. A mean of nothing is none."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastscore


class EmptySlice(nn.Module):
    """`c` reads nothing in its first call, and all in its second."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c, self.head = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 2)
        self.slices: tuple[int, ...] = (0, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        return self.head(torch.cat([self.c(y[:, :many]) for many in self.slices], 1).relu().sum(1))


def test_a_call_on_nothing_adds_nothing_to_a_mean() -> None:
    torch.manual_seed(0)
    model, x = EmptySlice().double().eval(), torch.randn(4, 3, 5, dtype=torch.float64)
    scores = fastscore.score(model, [x], progress=False)
    model.slices = (3,)
    expected = fastscore.score(model, [x], progress=False)
    for layer in ("c", "head"):
        torch.testing.assert_close(scores.means[layer], expected.means[layer])
    plain = fastscore.prune(model, expected, x, channels=0.6).model
    model.slices = (0, 3)
    torch.testing.assert_close(fastscore.prune(model, scores, x, channels=0.6).model(x), plain(x))
    for repair in ("mean", "linear", "asymmetric"):
        repaired = fastscore.prune(model, scores, x, channels=0.6, calibration=[x], repair=repair).model
        assert repaired(x).isfinite().all()
    scores = fastscore.score(model, [x], ablation="mean", progress=False)
    model.slices = (3,)
    for name, values in fastscore.score(model, [x], ablation="mean", progress=False).items():
        torch.testing.assert_close(scores[name], values)
    model.slices = (0,)
    with pytest.raises(ValueError, match=r'^c: it reads nothing for some samples.*ablation="zero"'):
        fastscore.score(model, [x], ablation="mean", progress=False)


class Switch(nn.Module):
    """Each token goes to one of three experts, which are all called; none goes to the first."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.router, self.head = nn.Linear(5, 6), nn.Linear(6, 3), nn.Linear(6, 2)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)) for _ in range(3))
        with torch.no_grad():
            self.router.bias[0] -= 20

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        weight, chosen = self.router(x).softmax(-1).max(-1)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            y[chosen == number] = expert(x[chosen == number]) * weight[chosen == number][:, None]
        return self.head((x + y).relu().mean(1))


def test_an_expert_that_no_token_chose_has_no_mean(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model, batches = Switch().eval(), [torch.randn(1, 6, 5) for _ in range(4)]
    scores = fastscore.score(model, batches, progress=False)
    assert "experts.0.0" in scores
    assert not scores.means["experts.0.2"].numel()
    assert not scores.merge(scores).means["experts.0.2"].numel()
    scores.save(tmp_path / "scores")
    scores = fastscore.Scores.load(tmp_path / "scores")
    result = fastscore.prune(model, scores, batches[0], channels=0.7, scope="layer")
    assert "experts.0.0" in result.removed
    assert torch.equal(result.model.get_submodule("experts.0.2").bias, model.get_submodule("experts.0.2").bias)
    assert result.report.notes["means"].startswith("experts.0.0 and 1 like it read nothing for some samples")
    assert all(value.isfinite().all() for value in result.model.state_dict().values())
    repaired = fastscore.prune(model, scores, batches[0], channels=0.7, calibration=batches).model
    assert all(value.isfinite().all() for value in repaired.state_dict().values())
