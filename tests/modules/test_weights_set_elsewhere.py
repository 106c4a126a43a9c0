"""Layers whose weight is computed of more than their own parameters, or of what other code reads as well: they, and
what meets them, are kept, with the reason; all else is scored and pruned as the model runs."""

from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from oracles import untouched
from torch import Tensor, nn

import fastscore

_MORE = "b computes its weight from more than its own parameters"


class Set(nn.Linear):
    """By its parent."""

    by: float | Tensor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.by, self.bias)


class Adapted(nn.Linear):
    """By an adapter, where that is on."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.down, self.up = nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.randn(outputs, 2))
        self.on = True

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight + self.up @ self.down if self.on else self.weight, self.bias)


class Rounded(nn.Linear):
    """To as many bits as are set."""

    bits: ClassVar = 8

    def forward(self, x: Tensor) -> Tensor:
        step = self.weight.abs().max() / (2 ** (Rounded.bits - 1) - 1)
        return F.linear(x, (self.weight / step).round() * step, self.bias)


class Ranged(nn.Linear):
    """By the range of what is read."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.clamp(*((-1, 1) if x.detach().abs().max() < 20 else (-0.1, 0.1))), self.bias)


class Net(nn.Module):
    """`b` is the layer in question; `c` can lose channels."""

    kind: type[nn.Linear] = Set

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.h = nn.Linear(5, 8), self.kind(8, 6), nn.Linear(6, 7), nn.Linear(7, 2)

    def end(self, x: Tensor) -> Tensor:
        return self.h(F.relu(self.c(F.relu(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.b(F.relu(self.a(x))))


class OnAndOff(Net):
    kind = Adapted

    def forward(self, x: Tensor) -> Tensor:
        self.b.on = True
        policy = super().forward(x)
        self.b.on = False
        return policy - super().forward(x)


class Bits(Net):
    kind = Rounded

    def forward(self, x: Tensor) -> Tensor:
        Rounded.bits = 2
        x = self.b(F.relu(self.a(x)))
        Rounded.bits = 8
        return self.end(x)


class Hyper(Net):
    def __init__(self) -> None:
        super().__init__()
        self.z, self.hyper = nn.Parameter(torch.randn(3)), nn.Linear(3, 8)

    def forward(self, x: Tensor) -> Tensor:
        self.b.by = 1 + self.hyper(self.z)
        return super().forward(x)


class FromData(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.b.by = x.abs().mean().item() * 2
        return super().forward(x)


class TwoScales(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        self.b.by = 1.0
        y = self.b(x)
        self.b.by = -0.5
        return self.end(F.relu(y) * self.b(x).sigmoid())


class Far(Net):
    kind = Ranged


class FromChannels(Net):
    """What is set depends on channels that could go."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.c(x[:, :1].expand(-1, 6)))
        self.b.by = 1 + y.mean().detach()
        return self.h(y) + self.b(F.relu(self.a(x)))[:, :2]


class Decoder(Net):
    """Raw weights read by the parent."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.b(F.relu(self.a(x))))
        return self.end(y) + F.linear(y, self.b.weight.t()).sum(1, keepdim=True)


class Penalised(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.b.weight.norm()


def _made(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build().double().eval()


_X, _V = (torch.randn(4, width, generator=torch.Generator().manual_seed(1)).double() for width in (5, 2))


def _scores(model: nn.Module) -> fastscore.Scores:
    return fastscore.score(model, [_X], gradient="loss", normalize=False, progress=False,
                           loss=lambda output, _: (output * _V).sum())


def _by_gates(model: nn.Module, reader: str) -> Tensor:
    layer = model.get_submodule(reader)
    gates: list[Tensor] = []  # of each call, for each sample

    def gated(_: nn.Module, args: tuple[Tensor]) -> Tensor:
        gates.append(torch.ones_like(args[0], requires_grad=True))
        return args[0] * gates[-1]

    handle = layer.register_forward_pre_hook(gated)
    loss = (model(_X) * _V).sum()
    handle.remove()
    return torch.stack(torch.autograd.grad(loss, gates)).sum(0).square().mean(0)


@pytest.mark.parametrize("has_run", [False, True])
@pytest.mark.parametrize(("build", "reason"), [
    (OnAndOff, f"{_MORE}: it was not the same in every call"),
    (Bits, f"{_MORE}: it was not the same in every call"), (Hyper, f"{_MORE} (z)"),
    (FromData, f"{_MORE}: it was not the same in every call"),
    (TwoScales, f"{_MORE}: it was not the same in every call"),
    (Far, f"{_MORE}: it was not the same in every call"),
    (Decoder, "the code of Decoder reads the weight of b as well"),
    (Penalised, "b computes its weight from b.weight, which other code reads as well")])
def test_kept_as_the_model_runs(build: type[Net], reason: str, has_run: bool) -> None:
    """Whatever a run before has left in the layer; on other data, too, and a hypernetwork learns on."""
    model = _made(build)
    if has_run:
        model(_X).detach()
    kind = type(model.b)
    scores = _scores(model)
    assert list(scores) == ["c"]
    assert scores.skipped["b"] == reason
    assert scores.skipped["a"].startswith("b computes its weight from ")
    assert torch.allclose(scores["c"].double(), _by_gates(model, "h"), rtol=1e-5)
    result = fastscore.prune(model, scores, _X, channels=0.6, compensate=False)
    assert type(result.model.b) is type(model.b) is kind
    for x in (_X, -30 * _X):
        with torch.no_grad(), fastscore.mask(model, scores, 0.4, _X, compensate=False):
            masked = model(x)
        assert torch.allclose(result.model(x), masked, rtol=1e-9)
    result.model(_X).sum().backward()
    assert build is not Hyper or result.model.hyper.weight.grad.count_nonzero() > 0


def test_nothing_is_left_in_the_model() -> None:
    """Nor in its layers."""
    model = _made(Far)
    with untouched(model):
        _scores(model)
    assert set(vars(model.b)) == set(vars(Ranged(8, 6)))


def test_channels_that_set_a_weight_stay() -> None:
    """The way from them to it is none that is measured."""
    reasons = fastscore.score(_made(lambda: nn.Sequential(FromChannels(), nn.Tanh(), nn.Linear(2, 4), nn.Tanh(),
                                                          nn.Linear(4, 2))), [_X], progress=False).skipped
    assert "what 0.b computes its weight from depends on which channels there are" in reasons["0.c"]


class TiedHead(nn.Module):
    """Scaled in the head."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.f, self.g, self.h = nn.Embedding(40, 6), nn.Linear(6, 7), nn.Linear(7, 6), Set(6, 40, bias=False)
        self.h.by, self.h.weight = 0.3, self.e.weight

    def forward(self, index: Tensor) -> Tensor:
        x = self.e(index)
        return self.h(x + self.g(F.relu(self.f(x))))


def test_a_tied_head_stays_tied() -> None:
    """And is counted once."""
    model, x = _made(TiedHead), torch.arange(12).view(4, 3)
    scores = fastscore.score(model, [x], progress=False)
    assert list(scores) == ["f"]
    assert "e" in scores.skipped
    result = fastscore.prune(model, scores, x, params=0.9)
    assert result.model.h.weight is result.model.e.weight
    assert result.report.params == tuple(sum(p.numel() for p in each.parameters()) for each in (model, result.model))
