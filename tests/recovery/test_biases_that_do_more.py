"""Layers that do more with their bias than add it, and biases that other code reads: no mean goes into them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import untouched
from torch import Tensor, nn

import fastscore
from fastscore.graph.tracing import trace
from fastscore.modules.evaluation_copy import evaluation_copy

X = torch.randn(12, 5, generator=torch.Generator().manual_seed(1)).double()
IMAGES = torch.randn(8, 5, 6, 6, generator=torch.Generator().manual_seed(2)).double()


class Equalized(nn.Linear):
    """StyleGAN's: the bias has a learning rate of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, None if self.bias is None else 0.1 * self.bias)


class Rectified(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class RectifiedConv(nn.Conv2d):
    """As detectron2's."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Coordinates(nn.Conv2d):
    """CoordConv: one channel more than it is given is there when it runs."""

    def __init__(self, inputs: int, outputs: int, kernel: int, bias: bool = True) -> None:
        super().__init__(inputs + 1, outputs, kernel, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        at = torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype).expand(len(x), 1, *x.shape[2:])
        return super().forward(torch.cat([x, at], 1))


class Timed(nn.Linear):
    """The same of a Linear, as FFJORD's."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__(inputs + 1, outputs, bias)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.cat([x, torch.full_like(x[..., :1], 0.3)], -1))


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 0.2 * super().forward(x)


class Subtracting(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) - self.bias


class Ignoring(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Same(nn.Linear):
    """Its forward is its own, and does what any other's does."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t() + (0 if self.bias is None else self.bias)


class Net(nn.Module):
    """read: what reads `make`. reads: the bias that code outside of it reads, too. swapped: parameters that
    torch.func.functional_call puts in for its own, times 1.5."""

    def __init__(self, read: Callable[..., nn.Module] = nn.Linear, reads: str = "", swapped: Sequence[str] = (),
                 bias: bool = True) -> None:
        super().__init__()
        image = read in (RectifiedConv, Coordinates)
        self.make = nn.Conv2d(5, 8, 3) if image else nn.Linear(5, 8)
        self.read = read(8, 7, 3, bias=bias) if image else read(8, 7, bias=bias)
        self.head = nn.Conv2d(7, 3, 1) if image else nn.Linear(7, 3)
        self.reads, self.swapped = reads, swapped

    def forward(self, x: Tensor) -> Tensor:
        y, read = self.make(x).relu() + 0.5, self.read
        if self.swapped:
            own = {name: 1.5 * each if name in self.swapped else each for name, each in read.named_parameters()}
            z = torch.func.functional_call(read, own, (y,))
        else:
            z = read(y)
        if self.reads == "subtracted":
            z = z - read.bias
        if self.reads == "where there is one" and read.bias is not None:
            z = z - read.bias
        out = self.head(z.tanh())
        if self.reads == "decay":
            out = out * (1 + self.head.bias.square().sum())
        return out.flatten(2).mean(2) if out.dim() > 2 else out


MORE: dict[str, tuple[Callable[[], Net], str]] = {
    "equalized": (lambda: Net(Equalized), "read"), "rectified": (lambda: Net(Rectified), "read"),
    "rectified-conv": (lambda: Net(RectifiedConv), "read"), "scaled": (lambda: Net(Scaled), "read"),
    "coordinates": (lambda: Net(Coordinates), "read"), "time": (lambda: Net(Timed), "read"),
    "coordinates-without": (lambda: Net(Coordinates, bias=False), "read"),
    "subtracting": (lambda: Net(Subtracting), "read"), "ignoring": (lambda: Net(Ignoring), "read"),
    "ignoring-none": (lambda: Net(Ignoring, bias=False), "read"),
    "rectified-without": (lambda: Net(Rectified, bias=False), "read"),
    "subtracted": (lambda: Net(reads="subtracted"), "read"),
    "where-there-is-one": (lambda: Net(reads="where there is one", bias=False), "read"),
    "decay": (lambda: Net(reads="decay"), "head"),
    "swapped": (lambda: Net(swapped=("weight", "bias")), "read"),
    "swapped-bias": (lambda: Net(swapped=("bias",)), "read"),
}
ADDED: dict[str, Callable[[], Net]] = {
    "plain": Net, "without": lambda: Net(bias=False), "same": lambda: Net(Same),
    "same-without": lambda: Net(Same, bias=False),
    "swapped-weight": lambda: Net(swapped=("weight",)),
}


def made(build: Callable[[], Net]) -> tuple[Net, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build().double().eval()
    return model, IMAGES if isinstance(model.make, nn.Conv2d) else X


def cut(model: nn.Module, x: Tensor, **options: Any) -> tuple[fastscore.Scores, Any]:
    """Scores by which three channels of each group go, and what prune() makes of them."""
    scores = fastscore.score(model, [x], progress=False)
    scores = replace(scores, totals={name: torch.arange(len(total)).to(total) + (2.5 if name == "read" else 3)
                                     for name, total in scores.totals.items()})
    return scores, fastscore.prune(model, scores, x, channels=0.6, cost_aware=False, **options)


@pytest.mark.parametrize("kind", [*MORE, *ADDED])
def test_the_smaller_model_is_the_masked_one(kind: str) -> None:
    model, x = made(MORE[kind][0] if kind in MORE else ADDED[kind])
    assert set(trace(model, x).kept_biases) == ({MORE[kind][1]} if kind in MORE else set())
    with untouched(model):
        scores, result = cut(model, x)
        assert result.removed["make"].numel() > 1
        with torch.no_grad(), fastscore.mask(model, scores, 0.4, x):
            torch.testing.assert_close(result.model(x), model(x), rtol=1e-10, atol=1e-12)
    plain = fastscore.prune(model, scores, x, channels=0.6, cost_aware=False, compensate=False).model
    assert torch.equal(plain.read.get_parameter("weight"), result.model.read.get_parameter("weight"))
    for name in ("read", "head"):
        before, after = (made.get_submodule(name).bias for made in (plain, result.model))
        same = before is after is None or (before is not None and after is not None and torch.equal(before, after))
        assert same == (kind in MORE and MORE[kind][1] == name)
    assert result.report.params[1] == sum(parameter.numel() for parameter in result.model.parameters())
    assert ("biases" in result.report.notes) == (kind in MORE)
    if kind in MORE:
        assert result.report.notes["biases"].startswith(f"{MORE[kind][1]} ")


class Attending(nn.Module):
    """Code outside of a module that holds its biases itself reads them. x: [N, T, 5]."""

    def __init__(self, reads: str) -> None:
        super().__init__()
        self.make, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self.read = nn.MultiheadAttention(8, 2, batch_first=True)
        self.first, self.states, self.reads = nn.Linear(5, 5), nn.LSTM(8, 8, batch_first=True), reads

    def forward(self, x: Tensor) -> Tensor:
        y, read = self.make(self.first(x).relu()).relu() + 0.5, self.read
        z = self.states(y)[0] if self.reads == "forgetting" else read(y, y, y)[0]
        if self.reads == "decay":
            z = z * (1 + read.in_proj_bias.square().sum())
        if self.reads == "added":
            z = z + read.in_proj_bias[-8:]
        if self.reads == "multiplied again":
            z = z + F.linear(y, read.in_proj_weight, read.in_proj_bias)[..., -8:]
        if self.reads == "forgetting":
            z = z * (1 + self.states.bias_hh_l0[8:16].sigmoid().sum())
        return self.head(z.tanh()).mean(1)


@pytest.mark.parametrize("reads", ["", "decay", "added", "multiplied again", "forgetting"])
def test_biases_that_attention_and_recurrent_modules_hold(reads: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Attending(reads).double().eval()
        torch.nn.init.normal_(model.read.in_proj_bias)
    x = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad(), untouched(model):
        torch.testing.assert_close(evaluation_copy(model)(x), model(x))  # where each runs as a layer
        graph = trace(model, x)
    if reads in ("", "decay", "added"):
        assert graph.kept_biases == (
            {} if not reads else {"read.in_proj_weight": "has a bias that other code reads as well"})
        assert "make" in [group.name for group in graph.groups]
    scores = fastscore.score(model, [x], progress=False)
    result = fastscore.prune(model, scores, x, channels=0.6, scope="layer")
    with torch.no_grad(), fastscore.mask(model, scores, 0.4, x, scope="layer"):
        torch.testing.assert_close(result.model(x), model(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("kind", "method"), [("equalized", "asymmetric"), ("subtracted", "auto"),
                                              ("coordinates", "auto"), ("time", "auto"),
                                              ("swapped-bias", "auto")])
def test_repairs_leave_such_biases_and_are_no_worse_than_the_cut(kind: str, method: Any) -> None:
    model, x = made(MORE[kind][0])
    bias = model.read.get_parameter("bias")
    _, result = cut(model, x)
    repaired = fastscore.reconstruct(model, result, list(x.split(3)), method, progress=False)
    stays = torch.ones(len(bias), dtype=torch.bool)
    if "read" in result.removed:
        stays[result.removed["read"]] = False
    assert torch.equal(repaired.model.read.bias, bias[stays])
    cut_alone, *others = repaired.report.repairs
    assert cut_alone.name == "none"
    assert min(row.kl for row in others if row.chosen) <= cut_alone.kl
