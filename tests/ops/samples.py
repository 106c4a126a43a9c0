"""Inputs for the ops in every memory layout, with NaN in every byte that no op may read, and the errors allowed."""

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Each kernel adds at most this many terms one after the other (the worst: 4096 positions over the baseline tier's 16
# sums, 512 positions in stretches of 2), each addition and each product off by one unit of rounding:
# |error| <= CHAIN · unit · Σ |terms|.
CHAIN = 260
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-24, torch.float16: 2.0**-24, torch.float64: 2.0**-53}

# shape, channel_dim
SHAPES = [
    ((3, 5), 1), ((4, 37), 1), ((70, 3), -1),
    ((2, 3, 7), 1), ((2, 16, 49), 1), ((2, 9, 40), 2),
    ((3, 8, 7, 7), 1), ((2, 65, 5, 3), 1), ((2, 5, 3, 33), -1), ((2, 6, 19, 4), 2), ((1, 1, 9, 11), 1),
    ((2, 33, 1, 1), 1), ((5, 1, 1, 1), 1), ((2, 4, 3, 5, 2), 1), ((2, 3, 4, 2, 17), 4),
    ((1, 2, 71, 73), 1),     # rows in two chunks
    ((1, 20, 24, 23), 1),    # columns in two chunks
    ((2, 1030, 3, 1), 1),    # columns in two tiles
    ((2, 63, 9, 5), 1),      # few channels, more lanes than a vector has
    ((0, 3, 4, 4), 1), ((2, 0, 4, 4), 1), ((2, 3, 0, 4), 1), ((0, 0), 1),
]


def poisoned(values: Tensor, order: list[int], gap: int = 0, step: int = 1, offset: int = 5) -> Tensor:
    """`values` again, dimension order[0] outermost in memory, `gap` NaN around each dimension, `step` apart."""
    sizes = [values.shape[d] * step + 2 * gap for d in order]
    storage = torch.full((offset + torch.Size(sizes).numel() + 64,), torch.nan, dtype=values.dtype)
    view = storage[offset:offset + torch.Size(sizes).numel()].view(sizes)
    for position, d in enumerate(order):
        view = view.narrow(position, gap, values.shape[d] * step)
    view = view[tuple(slice(None, None, step) for _ in order)].permute([order.index(d) for d in range(values.dim())])
    view.copy_(values)
    return view


def _channels_last(x: Tensor, channel_dim: int) -> list[int]:
    channel = channel_dim % x.dim()
    return [*(d for d in range(x.dim()) if d != channel), channel]


Layout = Callable[[Tensor, int], Tensor]

LAYOUTS: dict[str, Layout] = {
    "contiguous": lambda x, c: poisoned(x, list(range(x.dim()))),
    "aligned": lambda x, c: poisoned(x, list(range(x.dim())), offset=16),
    "channels_last": lambda x, c: poisoned(x, _channels_last(x, c)),
    "cropped": lambda x, c: poisoned(x, list(range(x.dim())), gap=1),
    "cropped_channels_last": lambda x, c: poisoned(x, _channels_last(x, c), gap=2),
    "every_other": lambda x, c: poisoned(x, list(range(x.dim())), step=2),
    "every_third_channels_last": lambda x, c: poisoned(x, _channels_last(x, c), step=3),
    "reversed": lambda x, c: poisoned(x, list(range(x.dim()))[::-1]),
}


def expansions(shape: tuple[int, ...], channel_dim: int) -> Iterator[list[int]]:
    """The dimensions that a stride-0 operand repeats: positions, everything, channels, samples."""
    channel = channel_dim % len(shape)
    yield [d for d in range(1, len(shape)) if d != channel]
    yield list(range(len(shape)))
    yield [channel]
    yield [0]


def expanded(x: Tensor, dims: list[int]) -> Tensor:
    """`x` with its first value along `dims` repeated there by stride 0."""
    for d in dims:
        x = x.narrow(d, 0, min(1, x.shape[d]))
    return x


def integers(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Whole numbers so small that every sum of their products is exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, shape, generator=generator).to(dtype)


def normals(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def layout_pairs() -> list[tuple[str, str]]:
    return list(itertools.product(LAYOUTS, LAYOUTS))
