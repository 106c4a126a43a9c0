"""What every op means, in plain PyTorch: computed in float64, rounded once at the end.

Kernels are held against these functions; nothing here is written for speed. Every function takes the arguments of the
op of the same name in `fastscore.ops` and returns the same shapes and dtypes. For an oracle in full precision, pass
float64 tensors.
"""

import math

import torch
from torch import Tensor

# Philox4x32-10: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC11.
PHILOX_ROUNDS = 10
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW32 = 0xFFFFFFFF


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of a sum over inputs of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _rows(x: Tensor, channel_dim: int) -> Tensor:
    """[N, ..., C, ...] -> [N, C, P] in float64."""
    x = x.double().movedim(channel_dim, 1)
    return x.reshape(*x.shape[:2], math.prod(x.shape[2:]))


def channel_sums(a: Tensor, g: Tensor, channel_dim: int = 1, mean: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """(Σ a·g, Σ a, Σ g) over every position of a channel, each [N, C]; mean: the mean of a in place of its sum."""
    rows_a, rows_g = _rows(a, channel_dim), _rows(g, channel_dim)
    total = rows_a.sum(2) / max(rows_a.shape[2], 1) if mean else rows_a.sum(2)
    dtype = result_dtype(a.dtype)
    return (rows_a * rows_g).sum(2).to(dtype), total.to(dtype), rows_g.sum(2).to(dtype)


def channel_dot(a: Tensor, g: Tensor, channel_dim: int = 1) -> Tensor:
    """Σ a·g over every position of a channel, [N, C]."""
    return channel_sums(a, g, channel_dim)[0]


def channel_powers(a: Tensor, g: Tensor, channel_dim: int = 1) -> tuple[Tensor, Tensor]:
    """(Σ |a·g|, Σ (a·g)²) over every position of a channel, each [N, C]."""
    product = _rows(a, channel_dim) * _rows(g, channel_dim)
    dtype = result_dtype(a.dtype)
    return product.abs().sum(2).to(dtype), product.square().sum(2).to(dtype)


def clamp_backward(y: Tensor, g: Tensor, rest: Tensor | None, low: float, high: float
                   ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(g + rest where low < y < high, else 0, in y's dtype; Σ y·g, Σ y, Σ g over every position, each [N, C])."""
    low, high = torch.tensor([low, high], dtype=y.dtype).tolist()  # as the clamp rounded them
    total = g.double() if rest is None else g.double() + rest.double()
    outside = (y <= low) | (y >= high)
    return total.masked_fill(outside, 0).to(y.dtype), *channel_sums(y, g)


def clamp_backward_(y: Tensor, g: Tensor, rest: Tensor | None, low: float, high: float, mean: bool = False
                    ) -> tuple[Tensor, Tensor, Tensor]:
    """clamp_backward with the gradient in place of g; mean as in channel_sums."""
    sums = channel_sums(y, g, 1, mean)
    g.copy_(clamp_backward(y, g, rest, low, high)[0])
    return sums


def philox(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10 on int64 tensors that hold uint32 values: four counters in, four random words out."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        # The int64 product may wrap; its 64 bits are right all the same, and the mask drops the sign's copies.
        product0, product1 = c0 * PHILOX_MULTIPLIERS[0], c2 * PHILOX_MULTIPLIERS[1]
        c0, c1, c2, c3 = (((product1 >> 32) & _LOW32) ^ c1 ^ k0, product1 & _LOW32,
                          ((product0 >> 32) & _LOW32) ^ c3 ^ k1, product0 & _LOW32)
        k0, k1 = (k0 + PHILOX_KEY_STEPS[0]) & _LOW32, (k1 + PHILOX_KEY_STEPS[1]) & _LOW32
    return c0, c1, c2, c3


def random_words(sample_ids: Tensor, classes: int, seed: int, probe: int = 0) -> Tensor:
    """The random word of every (sample, class): int64 [N, K] with values in [0, 2³²).

    Class k is lane k % 4 of the block with counter (k // 4, probe, low word of the id, high word of the id) and
    key (low word of the seed, high word of the seed).
    """
    blocks = torch.arange((classes + 3) // 4, device=sample_ids.device)
    ids = sample_ids.to(torch.int64)[:, None]
    counter = torch.broadcast_tensors(blocks[None], torch.full_like(blocks, probe)[None],
                                      ids & _LOW32, (ids >> 32) & _LOW32)
    words = torch.stack(philox(counter, (seed & _LOW32, (seed >> 32) & _LOW32)), dim=-1)
    return words.reshape(ids.shape[0], -1)[:, :classes]


def random_gradient(sample_ids: Tensor, classes: int, seed: int, probe: int = 0, distribution: str = "normal",
                    normalize: bool = True, dtype: torch.dtype | None = None) -> Tensor:
    """Output gradients from the random words, [N, K], rounded to float32 and then to `dtype`.

    `rademacher`: the word's top bit set gives -1, clear gives +1. `normal`: Box-Muller on the words of lanes (0, 1)
    and (2, 3), with u = (word >> 8 + ½) / 2²⁴: radius sqrt(-2 ln u_even), angle 2π u_odd; the even lane takes the
    cosine, the odd lane the sine.
    """
    if distribution == "rademacher":
        values = 1.0 - 2.0 * (random_words(sample_ids, classes, seed, probe) >> 31).double()
    else:
        words = random_words(sample_ids, classes + classes % 2, seed, probe)
        uniform = ((words >> 8).double() + 0.5) / 2**24
        radius = (-2.0 * uniform[:, 0::2].log()).sqrt()
        angle = 2.0 * math.pi * uniform[:, 1::2]
        values = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1).flatten(1)[:, :classes]
    return (normalize_gradient(values)[0] if normalize else values).float().to(dtype or torch.float32)


def normalize_gradient(g: Tensor, eps: float = 0.0) -> tuple[Tensor, Tensor]:
    """(g / max(‖g‖, eps) per sample, ‖g‖ [N]): L2 norm over all of a sample; a gradient of length 0 stays 0.

    A divisor below the least normal float64, whose inverse is infinite, counts as 0. NaN comes through: a sample that
    holds one is NaN throughout.
    """
    norm = g.double().reshape(g.shape[0], math.prod(g.shape[1:])).square().sum(1).sqrt()
    divisor = norm.clamp(min=eps)
    per_sample = divisor.reshape(-1, *[1] * (g.dim() - 1))
    tiny = per_sample < torch.finfo(torch.float64).tiny
    unit = torch.where(tiny, torch.zeros((), dtype=torch.float64, device=g.device), g.double() / per_sample)
    return unit.to(g.dtype), norm.to(result_dtype(g.dtype))
