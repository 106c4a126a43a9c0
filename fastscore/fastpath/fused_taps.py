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


def clamped(x: Tensor, layer: Layer, bounds: ClampBounds, taps: Taps, readers: Container[str]) -> Tensor:
    """layer(x), which ends in a clamp; a tap on it is published for the first of `readers`, if it is tapped."""
    if not _in_graph(x):
        return layer.forward(x)
    gate = taps.gate(len(x), layer.channels(x), x)
    y, tapped = _Clamped.apply(x, gate, layer, bounds, taps)
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
    """(x, gate) -> layer(x), which ends in a clamp, twice: for the other readers, and for a tap."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, layer: Layer, bounds: ClampBounds, taps: Taps
                ) -> tuple[Tensor, Tensor]:
        y = layer.forward(x)
        if y is x:
            ctx.mark_dirty(x)
        ctx.save_for_backward(y)
        ctx.set_materialize_grads(False)
        ctx.layer, ctx.shape, ctx.taps = layer, x.shape, taps
        ctx.bounds = rounded(bounds, y.dtype)
        return y, y.detach()

    @staticmethod
    def backward(ctx: Any, rest: Tensor | None, tapped: Tensor | None
                 ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        (y,) = ctx.saved_tensors
        if tapped is None:
            g, measured = None if rest is None else unclamped(rest, y, ctx.bounds), None
        else:
            g, measured = ctx.taps.measure.clamped(y, tapped, rest, ctx.bounds)
        return None if g is None else ctx.layer.backward(g, ctx.shape), measured, None, None, None


def _in_graph(x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()
