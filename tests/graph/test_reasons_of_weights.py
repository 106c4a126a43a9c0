"""Weights that are read in ways which nobody follows: the layers that have them are kept, and what meets those, with
the true reason; layers among ordinary ones go."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import untouched
from torch import Tensor, nn
from whole_way import noisy

import fastscore
from fastscore.graph.tracing import trace


class Slim(nn.Linear):
    """Of a slimmable network: the first rows and columns of the weight."""

    def __init__(self, inputs: int, outputs: int, used: int) -> None:
        super().__init__(inputs, outputs)
        self.used = used

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight[:self.used, :x.shape[-1]], self.bias[:self.used])


class Net(nn.Module):
    """`c` can lose channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.h = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.h(F.relu(self.c(F.relu(self.b(F.relu(self.a(x)))))))


class Slimmable(Net):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Slim(5, 10, 8), Slim(10, 9, 6)


class Difference(Net):
    """As of central difference convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Conv2d(8, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))[..., None, None]
        x = self.b(x) - 0.7 * F.conv2d(x, self.b.weight.sum((2, 3), keepdim=True))
        return self.h(F.relu(self.c(F.relu(x.flatten(1)))))


class Prototypes(Net):
    """A last product by a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.prototypes = nn.Parameter(torch.randn(7, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(F.relu(self.a(x))))) @ self.prototypes


class PrototypesWithBias(Prototypes):
    """And its bias, in one operation."""

    def __init__(self) -> None:
        super().__init__()
        self.offsets = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.offsets, self.c(F.relu(self.b(F.relu(self.a(x))))), self.prototypes)


@pytest.mark.parametrize(("build", "groups", "reasons"), [
    (Slimmable, ["c"], {"a": "the weight of a makes 10 channels, and its code takes 8 of them",
                        "b": "the weight of b makes 9 channels, and its code takes 6 of them"}),
    (Difference, ["c"], {"a": "the code of Difference reads the weight of b as well"}),
    (Prototypes, ["a", "b", "c"], {"prototypes": "its channels are the model's output"}),
    (PrototypesWithBias, ["a", "b", "c"], {"prototypes": "its channels are the model's output"})])
def test_the_true_reason(build: type[nn.Module], groups: list[str], reasons: dict[str, str]) -> None:
    model, x = noisy(build), torch.randn(4, 5, generator=torch.Generator().manual_seed(1)).double()
    with untouched(model):
        scores = fastscore.score(model, [x], progress=False)
        small = fastscore.prune(model, scores, x, channels=0.8, calibration=[x, -x]).model
    assert list(scores) == groups
    assert small(x).isfinite().all()
    assert {name: scores.skipped[name] for name in reasons} == reasons


class WeightDrop(nn.Module):
    """Of AWD-LSTM, as it is found: the weight is set before each call, and is the parameter itself in evaluation."""

    def __init__(self, module: nn.LSTM) -> None:
        super().__init__()
        self.module, raw = module, module.weight_hh_l0
        del module._parameters["weight_hh_l0"]
        module.register_parameter("weight_hh_l0_raw", nn.Parameter(raw.data))

    def forward(self, x: Tensor) -> Tensor:
        self.module.weight_hh_l0 = F.dropout(self.module.weight_hh_l0_raw, 0.5, self.training)
        return self.module.forward(x)[0]


def test_a_dropped_weight_of_an_lstm() -> None:
    """Which is its own after a run, and not there before."""
    model = noisy(lambda: nn.Sequential(WeightDrop(nn.LSTM(5, 6, batch_first=True)), nn.Linear(6, 7), nn.ReLU(),
                                        nn.Linear(7, 2), WeightDrop(nn.LSTM(2, 3, batch_first=True))))
    x = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(1)).double()
    model(x)
    scores = fastscore.score(model, [x], progress=False)
    assert list(scores) == ["1"]
    assert scores.skipped["3"] == "its channels pass through 4.module (LSTM), which cannot lose channels yet"
    assert scores.skipped["0.module"].endswith("it has a parameter weight_hh_l0_raw besides, as where other code "
                                               "computes its weights")


class Signs(torch.autograd.Function):
    """Of a weight, as XNOR networks have them; nothing but autograd sees that it is read."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return weight.sign()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class Binary(nn.Module):
    """By a weight of whose layer nobody makes use, `read`; one that is read beside it, `beside`; or as a penalty."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b, self.d, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        y = F.linear(x, Signs.apply(self.b.weight)) if self.how == "read" else self.b(x)
        if self.how == "beside":
            y = y + F.linear(x, Signs.apply(self.b.weight))
        y = self.last(self.d(y.relu()).relu())
        return y * (1 + Signs.apply(self.b.weight).sum()) if self.how == "penalty" else y


@pytest.mark.parametrize("how", ["read", "beside", "penalty"])
def test_weights_that_functions_of_autograd_read(how: str) -> None:
    graph = trace(Binary(how).double().eval(), torch.randn(3, 6).double())
    assert [group.name for group in graph.groups] == ["d"]
    read = "the code of the model reads the weight of b as well"
    assert graph.skipped["b"] == ("the code of the model reads its weight, and does not call it" if how == "read" else
                                  read if how == "penalty" else "its channels go with others that are kept")
    assert how == "read" or graph.skipped["a"] == read
