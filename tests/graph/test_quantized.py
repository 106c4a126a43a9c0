"""Models that are quantized already, or in part: no gradient comes back through the operations of PyTorch's quantized
layers, and whole numbers are no weights to cut. What can be scored is; the rest names the way out."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao import quantization

import fastscore
from fastscore.graph.tracing import trace

WAY_OUT = ": prune the model before it is quantized, and quantize what is left"
pytestmark = pytest.mark.filterwarnings("ignore:.*quantiz:DeprecationWarning", "ignore:torch.quantize:UserWarning",
                                        "ignore:quantized.*autograd kernel:UserWarning")
X = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def dynamic(model: nn.Module) -> nn.Module:
    quantized: nn.Module = quantization.quantize_dynamic(model, {nn.Linear})
    return quantized


def static(model: nn.Module, convert: bool) -> nn.Module:
    model = quantization.QuantWrapper(model).eval()
    model.qconfig = quantization.default_qconfig if convert else quantization.QConfig(  # type: ignore[assignment]
        activation=quantization.HistogramObserver, weight=quantization.default_weight_observer)
    prepared = quantization.prepare(model)
    prepared(X)
    return quantization.convert(prepared) if convert else prepared


@pytest.mark.parametrize("kind", ["dynamic", "static", "prepared"])
def test_a_quantized_model_has_a_way_out(kind: str) -> None:
    made = dynamic(network()) if kind == "dynamic" else static(network(), kind == "static")
    with pytest.raises(ValueError, match="is quantized, or prepared for that .*" + WAY_OUT):
        fastscore.score(made, [X], progress=False)
    assert fastscore.score(network(), [X], progress=False)


class BehindQuantized(nn.Module):
    """Its first layers reach the output through a quantized one alone, the others as well."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 8)
        self.c, self.d, self.last = nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 3)
        self.quantized = dynamic(nn.Sequential(nn.Linear(8, 3)))

    def forward(self, x: Tensor) -> Tensor:
        behind: Tensor = self.quantized(F.relu(self.b(F.relu(self.a(x)))))
        return behind + self.last(F.relu(self.d(F.relu(self.c(x)))))


def test_layers_that_no_gradient_comes_back_to_have_no_scores() -> None:
    """They would have zeros: PyTorch warns, and goes on."""
    torch.manual_seed(0)
    scores = fastscore.score(BehindQuantized().eval(), [X], progress=False)
    assert set(scores) == {"c", "d"}
    assert all(scores[name].any() for name in scores)
    assert scores.skipped["a"] == "b reads its channels where no gradient comes back (detach(), a choice by them, or " \
        "an operation that has none, as those of quantized layers)"


class Whole(nn.Linear):
    """Its weight is whole numbers, with a scale for each row."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features)
        weight = layer.weight.detach()
        self.register_buffer("scale", weight.abs().amax(1, keepdim=True) / 127)
        self.weight = nn.Parameter((weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale, self.bias)


class Computing(Tensor):
    """Whole numbers that take themselves for floats, as torchao's do."""

    held: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, scale: Tensor) -> "Computing":
        made: Computing = Tensor._make_wrapper_subclass(cls, held.shape, dtype=torch.float32)  # type: ignore[attr-defined]
        made.held, made.scale = held, scale
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default, torch.ops.aten.alias.default):
            return cls(args[0].held, args[0].scale)
        return func(*(each.held * each.scale if isinstance(each, Computing) else each for each in args), **kwargs or {})


def of_tensors(layer: nn.Linear) -> nn.Linear:
    scale = layer.weight.detach().abs().max() / 127
    held = (layer.weight.detach() / scale).round().to(torch.int8)
    layer.weight = nn.Parameter(Computing(held, scale), requires_grad=False)
    return layer


@pytest.mark.parametrize(("make", "what"), [(Whole, "quantized (torch.int8)"),
                                            (of_tensors, "a Computing, which no part of it is")])
def test_weights_of_whole_numbers_are_kept(make: Any, what: str) -> None:
    model = nn.Sequential(network(), nn.ReLU(), nn.Linear(3, 7), nn.ReLU(), nn.Linear(7, 2)).eval()
    model[0][2] = make(model[0][2])
    graph = trace(model, X)
    assert {group.name for group in graph.groups} == {"0.4", "2"}
    assert graph.skipped["0.0"] == graph.skipped["0.2"] == f"the weight of 0.2 is {what}{WAY_OUT}"
