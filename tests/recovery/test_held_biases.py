"""Means of removed channels where no layer of its own has a bias: nn.MultiheadAttention's projections, and adapters."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from oracles import untouched
from torch import Tensor, nn

import fastscore

X = torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(1)).double()
GONE = [1, 4]


class Attending(nn.Module):
    """nn.MultiheadAttention alone reads what a layer makes; memory: keys and values of something else."""

    def __init__(self, bias: bool = True, memory: bool = False) -> None:
        super().__init__()
        self.make, self.other, self.head = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)
        self.read = nn.MultiheadAttention(8, 2, bias=bias, batch_first=True)
        self.memory = memory

    def forward(self, x: Tensor) -> Tensor:
        y = self.make(x).tanh()
        z = y.flip(1) if self.memory else y
        return self.head(self.read(y, z, z)[0]).mean(1)


class Adapted(nn.Module):
    """A layer, and two of low rank beside it, with the names that PEFT gives them."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.base_layer = nn.Linear(8, 7, bias)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(8, 4, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(4, 7, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + 0.5 * self.lora_B["default"](self.lora_A["default"](x))


class Lora(nn.Module):
    """An adapted layer alone reads what another makes."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.make, self.read, self.head = nn.Linear(6, 8), Adapted(bias), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.read(self.make(x).tanh()).relu()).mean(1)


def made(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build().double().eval()
        for parameter in model.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
        model.make.weight.data[GONE[0]] = model.make.weight[2]  # a channel that another can stand in for
        model.make.bias.data[GONE[0]] = model.make.bias[2]
    return model


def cut(model: nn.Module, group: str, gone: list[int], **options: Any) -> tuple[fastscore.Scores, Any]:
    """Scores by which `gone` goes first, and what prune() makes of them."""
    scores = fastscore.score(model, [X], progress=False)
    total = torch.ones_like(scores.totals[group])
    total[gone] = 0
    scores = replace(scores, totals={group: total})
    result = fastscore.prune(model, scores, X, channels=1 - len(gone) / len(total), cost_aware=False, **options)
    assert result.removed[group].tolist() == gone
    return scores, result


def with_mean(model: nn.Module, module: str, gone: list[int], value: float | None = None) -> Tensor:
    """The output where a module reads the mean, over samples and places, of what is gone (or a value) in its place."""

    def fill(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        filled = []
        for x in args:
            mean = x.mean((0, 1)) if value is None else torch.full_like(x[0, 0], value)
            filled.append(x.index_copy(-1, torch.tensor(gone), mean[gone].expand(*x.shape[:-1], -1)))
        return tuple([filled[0]] * len(args) if all(x is args[0] for x in args) else filled)

    handle = model.get_submodule(module).register_forward_pre_hook(fill)
    with torch.no_grad():
        output = model(X)
    handle.remove()
    return output


@pytest.mark.parametrize(("build", "group", "module", "gone"), [
    (Attending, "make", "read", GONE), (Lora, "make", "read", GONE), (lambda: Lora(False), "make", "read", GONE),
    (Lora, "read.lora_A.default", "read.lora_B.default", [0, 3])])
def test_the_mean_takes_the_place_of_what_is_gone(build: Callable[[], nn.Module], group: str, module: str,
                                                  gone: list[int]) -> None:
    model = made(build)
    want = with_mean(model, module, gone)
    with untouched(model):
        scores, result = cut(model, group, gone)
        torch.testing.assert_close(result.model(X), want, rtol=1e-6, atol=1e-7)  # means are float32
        with torch.no_grad(), fastscore.mask(model, scores, len(gone) / len(scores[group]), X):
            torch.testing.assert_close(model(X), result.model(X), rtol=1e-10, atol=1e-12)
    assert result.report.params[1] == sum(parameter.numel() for parameter in result.model.parameters())
    assert {name.rpartition(".")[2] for name, _ in result.model.named_parameters()} <= {"weight", "bias",
                                                                                      "in_proj_weight", "in_proj_bias"}
    again = fastscore.reconstruct(model, result, [X[:1], X], "mean", progress=False)
    assert [type(module) for module in again.model.modules()] == [type(module) for module in result.model.modules()]


@pytest.mark.parametrize(("build", "group", "module", "gone"), [
    (lambda: Attending(bias=False), "make", "read", GONE), (lambda: Attending(memory=True), "make", "read", GONE),
    (lambda: Lora(False), "read.lora_A.default", "read.lora_B.default", [0, 3])])
def test_what_has_no_place_for_it_reads_nothing(build: Callable[[], nn.Module], group: str, module: str,
                                                gone: list[int]) -> None:
    """No bias; queries and keys of two things, whose means are not told apart; ranks beside a layer without a bias."""
    model = made(build)
    _, result = cut(model, group, gone)
    torch.testing.assert_close(result.model(X), with_mean(model, module, gone, 0.0), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("build", [Attending, Lora])
def test_linear_reconstruction_is_exact_where_another_channel_is_the_same(build: Callable[[], nn.Module]) -> None:
    model = made(build)
    _, result = cut(model, "make", GONE[:1], compensate=False)
    batches = list(X.split(1))
    repaired = fastscore.reconstruct(model, result, batches, "linear", ridges=[0.0], progress=False)
    with torch.no_grad():
        assert not torch.allclose(result.model(X), model(X), rtol=1e-2)
        torch.testing.assert_close(repaired.model(X), model(X), rtol=1e-5, atol=1e-7)
