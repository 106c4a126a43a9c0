"""Gates: the identity at which autograd hands over what is measured of activation and gradient.

Their `taps` are fastscore.taps.taps.Taps, which makes them, and is asked in a backward pass whether it measures.
"""

from collections.abc import Container
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastscore.modules.norms import channel_norms
from fastscore.modules.sample_axis import SampleAxis
from fastscore.taps.passes import ForwardPass


@dataclass(frozen=True)
class TapPoint:
    """Where a tap stands: the dimension that holds the channels, of the layer's input or of its output.

    window: what the layer reads of its input, where that is not all; no gradient comes back to the rest. module: the
    module at whose input the tap stands, where it is not the layer itself but one before it; or at whose output, where
    the tap has a name of its own. statistics: whether what is measured is the input of a normalisation, and its
    gradient through mean and mean square alone. experts: of how many the layer is; what is read by each is measured as
    one, too, after all channels. Where the samples lie is another matter: see fastscore.modules.sample_axis.
    """

    channel_dim: int
    output: bool = False
    window: tuple[slice, ...] = ()
    module: str = ""
    statistics: bool = False
    experts: int = 0

    def owner(self, layer: str) -> str:
        """The layer whose tap it is, where it goes by that name."""
        return self.module if self.module and self.output else layer

    def fits(self, x: Tensor) -> bool:
        """Whether all of `x`, [N, C, ...], is what is measured here."""
        return self.channel_dim % x.dim() == 1 and not self.window and not self.experts

    def expert_of(self, args: tuple[Any, ...]) -> Tensor | None:
        """Of what the last layer of experts is called on, which one reads each row, int64; None of all others."""
        return args[1] if self.experts else None


class FusedTap(NamedTuple):
    """A tap on `y`, [N, C, ...], that another backward function measures.

    tapped: the same as y, for one reader alone. gate: what receives the measure. readers: layers that may read it.
    """

    y: Tensor
    tapped: Tensor
    gate: Tensor
    readers: Container[str]


class Gate(torch.autograd.Function):
    """(x, gate) -> x; backward: (g, measure(x, g))."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, taps: Any, point: TapPoint, axis: SampleAxis,
                valid: Tensor | None, owner: ForwardPass | None, inside: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.taps, ctx.point, ctx.axis, ctx.valid, ctx.owner, ctx.inside = taps, point, axis, valid, owner, inside
        # a Conv or Linear never writes to its input; whoever takes a BatchNorm's output may (`out += identity`)
        return x.clone() if point.output else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        point, measured = ctx.point, None
        if ctx.taps.measuring:
            x, h = (x[point.window], g[point.window]) if point.window else (x, g)
            measured = ctx.taps.rows.measured(x, h, point.channel_dim, ctx.axis, ctx.valid, ctx.inside)
        return ctx.taps.handed_on(g, ctx.owner), measured, None, None, None, None, None, None


class ExpertGate(torch.autograd.Function):
    """(input x [rows, C] of the last layer of E experts, int64 [rows], gate) -> x; backward: (g, nothing, measure of C
    channels, then of what each expert reads as one). That layer is linear, and has no bias: what an expert's output and
    its gradient make is what its input and the gradient there do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, expert: Tensor, gate: Tensor, taps: Any, point: TapPoint, axis: SampleAxis,
                valid: Tensor | None, owner: ForwardPass | None) -> Tensor:
        ctx.save_for_backward(x, expert)
        ctx.taps, ctx.point, ctx.axis, ctx.valid, ctx.owner = taps, point, axis, valid, owner
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, expert = ctx.saved_tensors
        measured = None
        if ctx.taps.measuring:
            dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
            chosen = nn.functional.one_hot(expert, ctx.point.experts + 1)[:, :-1].to(dtype)  # the last is none
            worth = chosen * (x.to(dtype) * g.to(dtype)).sum(-1, keepdim=True)
            measured = torch.cat([ctx.taps.rows.measured(a, b, -1, ctx.axis, ctx.valid)
                                  for a, b in ((x, g), (chosen, worth))], 2)
        return ctx.taps.handed_on(g, ctx.owner), None, measured, None, None, None, None, None


class NormGate(torch.autograd.Function):
    """(output y of a normalisation, its input x, what multiplies what it makes, gate) -> y; backward: (g, nothing,
    nothing, measure(x, its gradient through mean and mean square alone)).

    What is made of a channel at its own place is measured by the layers that read it.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, factor: Tensor | None, gate: Tensor, norm: nn.Module,
                taps: Any, point: TapPoint, axis: SampleAxis, valid: Tensor | None,
                owner: ForwardPass | None) -> Tensor:
        ctx.save_for_backward(x, factor)
        ctx.norm, ctx.taps, ctx.point, ctx.axis, ctx.valid, ctx.owner = norm, taps, point, axis, valid, owner
        return y.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, factor = ctx.saved_tensors
        measured = None
        if ctx.taps.measuring:
            through = channel_norms.gradient_of_statistics(ctx.norm, x, g if factor is None else g * factor)
            measured = ctx.taps.rows.measured(x, through, ctx.point.channel_dim, ctx.axis, ctx.valid)
        return ctx.taps.handed_on(g, ctx.owner), None, None, measured, None, None, None, None, None, None
