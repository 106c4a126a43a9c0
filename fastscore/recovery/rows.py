"""What a layer reads and makes, as rows: its output is a matrix product of the two."""

from typing import Any

import torch
from torch import Tensor, nn

from fastscore.batches.devices import with_float64
from fastscore.modules.inspection import fits_width
from fastscore.modules.weights.channels_last import channels_first
from fastscore.modules.weights.computed_weights import PLAIN
from fastscore.modules.weights.parameter_layers import ParameterLayer
from fastscore.modules.weights.transposed_linear import is_linear, is_transposed
from fastscore.recovery.moments import POSITIONS, rows_of, some_places


def blocks_of(layer: nn.Module) -> int:
    """How many blocks of inputs make outputs of their own: the groups of a convolution."""
    return int(getattr(layer, "groups", 1))


def read_rows(layer: nn.Module, x: Tensor, valid: Tensor | None = None, limit: int = POSITIONS) -> Tensor:
    """[n, G, K]: all that goes into each of some outputs of a Linear or a convolution, kernel positions and all, block
    by block; at most `limit` places of each sample."""
    if is_linear(layer):
        return rows_of(layer, x, valid, limit)[:, None]
    conv: Any = layer
    made, x = made_sizes(conv, x), channels_first(conv, x.detach())
    if any(conv._reversed_padding_repeated_twice):
        x = nn.functional.pad(x, conv._reversed_padding_repeated_twice,
                              mode="constant" if conv.padding_mode == "zeros" else conv.padding_mode)
    steps = x.stride()[2:]
    view = x.as_strided((len(x), *made, x.shape[1], *conv.kernel_size), (  # [N, *made, C, *kernel]
        x.stride(0), *(step * stride for step, stride in zip(steps, conv.stride, strict=True)),
        x.stride(1), *(step * dilation for step, dilation in zip(steps, conv.dilation, strict=True))))
    at = some_places(torch.Size(made).numel(), limit)
    if len(at) < torch.Size(made).numel():
        index: tuple[Any, ...] = slice(None), *(place.to(x.device) for place in torch.unravel_index(at, made))
        view = view[index]
    read = x.shape[1] // blocks_of(layer) * torch.Size(conv.kernel_size).numel()
    rows: Tensor = view.reshape(len(x) * len(at), blocks_of(layer), read)
    return rows


def made_rows(layer: nn.Module, y: Tensor, valid: Tensor | None = None, limit: int = POSITIONS) -> Tensor:
    """[n, C_out]: the outputs that belong to read_rows."""
    if is_linear(layer):
        return rows_of(layer, y, valid, limit)
    y = channels_first(layer, y.detach())
    flat = y.flatten(2)
    at = some_places(flat.shape[2], limit)
    if len(at) < flat.shape[2]:
        flat = flat.index_select(2, at.to(y.device))
    return flat.transpose(1, 2).flatten(0, 1)


def made_sizes(layer: nn.Module, x: Tensor) -> list[int]:
    """How many outputs a Linear or a convolution makes of x, along each dimension but those of samples and channels."""
    if is_linear(layer):
        return list(x.shape[1:-1])
    conv: Any = layer
    padding = conv._reversed_padding_repeated_twice[::-1]  # of the first dimension, behind and before it, first
    places = channels_first(conv, x).shape[2:]
    return [(size + behind + before - step * (kernel - 1) - 1) // stride + 1 for size, behind, before, kernel, stride,
            step in zip(places, padding[::2], padding[1::2], conv.kernel_size, conv.stride, conv.dilation, strict=True)]


def has_lost_places(layer: nn.Module, x: Tensor, y: Tensor) -> bool:
    """Whether there are fewer outputs for what a layer reads, x, than y holds: where channels that went lie along
    another dimension than that which the layer reads."""
    return made_sizes(layer, x) != list(y.shape[1:-1] if is_linear(layer) else channels_first(layer, y).shape[2:])


def weight_rows(layer: nn.Module) -> Tensor:
    """float64 [G, O / G, K], as read_rows."""
    weight = with_float64(layer.weight.detach()).double()  # type: ignore[operator]
    weight = weight.t() if is_transposed(layer) else weight
    rows: Tensor = weight.unflatten(0, (blocks_of(layer), -1)).flatten(2)
    return rows


def set_weight_rows(layer: nn.Module, rows: Tensor) -> None:
    """Make [G, O / G, K], as read_rows, the weight of a layer, in place."""
    weight: Any = layer.weight
    weight.copy_(rows[0].t() if is_transposed(layer) else rows.reshape(weight.shape))


def is_product(layer: nn.Module, x: Tensor, y: Tensor) -> bool:
    """Whether the layer does make y of x as the rows say: a Linear or a convolution that is none of another kind."""
    if not isinstance(layer, PLAIN) or isinstance(layer, ParameterLayer) or not isinstance(y, Tensor) \
            or x.dim() != y.dim() or not fits_width(layer, x):
        return False
    rows, made = read_rows(layer, with_float64(x)), made_rows(layer, with_float64(y))
    if len(rows) != len(made) or not made.numel():  # of nothing that is read, nothing is seen
        return False
    bias = 0.0 if layer.bias is None else with_float64(layer.bias.detach()).double()  # type: ignore[operator]
    expected = torch.einsum("ngk,gok->ngo", rows.double(), weight_rows(layer)).flatten(1) + bias
    if expected.shape != made.shape:  # of a part of the weight
        return False
    return bool((expected - made).abs().max() <= 1e-3 * made.abs().max().clamp(min=1e-6))
