"""Packed layers as autograd functions; behind a clamp, the tap's measure is part of the clamp's backward."""

from collections.abc import Container
from typing import Any

import torch
from torch import Tensor

from fastscore.fastpath.deferred import become
from fastscore.fastpath.packed_layers import ClampBounds, Layer
from fastscore.ops.checks import rounded
from fastscore.taps.gates import FusedTap
from fastscore.taps.measures import unclamped
from fastscore.taps.taps import Taps


def packed(x: Tensor, layer: Layer, taps: Taps, into: Tensor | None = None) -> Tensor:
    """layer(x). into: the stand-in for it (see fastscore.fastpath.deferred) that becomes this, if there is one."""
    y: Tensor = _Packed.apply(taps.claim(x), layer, into) if _in_graph(x) else _made(layer.forward(x), into)
    return y


def clamped(x: Tensor, layer: Layer, bounds: ClampBounds, taps: Taps, readers: Container[str],
            other: Tensor | None = None, into: Tensor | None = None) -> Tensor:
    """layer(x), which ends in a clamp; a tap on it is published for the first of `readers`, if it is tapped.

    other: what is added before the clamp, by a layer that can. into: as `packed` has it.
    """
    if not _in_graph(x) and (other is None or not _in_graph(other)):
        return _made(_forward(layer, x, other), into)
    gate = taps.rows.gate(len(x), layer.channels(x), x)
    y, tapped = _Clamped.apply(x, other, gate, layer, bounds, taps, into)
    # its readers send back a gradient that nothing else holds: it may be written to
    taps.publish(FusedTap(y, tapped, gate, readers))
    rest: Tensor = y
    return rest


class _Packed(torch.autograd.Function):
    """x -> layer(x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Layer, into: Tensor | None) -> Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        y = _made(layer.forward(x), into)
        if into is not None:
            ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return ctx.layer.backward(g, ctx.shape), None, None


class _Clamped(torch.autograd.Function):
    """(x, other, gate) -> layer(x), which ends in a clamp, twice: for the other readers, and for a tap. other: added
    before the clamp, if it is not None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, other: Tensor | None, gate: Tensor, layer: Any, bounds: ClampBounds, taps: Taps,
                into: Tensor | None) -> tuple[Tensor, Tensor]:
        y = _made(_forward(layer, x, other), into)
        if y is x or y is into:
            ctx.mark_dirty(y)
        ctx.save_for_backward(y)
        ctx.set_materialize_grads(False)
        ctx.layer, ctx.shape, ctx.taps = layer, x.shape, taps
        ctx.bounds = rounded(bounds, y.dtype)
        return y, y.detach()

    @staticmethod
    def backward(ctx: Any, rest: Tensor | None, tapped: Tensor | None
                 ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None, None]:
        (y,) = ctx.saved_tensors
        if tapped is None:
            g, measured = None if rest is None else unclamped(rest, y, ctx.bounds), None
        else:
            g, measured = ctx.taps.measure.clamped(y, tapped, rest, ctx.bounds)
        through_layer, through_sum = (g is not None and needed for needed in ctx.needs_input_grad[:2])
        return (ctx.layer.backward(g, ctx.shape) if through_layer else None, g if through_sum else None, measured,
                None, None, None, None)


def _forward(layer: Any, x: Tensor, other: Tensor | None) -> Tensor:
    y: Tensor = layer.forward(x) if other is None else layer.add_relu(x, other)
    return y


def _made(y: Tensor, into: Tensor | None) -> Tensor:
    return y if into is None else become(into, y)


def _in_graph(x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()
