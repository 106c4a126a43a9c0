"""Packed layers as autograd functions; behind a clamp, the tap's measure is part of the clamp's backward."""

from collections.abc import Container
from typing import Any

import torch
from torch import Tensor

from fastscore.fastpath.packed_layers import ClampBounds, Layer
from fastscore.ops.checks import rounded
from fastscore.taps.gates import FusedTap
from fastscore.taps.measures import unclamped
from fastscore.taps.taps import Taps


def packed(x: Tensor, layer: Layer, taps: Taps) -> Tensor:
    """layer(x)."""
    y: Tensor = _Packed.apply(taps.claim(x), layer) if _in_graph(x) else layer.forward(x)
    return y


def clamped(x: Tensor, layer: Layer, bounds: ClampBounds, taps: Taps, readers: Container[str],
            other: Tensor | None = None) -> Tensor:
    """layer(x), which ends in a clamp; a tap on it is published for the first of `readers`, if it is tapped.

    other: what is added before the clamp, by a layer that can.
    """
    if not _in_graph(x) and (other is None or not _in_graph(other)):
        return _forward(layer, x, other)
    gate = taps.rows.gate(len(x), layer.channels(x), x)
    y, tapped = _Clamped.apply(x, other, gate, layer, bounds, taps)
    # its readers send back a gradient that nothing else holds: it may be written to
    taps.publish(FusedTap(y, tapped, gate, readers))
    rest: Tensor = y
    return rest


class _Packed(torch.autograd.Function):
    """x -> layer(x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Layer) -> Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        return layer.forward(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.backward(g, ctx.shape), None


class _Clamped(torch.autograd.Function):
    """(x, other, gate) -> layer(x), which ends in a clamp, twice: for the other readers, and for a tap. other: added
    before the clamp, if it is not None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, other: Tensor | None, gate: Tensor, layer: Any, bounds: ClampBounds, taps: Taps
                ) -> tuple[Tensor, Tensor]:
        y = _forward(layer, x, other)
        if y is x:
            ctx.mark_dirty(x)
        ctx.save_for_backward(y)
        ctx.set_materialize_grads(False)
        ctx.layer, ctx.shape, ctx.taps = layer, x.shape, taps
        ctx.bounds = rounded(bounds, y.dtype)
        return y, y.detach()

    @staticmethod
    def backward(ctx: Any, rest: Tensor | None, tapped: Tensor | None
                 ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        (y,) = ctx.saved_tensors
        if tapped is None:
            g, measured = None if rest is None else unclamped(rest, y, ctx.bounds), None
        else:
            g, measured = ctx.taps.measure.clamped(y, tapped, rest, ctx.bounds)
        through_layer, through_sum = (g is not None and needed for needed in ctx.needs_input_grad[:2])
        return (ctx.layer.backward(g, ctx.shape) if through_layer else None, g if through_sum else None, measured,
                None, None, None)


def _forward(layer: Any, x: Tensor, other: Tensor | None) -> Tensor:
    y: Tensor = layer.forward(x) if other is None else layer.add_relu(x, other)
    return y


def _in_graph(x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()
