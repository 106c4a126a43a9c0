"""Modules whose own train() does more than set a flag: what each needs comes back, and nobody's weights are written."""

import copy
from pathlib import Path

import pytest
import torch
from oracles import untouched
from torch import Tensor, nn

import fastscore
from fastscore.graph.tracing import trace
from fastscore.modules.evaluation_copy import evaluation_copy
from fastscore.modules.modes import evaluating


class Merging(nn.Linear):
    """As in loralib: the low-rank part is merged into the weight, in place, on the way into evaluation mode."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.a, self.b = nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.randn(outputs, 2))
        self.merged = False

    def train(self, mode: bool = True) -> "Merging":
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * (self.b @ self.a).data
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.merged else y + x @ self.a.mT @ self.b.mT


class Keeping(nn.Module):
    """As timm's attention biases: kept in evaluation mode, forgotten by train()."""

    def __init__(self) -> None:
        super().__init__()
        self.bias, self.index = nn.Parameter(torch.randn(3)), torch.tensor([2, 0, 1, 1])
        self.kept: dict[str, Tensor] = {}

    @torch.no_grad()
    def train(self, mode: bool = True) -> "Keeping":
        super().train(mode)
        if mode:
            self.kept = {}
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return x + self.bias[self.index]
        if "bias" not in self.kept:
            self.kept["bias"] = self.bias[self.index]
        return x + self.kept["bias"]


class Frozen(nn.Sequential):
    """Its BatchNorm stays in evaluation mode, as a detector's backbone does."""

    def train(self, mode: bool = True) -> "Frozen":
        super().train(mode)
        self[1].eval()
        return self


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), Merging(8, 5), nn.ReLU(), nn.Linear(5, 4), Keeping(),
                         Frozen(nn.Unflatten(1, (4, 1)), nn.BatchNorm1d(4), nn.Flatten()), nn.Linear(4, 12), nn.ReLU(),
                         nn.Linear(12, 3)).double()


X = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_a_copy_writes_to_nobodys_weights() -> None:
    """And computes what the model does in evaluation mode; weights that nothing was written to are shared."""
    model = net()
    with untouched(model):
        copied = evaluation_copy(model)
        trace(model, X)
        scores = fastscore.score(model, [X], progress=False)
    want = model.eval()(X)
    torch.testing.assert_close(copied(X), want)
    assert copied[0].weight.data_ptr() == model[0].weight.data_ptr()
    model.train()
    again = fastscore.score(model, [X], progress=False)
    assert scores.keys() == again.keys() == {"7"}
    for name in scores:
        torch.testing.assert_close(again[name], scores[name])


def test_each_comes_back_by_its_own_train() -> None:
    model = net()
    model.train()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    weight = model[2].weight.detach().clone()

    def failing() -> None:
        with evaluating(model):
            model(X)
            assert model[2].merged
            assert model[5].kept
            assert not any(module.training for module in model.modules())
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert modes == [module.training for module in model.modules()]
    assert not model[2].merged
    assert not model[5].kept
    torch.testing.assert_close(model[2].weight, weight)


@pytest.mark.parametrize("calibration", [None, [X, X + 1, X - 1, 2 * X]])
def test_what_prune_returns_can_be_trained_and_then_evaluated(calibration: list[Tensor] | None, tmp_path: Path) -> None:
    """Kept biases of before the training would be wrong then, and a merged weight hide what is trained."""
    model = net().train()
    scores = fastscore.score(model, [X], progress=False)
    small = fastscore.prune(model, scores, X, channels=0.7, calibration=calibration, progress=False).model
    fastscore.save(small, X, tmp_path / "small.pt2")
    assert [module.training for module in small.modules()] == [module.training for module in model.modules()]
    with torch.no_grad():
        before = small(X)
        small[5].bias += 1
        small[2].b *= 2.0
        trained = small(X)
        torch.testing.assert_close(small.eval()(X), trained)
    assert not torch.allclose(before, trained)


class _Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(9, 6, max_norm=0.5)
        self.bags = nn.EmbeddingBag(9, 6, max_norm=0.5)
        self.hidden, self.last = nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.hidden(self.tokens(x).mean(1) + self.bags(x)).relu())


def test_a_forward_pass_that_scales_its_weight() -> None:
    """An embedding with max_norm= writes to its weight whenever it runs: to that of the copy, here."""
    model, x = _Scaled().eval(), torch.randint(9, (3, 4))
    with untouched(model):
        scores = fastscore.score(model, [x], progress=False)
        small = fastscore.prune(model, scores, x, channels=0.6, compensate=False).model
    expected = copy.deepcopy(model)
    with torch.no_grad(), fastscore.mask(expected, scores, 0.4, x, compensate=False):
        torch.testing.assert_close(small(x), expected(x))
