"""Gradients that show which rows they come back to, at a fraction of the cost of what they are.

Which rows of a layer's input a gradient reaches is for the rows of its output to say, and for the kernel of a
convolution: a product with a weight makes every channel of all channels. So in runs that ask for no more, PyTorch's own
layers make what they make, and send back what they would with a weight of rank one: a sum over channels, and random
multiples of it.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from fastscore.graph.autograd_nodes import sources
from fastscore.graph.trials.known_samples import KnownSamples
from fastscore.graph.trials.plain_layers import is_product, plain_kind, reads_one
from fastscore.graph.trials.replaced_layers import replaced
from fastscore.modules.weights.experts import ExpertLinear

_CONVOLUTIONS: dict[Any, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    nn.Conv1d: (F.conv1d, F.conv_transpose1d), nn.Conv2d: (F.conv2d, F.conv_transpose2d),
    nn.Conv3d: (F.conv3d, F.conv_transpose3d)}  # and its backward pass
_PRODUCTS = {"MmBackward0", "AddmmBackward0", "LinearBackward0"}
_AROUND = {"ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "AddBackward0"}


@contextmanager
def rows_alone(model: nn.Module, values: bool = True, known: KnownSamples | None = None) -> Iterator[None]:
    """In the block, the gradients that plain layers of `model` (frozen) send back are zero in the same rows, and
    otherwise others. values: whether Linears make what they make; or, of each row, numbers like those it holds. known:
    what layers make of samples; None: it is computed."""
    gains = torch.Generator().manual_seed(0)
    makers = {name: partial(type(layer).forward, layer) if known is None else partial(known.product, name, layer)
              for name, layer in model.named_modules() if _is_known(layer)}
    forwards = {name: partial(_forward, model.get_submodule(name), make, gains, values)
                for name, make in makers.items()}
    forwards |= {name: partial(_own_forward, layer, gains) for name, layer in model.named_modules() if isinstance(
        layer, nn.Linear) and plain_kind(layer) is None and "forward" not in vars(layer)}
    with replaced(model, forwards):
        yield


def _is_known(layer: nn.Module) -> bool:
    kind = plain_kind(layer)
    if kind in _CONVOLUTIONS:
        conv: Any = layer
        return (conv.groups == 1 or conv.groups < conv.in_channels) and conv.padding_mode == "zeros" and \
            isinstance(conv.padding, tuple) and "forward" not in vars(layer)
    return kind is not None and issubclass(kind, nn.Linear) and "forward" not in vars(layer)


def _forward(layer: Any, make: Callable[..., Tensor], gains: torch.Generator, values: bool, /, *args: Any,
             **kwargs: Any) -> Any:
    """make: makes the layer's output. gains: each call has its own, so that what comes back from several to what they
    all read does not cancel out."""
    x = args[0] if args and not kwargs and reads_one(layer, args, kwargs) else None
    if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled() and _is_plain(x) and \
            (isinstance(layer, nn.Linear) or x.dim() == len(layer.kernel_size) + 2):
        own = values or not _has_room(layer, x) or torch.is_autocast_enabled(x.device.type)
        made = _RowsAlone.apply(x, layer, 0.5 + float(torch.rand((), generator=gains)), make if own else None,
                                args[1:])
        return made * (args[1] < len(layer.weight))[:, None] if isinstance(layer, ExpertLinear) else made
    return make(*args, **kwargs)


def _own_forward(layer: Any, gains: torch.Generator, /, *args: Any, **kwargs: Any) -> Any:
    """The same of a Linear of a class of its own, where its code does nothing but multiply by its weight."""
    made = type(layer).forward(layer, *args, **kwargs)
    x = args[0] if len(args) == 1 and not kwargs else None
    if isinstance(x, Tensor) and isinstance(made, Tensor) and x.requires_grad and torch.is_grad_enabled() and \
            _is_plain(x) and made.shape[:-1] == x.shape[:-1] and _runs_through_products(made, x) and \
            _is_product(layer, x, made):
        return _RowsAlone.apply(x, layer, 0.5 + float(torch.rand((), generator=gains)), lambda x: made.detach(), ())
    return made


def _is_product(layer: nn.Module, x: Tensor, made: Tensor) -> bool:
    with _disable_current_modes():  # who follows what is decided by the batch is to see the model's code alone
        return is_product(layer, x, made)


def _runs_through_products(made: Tensor, x: Tensor) -> bool:
    """Whether a gradient comes from `made` back to x by one product, sums with what has none, and views alone."""
    node: Any = made.grad_fn
    source = torch.autograd.graph.get_gradient_edge(x).node
    products = 0
    while node is not source:
        before = [] if node is None else sources(node)
        if len(before) != 1 or node.name() not in _PRODUCTS | _AROUND:
            return False
        products += node.name() in _PRODUCTS
        node = before[0]
    return products == 1


def _is_plain(x: Tensor) -> bool:
    return type(x) is Tensor and x.layout == torch.strided and not x.is_complex() and \
        torch._C._functorch.peek_interpreter_stack() is None


class _RowsAlone(torch.autograd.Function):
    """A layer's output; backward: gradients of the rows that it read."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any, gain: float, make: Callable[..., Tensor] | None,
                besides: tuple[Any, ...]) -> Tensor:
        if not isinstance(layer, nn.Linear):
            ctx.save_for_backward(x)  # as it does itself: who writes to it meanwhile is told so
        ctx.layer, ctx.gain, ctx.shape, ctx.dtype = layer, gain, x.shape, x.dtype
        y: Tensor = _likely(layer, x) if make is None else make(x, *besides)
        return y.clone() if y._is_view() else y  # which may be written to

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None, None]:
        layer, shape = ctx.layer, ctx.shape
        if isinstance(layer, nn.Linear):
            rows = ctx.gain * _scaled(g @ _drawn(g.shape[-1]).to(g))
            return (rows[..., None] * _drawn(shape[-1]).to(g)).to(ctx.dtype), None, None, None, None
        assert ctx.saved_tensors
        kernel, (forward, back) = layer.kernel_size, _CONVOLUTIONS[plain_kind(layer)]
        ones, groups = [1] * len(kernel), layer.groups
        rows = ctx.gain * _scaled(forward(g, _drawn(g.shape[1]).to(g).view(groups, -1, *ones), groups=groups))
        spare = [size - (made - 1) * step + 2 * padding - dilation * (width - 1) - 1 for
                 size, made, step, padding, dilation, width in
                 zip(shape[2:], g.shape[2:], layer.stride, layer.padding, layer.dilation, kernel, strict=True)]
        weight = _drawn(math.prod(kernel)).to(g).view(1, 1, *kernel).expand(groups, 1, *kernel)
        rows = back(rows, weight, None, layer.stride, layer.padding, spare, groups, layer.dilation)
        rows = rows if groups == 1 else rows.repeat_interleave(shape[1] // groups, 1)
        return (rows * _drawn(shape[1]).to(g).view(-1, *ones)).to(ctx.dtype), None, None, None, None


def _has_room(layer: Any, x: Tensor) -> bool:
    """Whether x has as many channels as a layer takes, where it takes them."""
    if isinstance(layer, nn.Linear):
        return x.dim() > 0 and x.shape[-1] == layer.in_features
    return x.dim() == len(layer.kernel_size) + 2 and x.shape[1] == layer.in_channels


def _multiplies(layer: Any, x: Tensor) -> bool:
    """Whether x is what a layer takes, and it holds what it says."""
    weight, bias, linear, groups = layer.weight, layer.bias, isinstance(layer, nn.Linear), getattr(layer, "groups", 1)
    sizes = (layer.out_features, layer.in_features) if linear else (layer.out_channels, layer.in_channels)
    return _has_room(layer, x) and weight.shape[:2] == (sizes[0], sizes[1] // groups) and \
        (bias is None or bias.shape == sizes[:1]) and (x.dtype, x.device) == (weight.dtype, weight.device) and \
        not torch.is_autocast_enabled(x.device.type)


def _likely(layer: Any, x: Tensor) -> Tensor:
    """What a layer might make of x: each output of one input, at a scale of its own (or by such a kernel), and with the
    bias."""
    linear, bias = isinstance(layer, nn.Linear), layer._parameters["bias"]
    groups = 1 if linear else layer.groups
    inputs, outputs = x.shape[-1 if linear else 1] // groups, layer.out_features if linear else layer.out_channels
    order = torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs))[torch.arange(outputs) % inputs]
    order += torch.arange(outputs) // (outputs // groups) * inputs
    y = x.index_select(-1 if linear else 1, order.to(x.device))
    if not linear:
        kernel = layer.kernel_size
        weight = _drawn(outputs * math.prod(kernel)).to(x).view(outputs, 1, *kernel) / math.prod(kernel) ** 0.5
        made: Tensor = _CONVOLUTIONS[plain_kind(layer)][0](y, weight, bias, layer.stride, layer.padding, layer.dilation,
                                                           outputs)
        return made
    y = y * _drawn(outputs).to(x)
    return y if bias is None or bias.dim() > 1 else y + bias.to(x.dtype)


