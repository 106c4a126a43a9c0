"""Layers of PyTorch's own code, whose output follows from what they hold: what is held need not be run to be compared.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastscore.graph.trials.differences import all_close
from fastscore.modules.attention.multihead_attention import SequenceFirstLinear
from fastscore.modules.attention.projections import ProjectionLinear
from fastscore.modules.attention.windowed_attention import LinearWithoutKeyBias
from fastscore.modules.inspection import LAYERS, runs_code_of, runs_own_code
from fastscore.modules.narrower import without
from fastscore.modules.weights.experts import ExpertLinear, TurnedExpertLinear
from fastscore.modules.weights.parameter_layers import ParameterLinear

# the first that a layer is; those of fastscore.modules multiply as a Linear does, by rows in another order
_PLAIN = (ProjectionLinear, SequenceFirstLinear, TurnedExpertLinear, ExpertLinear, *LAYERS)
_RETURN_ONE = {kind.forward for kind in (nn.Linear, SequenceFirstLinear, LinearWithoutKeyBias)}  # of Linears, a tensor
_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_WIDTHS = {"in_features", "out_features", "in_channels", "out_channels"}
_OTHERWISE = {"forward", "training", "_modules", "_parameters", "_of", *_WIDTHS}  # compared apart, or of no account


def plain_kind(layer: nn.Module) -> type[nn.Module] | None:
    """The class of PyTorch whose code makes the layer's output, of parameters that it holds itself; None of others."""
    kind = next((kind for kind in _PLAIN if isinstance(layer, kind)), None)
    plain = kind is not None and runs_code_of(layer, kind) and set(layer._parameters) == {"weight", "bias"}
    return kind if plain and not layer._modules else None


def may_make_several(layer: nn.Module) -> bool:
    """Whether a Linear or convolution is of a class whose code may return no tensor, but several."""
    return runs_own_code(layer) and type(layer).forward not in _RETURN_ONE and not isinstance(layer, ParameterLinear)


def memory_order(x: Tensor) -> Any:
    """How a tensor lies in memory; None where it lies otherwise, or in several ways at once, as images of one channel
    do."""
    ways = [order for order in (torch.contiguous_format, _LAST.get(x.dim())) if order is not None
            and x.is_contiguous(memory_format=order)]
    return ways[0] if len(ways) == 1 else None


def order_of_dims(x: Tensor) -> list[int]:
    """The dimensions of more than one place, from the outermost in memory to the innermost: in a copy, where elements
    lie apart, or over each other."""
    strides = torch.empty_like(x, device="meta").stride()
    return sorted((dim for dim, size in enumerate(x.shape) if size > 1), key=lambda dim: -strides[dim])


def reads_one(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a layer is called on what it reads, and on nothing besides, but for the expert of each row."""
    return len(args) + len(kwargs) == 1 or (isinstance(layer, ExpertLinear) and len(args) == 2 and not kwargs)


def holds_rest(small: nn.Module, whole: nn.Module, gone_in: Tensor | None, gone_out: Tensor | None) -> bool:
    """Whether a smaller layer computes what a larger one does of inputs that are zero at what is gone: its code is
    PyTorch's, and it holds the rest of the same weights. False where that cannot be seen.

    gone_in, gone_out: positions of its inputs, and outputs, that are gone, int64; None where there are none.
    """
    kind = plain_kind(whole)
    if kind is None or type(small) is not type(whole) or plain_kind(small) is None or getattr(whole, "groups", 1) != 1:
        return False
    if _settings(small) != _settings(whole):
        return False
    held: Any = small
    weight, bias, ins, outs = held.weight, held.bias, *((1, 0) if not getattr(whole, "transposed", False) else (0, 1))
    if isinstance(whole, ExpertLinear):
        ins, outs = 2, 1
    of_whole: Any = whole
    expected = _without(_without(of_whole.weight, outs, gone_out), ins, gone_in)
    widths = (held.in_features, held.out_features) if isinstance(whole, nn.Linear) else \
        (held.in_channels, held.out_channels)
    if widths != (expected.shape[ins], expected.shape[outs]) or not _same(weight, expected):
        return False
    if bias is None or of_whole.bias is None:
        return bias is of_whole.bias
    return _same(bias, _without(of_whole.bias, bias.dim() - 1, gone_out))


def is_product(layer: nn.Module, x: Tensor, made: Tensor, gone_in: Tensor | None = None,
               gone_out: Tensor | None = None) -> bool:
    """Whether a Linear of whatever code has made of x the product with the weight that it holds, and its bias, in all
    rows; without positions that are gone, with the rest of that weight. False where that cannot be seen.

    A random sum over the outputs tells it, which one product with a vector gives: it is off by all that any output is.
    """
    held: Any = layer
    x, made = x.detach(), made.detach()
    if not isinstance(layer, nn.Linear) or set(layer._parameters) != {"weight", "bias"} or layer._modules or \
            not made.is_floating_point() or {x.dtype, held.weight.dtype} != {made.dtype}:
        return False
    weight, bias = _without(_without(held.weight.detach(), 0, gone_out), 1, gone_in), held.bias
    if x.shape[-1:] != weight.shape[1:] or made.shape != (*x.shape[:-1], len(weight)) or not made.numel():
        return False
    drawn = torch.rand(len(weight), generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(x.device) + 0.5
    drawn = torch.where(torch.arange(len(weight), device=x.device) % 2 == 0, drawn, -drawn)
    expected = x.double() @ (drawn @ weight.double())
    if bias is not None:
        expected = expected + drawn @ _without(bias.detach(), 0, gone_out).double()
    rounding = torch.finfo(made.dtype).eps ** (2 / 3)
    return all_close(made.double() @ drawn, expected, rounding=rounding)


def _settings(layer: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(layer).items() if name not in _OTHERWISE and "_hooks" not in name}


def _without(x: Tensor, dim: int, gone: Tensor | None) -> Tensor:
    return x if gone is None else without(x, dim, gone)


def _same(x: Tensor, expected: Tensor) -> bool:
    return x.dtype == expected.dtype and x.shape == expected.shape and torch.equal(x, expected)
