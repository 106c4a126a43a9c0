"""Every op as a few of PyTorch's own operations: for devices that have none of the kernels.

Nothing here needs float64 on the device, nor more of it than elementwise operations and sums. Random gradients are
drawn by the CPU's kernel, so that they are the same bits everywhere, which waits for the sample ids.
"""

import math

import torch
from torch import Tensor

from fastscore.ops.checks import rounded
from fastscore.ops.reference import result_dtype

_EXPONENT = 0x7F800000  # of a float32
_LEAST = torch.finfo(torch.float32).smallest_normal


def _positions(x: Tensor, channel_dim: int) -> list[int]:
    return [d for d in range(1, x.dim()) if d != channel_dim % x.dim()]


def _sum(x: Tensor, channel_dim: int) -> Tensor:
    """Over positions, [N, C]; the sum over no dimension would be one over all."""
    dims = _positions(x, channel_dim)
    return x.sum(dims, dtype=result_dtype(x.dtype)) if dims else x.to(result_dtype(x.dtype))


def _products(a: Tensor, g: Tensor) -> Tensor:
    dtype = result_dtype(a.dtype)
    return a.to(dtype) * g.to(dtype)


def channel_sums(a: Tensor, g: Tensor, channel_dim: int = 1, mean: bool = False) -> Tensor:
    """[3, N, C]: Σ a·g, Σ a or the mean of a, Σ g."""
    total = _sum(a, channel_dim)
    if mean:
        total = total / max(math.prod(a.shape[d] for d in _positions(a, channel_dim)), 1)
    return torch.stack([_sum(_products(a, g), channel_dim), total, _sum(g, channel_dim)])


def channel_dot(a: Tensor, g: Tensor, channel_dim: int = 1) -> Tensor:
    """Σ a·g, [N, C]."""
    return _sum(_products(a, g), channel_dim)


def channel_powers(a: Tensor, g: Tensor, channel_dim: int = 1) -> Tensor:
    """[2, N, C]: Σ |a·g|, Σ (a·g)²."""
    product = _products(a, g)
    return torch.stack([_sum(product.abs(), channel_dim), _sum(product.square(), channel_dim)])


def clamp_backward_(y: Tensor, g: Tensor, rest: Tensor | None, low: float, high: float, mean: bool = False) -> Tensor:
    """[3, N, C] as channel_sums of y and g; the gradient of the clamp's input is in g then."""
    low, high = rounded((low, high), y.dtype)
    sums = channel_sums(y, g, 1, mean)
    if rest is not None:
        g.add_(rest)
    g.masked_fill_((y <= low) | (y >= high), 0)
    return sums


def random_gradient(sample_ids: Tensor, classes: int, seed: int, probe: int = 0, distribution: str = "normal",
                    normalize: bool = True, dtype: torch.dtype | None = None) -> Tensor:
    """[N, K], from the CPU's kernel."""
    drawn: Tensor = torch.ops.fastscore.random_gradient(sample_ids.cpu(), classes, seed, probe, distribution, normalize,
                                                        dtype)
    return drawn.to(sample_ids.device)


def normalize_gradient(g: Tensor, eps: float = 0.0) -> tuple[Tensor, Tensor]:
    """(g / max(‖g‖, eps) per sample, ‖g‖ [N])

    Each sample is first divided by a power of two near its largest element, so that no square overflows or vanishes.
    """
    dtype = result_dtype(g.dtype)
    rows = g.reshape(len(g), g[:1].numel()).to(dtype)
    if dtype == torch.float64 or not rows.numel():
        scale = torch.ones_like(rows[:, :1]) if rows.numel() else rows.new_ones(len(g), 1)
    else:
        largest = rows.abs().amax(1, keepdim=True)
        power = (largest.view(torch.int32) & _EXPONENT).view(torch.float32).clamp(min=_LEAST)
        scale = torch.where(largest.isfinite(), power, 1)
    scaled = rows / scale
    length = scaled.square().sum(1, keepdim=True).sqrt()
    divisor = torch.maximum(length, eps / scale)
    unit = torch.where(divisor < torch.finfo(dtype).tiny, 0, scaled / divisor)
    return torch.empty_like(g).copy_(unit.view(g.shape)), (length * scale).flatten()