@contextmanager
def likely_numbers(model: nn.Module) -> Iterator[None]:
    """In the block, plain layers of `model` make numbers like those that they read, at next to no cost: whether code
    runs with as many channels as there are, these show as well."""
    def forward(layer: Any, /, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if len(args) == 1 and not kwargs else None
        if isinstance(x, Tensor) and _is_plain(x) and _multiplies(layer, x):
            return _likely(layer, x)
        return type(layer).forward(layer, *args, **kwargs)

    with replaced(model, {name: partial(forward, layer) for name, layer in model.named_modules() if _is_known(layer)
                          and not isinstance(layer, ExpertLinear)}):
        yield


@contextmanager
def rows_shown(model: nn.Module) -> Iterator[None]:
    """In the block, gradients come back through layers of `model` that multiply by a weight without zeros to what they
    would: to each row and column of the weight, and each input, as numbers that are zero where those are."""
    def forward(layer: Any, /, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if len(args) == 1 and not kwargs else None
        if isinstance(x, Tensor) and _is_plain(x):
            with torch.no_grad():
                made = type(layer).forward(layer, x)
            if is_product(layer, x, made):
                return _RowsShown.apply(x, layer.weight, layer._parameters["bias"], made)
        return type(layer).forward(layer, *args, **kwargs)

    with replaced(model, {name: partial(forward, layer) for name, layer in model.named_modules() if isinstance(
            layer, nn.Linear) and isinstance(layer._parameters.get("weight"), nn.Parameter)
            and "forward" not in vars(layer)}):
        yield


class _RowsShown(torch.autograd.Function):
    """What a Linear made of x; backward: to x and to its parameters, by sums."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, made: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.with_bias = bias is not None
        return made.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, = ctx.saved_tensors
        outputs, inputs = g.abs().flatten(0, -2), x.abs().flatten(0, -2)
        of_outputs = _scaled((outputs * inputs.any(-1, keepdim=True)).sum(0))
        of_inputs = _scaled((inputs * outputs.any(-1, keepdim=True)).sum(0))
        to_x = _scaled(g @ _drawn(g.shape[-1]).to(g))[..., None] * _drawn(x.shape[-1]).to(g)
        of_bias = _scaled(outputs.sum(0)) if ctx.with_bias else None
        return to_x.to(x.dtype), of_outputs[:, None] * of_inputs, of_bias, None


@cache
def _drawn(size: int) -> Tensor:
    """Random numbers of either sign, none near zero."""
    generator = torch.Generator().manual_seed(size)
    drawn = 0.5 + torch.rand(size, generator=generator)
    return drawn * (2 * torch.randint(2, (size,), generator=generator) - 1)


def _scaled(rows: Tensor) -> Tensor:
    """The same, of which the largest is 1: after many layers they would be too large, or too small, for numbers."""
    largest = rows.abs().max() if rows.numel() else rows.new_ones(())
    return rows / torch.where(largest > 0, largest, 1)
