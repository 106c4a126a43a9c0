"""Gates: the identity at which autograd hands over what is measured of activation and gradient."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


def unclamped(g: Tensor, y: Tensor, bounds: tuple[float, float]) -> Tensor:
    """The way of `g` back through the clamp that made `y`. PyTorch's hardtanh_backward takes an element at a time."""
    return g.masked_fill((y <= bounds[0]) | (y >= bounds[1]), 0)


@dataclass(frozen=True)
class Measure:
    """What is measured at a tap: `compute(activation, gradient, channel_dim)` -> [P, N, C], for P `parts`.

    fused: (y, gradient, rest, low, high) -> `compute` of y and gradient, with channels in dimension 1, and the way
    of gradient + rest back through the clamp that made y, in one pass over them on a CPU, where there is such an
    operation. It may write to the gradient.
    """

    parts: int
    compute: Callable[[Tensor, Tensor, int], Tensor]
    mean: int | None = None  # the part that is a mean over positions, if any
    fused: Callable[[Tensor, Tensor, Tensor | None, float, float], tuple[Tensor, Tensor]] | None = None

    def clamped(self, y: Tensor, g: Tensor, rest: Tensor | None, bounds: tuple[float, float]) -> tuple[Tensor, Tensor]:
        """(gradient of the input of the clamp that made y, `compute` of y and g); `g` may be written to."""
        if self.fused is not None and y.is_cpu:
            return self.fused(y, g, rest, *bounds)
        measured = self.compute(y, g, 1)
        return unclamped(g if rest is None else g + rest, y, bounds), measured


@dataclass(frozen=True)
class TapPoint:
    """Where a tap stands: the dimension that holds the channels, of the layer's input or of its output.

    window: what the layer reads of its input, where that is not all; no gradient comes back to the rest. module: the
    module at whose input the tap stands, where it is not the layer itself but one before it.
    """

    channel_dim: int
    output: bool = False
    window: tuple[slice, ...] = ()
    module: str = ""

    def fits(self, x: Tensor) -> bool:
        """Whether all of `x`, [N, C, ...], is what is measured here."""
        return self.channel_dim % x.dim() == 1 and not self.window


class Measuring(Protocol):
    """Who a gate asks in a backward pass: see fastscore.taps.taps.Taps."""

    @property
    def measuring(self) -> bool:
        """Whether a backward pass that runs now is to be measured."""

    def measured(self, x: Tensor, g: Tensor, channel_dim: int, valid: Tensor | None) -> Tensor:
        """[P, N, C] of activation and gradient."""


class Gate(torch.autograd.Function):
    """(x, gate) -> x; backward: (g, measure(x, g))."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, taps: "Measuring", point: TapPoint, valid: Tensor | None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.taps, ctx.point, ctx.valid = taps, point, valid
        # a Conv or Linear never writes to its input; whoever takes a BatchNorm's output may (`out += identity`)
        return x.clone() if point.output else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        (x,) = ctx.saved_tensors
        point, measured = ctx.point, None
        if ctx.taps.measuring:
            x, h = (x[point.window], g[point.window]) if point.window else (x, g)
            measured = ctx.taps.measured(x, h, point.channel_dim, ctx.valid)
        return g, measured, None, None, None
