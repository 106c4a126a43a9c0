"""What is measured of activation and gradient at a tap."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastscore import ops
from fastscore.ops import library


def unclamped(g: Tensor, y: Tensor, bounds: tuple[float, float]) -> Tensor:
    """The gradient of the input of the clamp that made `y`, from `g`, that of its output; in the strides of `y`.

    At a bound it is 0, at an infinite one too; where y is NaN, it is that of the output.
    """
    if y.device.type == "cpu" and y.dim() == 4 and g.stride() != y.stride() and g.stride(1) != 1 \
            and y.is_contiguous(memory_format=torch.channels_last):  # PyTorch's own takes 3 ns an element in bfloat16
        return ops.clamp_backward_sums(y, g, None, *bounds)[0]
    result: Tensor = torch.ops.aten.hardtanh_backward.grad_input(g, y, *bounds, grad_input=torch.empty_like(y))
    return result


@dataclass(frozen=True)
class Measure:
    """What is measured at a tap: `compute(activation, gradient, channel_dim)` -> [P, N, C], for P `parts`.

    fused: (y, gradient, rest, low, high) -> the gradient of the input of the clamp that made y, from gradient + rest,
    and `compute` of y and gradient with channels in dimension 1; one pass over memory where there is such an op.
    It may write to the gradient.
    """

    parts: int
    compute: Callable[[Tensor, Tensor, int], Tensor]
    mean: int | None = None  # the part that is a mean over positions, if any
    fused: Callable[[Tensor, Tensor, Tensor | None, float, float], tuple[Tensor, Tensor]] | None = None

    def clamped(self, y: Tensor, g: Tensor, rest: Tensor | None, bounds: tuple[float, float]) -> tuple[Tensor, Tensor]:
        """(gradient of the input of the clamp that made y, `compute` of y and g); `g` may be written to."""
        if self.fused is not None:
            return self.fused(y, g, rest, *bounds)
        measured = self.compute(y, g, 1)
        return unclamped(g if rest is None else g + rest, y, bounds), measured


def _clamped_sums(y: Tensor, g: Tensor, rest: Tensor | None, low: float, high: float) -> tuple[Tensor, Tensor]:
    return ops.clamp_backward_sums(y, g, rest, low, high, overwrite=True, mean=True)


def _powers(a: Tensor, g: Tensor, channel_dim: int) -> Tensor:
    result: Tensor = library.run(_channel_powers, a, g, channel_dim)
    return result


def _moments(a: Tensor, g: Tensor, channel_dim: int) -> Tensor:
    result: Tensor = library.run(_channel_sums, a, g, channel_dim, True)
    return result


_channel_powers = torch.ops.fastscore.channel_powers.default
_channel_sums = torch.ops.fastscore.channel_sums.default
SUMS = Measure(3, _moments, mean=1, fused=_clamped_sums)  # Σ a·g, the mean of a, Σ g
POWERS = Measure(2, _powers)  # Σ |a·g|, Σ (a·g)²
DEGREES = {SUMS: (1, 0, 1), POWERS: (1, 2)}  # the power of the output gradient's length in each part
MEAN = 1  # the part of SUMS that holds activations
