"""Samples that meet in values alone: scores hold for the batches as they are given, and say so; others say nothing."""

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastscore
from fastscore.graph.tracing import trace

X = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).double() * 2 ** torch.arange(4)[:, None]
TOLD = "depends on which others are in its batch"


class Net(nn.Module):
    """how: what is done between the first layer and the second."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b, self.h = nn.Linear(5, 8), nn.Linear(8 + (how == "deviation"), 6), nn.Linear(6, 2)
        self.norm, self.how = nn.BatchNorm1d(8), how

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        if self.how == "scale":
            scale = x.detach().abs().max() / 7
            x = torch.tanh(x / scale) * scale
        if self.how == "mask":
            x = x * (x > x.mean())
        if self.how == "deviation":
            x = torch.cat([x, x.std(0, unbiased=False).mean().expand(len(x), 1)], 1)
        if self.how == "scale of a sample":
            scale = x.detach().abs().amax(1, keepdim=True) / 7
            x = torch.tanh(x / scale) * scale
        if self.how == "norm":
            x = self.norm(x)
        if self.how == "noise":
            x = x + 0.5 * torch.randn_like(x)
        if self.how == "flipped":
            x = x.flip(0)
        if self.how == "never the same":
            self.calls = getattr(self, "calls", 0) + 1
            x = x * self.calls
        return self.h(F.relu(self.b(x)))


def made(how: str) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net(how).double().eval()


@pytest.mark.parametrize("how", ["scale", "mask", "deviation"])
def test_scores_of_batches_as_they_are_given_say_so(how: str) -> None:
    model, v = made(how), torch.randn(4, 2, generator=torch.Generator().manual_seed(1)).double()
    options: dict[str, Any] = {"gradient": "loss", "normalize": False, "progress": False}
    with pytest.warns(UserWarning, match=f"Net: .*{TOLD}"):
        whole = fastscore.score(model, [X], loss=lambda out, _: (out * v).sum(), **options)
    with pytest.warns(UserWarning, match=TOLD):
        fastscore.Scorer(model, X)
    rows = iter(v.split(2))
    with pytest.warns(UserWarning, match=TOLD):
        halves = fastscore.score(model, list(X.split(2)), loss=lambda out, _: (out * next(rows)).sum(), **options)
    assert not torch.allclose(whole["b"], halves["b"], rtol=1e-3)  # what is said is so
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=f".*{TOLD}")
        fastscore.score(model, list(X.split(1)), **{**options, "gradient": "random"})  # nobody else is there


def test_what_all_samples_share_is_left_as_it_is() -> None:
    """Three numbers beside four samples: as many as the samples that a model is tried on."""
    model = nn.ModuleDict({"a": nn.Linear(5, 8), "b": nn.Linear(8, 3)}).double()
    batch = {"x": X, "shift": torch.ones(3).double()}
    assert not trace(model, batch, forward=lambda model, batch:
                     model["b"](model["a"](batch["x"]).relu()) + batch["shift"]).samples.together


@pytest.mark.parametrize("how", ["", "scale of a sample", "norm", "noise", "flipped", "never the same"])
@pytest.mark.parametrize("samples", [1, 2, 4])
def test_nothing_is_said_of_samples_that_do_not_meet(how: str, samples: int) -> None:
    assert not trace(made(how), X[:samples]).samples.together
    assert not trace(made(how).float(), X[:1].float(), samples=X[:samples].float()).samples.together
