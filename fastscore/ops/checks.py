"""What the ops accept: one check per argument, each error naming the argument and the way out."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastscore.wording import counted

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DISTRIBUTIONS = ("normal", "rademacher")


def _floating(name: str, x: Tensor) -> None:
    if x.dtype not in FLOATING:
        raise TypeError(f"{name} has dtype {x.dtype}, which no kernel takes; convert it to float32, bfloat16, float16 "
                        "or float64")


def _check_gradient(of: str, y: Tensor, name: str, g: Tensor, way_out: str = "") -> None:
    """Raises unless `g` is to `y` what a gradient is."""
    if g.shape != y.shape:
        raise ValueError(f"{of} {list(y.shape)} and {name} {list(g.shape)} differ in shape; {name} is the gradient of "
                         f"{of}, element by element{way_out}")
    if g.dtype != y.dtype:
        raise TypeError(f"{of} is {y.dtype} and {name} is {g.dtype}; convert one of them, as in {name}.to({of}.dtype)")
    if g.device != y.device:
        raise ValueError(f"{of} is on {y.device} and {name} is on {g.device}; move one of them, as in "
                         f"{name}.to({of}.device)")


def check_pair(a: Tensor, g: Tensor, channel_dim: int) -> None:
    """Raises unless `a` and `g` are an activation and its gradient with channels at `channel_dim`."""
    _check_gradient("a", a, "g", g, " (use expand to broadcast without a copy)")
    _floating("a", a)
    dims = a.dim()
    if dims < 2:
        raise ValueError(f"a has {counted(dims, 'dimension')}, but needs samples and channels; unsqueeze one")
    if not -dims < channel_dim < dims or channel_dim == 0:
        raise ValueError(f"channel_dim is {channel_dim}, but has to be 1 to {dims - 1} or {1 - dims} to -1 for "
                         f"{dims} dimensions (dimension 0 counts the samples)")


def check_clamp(y: Tensor, g: Tensor, rest: Tensor | None) -> None:
    """Raises unless `y` is what a clamp made and `g` and `rest` are gradients of it."""
    for name, x in (("g", g), ("rest", rest)):
        if x is not None:
            _check_gradient("y", y, name, x)
    _floating("y", y)
    if y.dim() < 2:
        raise ValueError(f"y has {counted(y.dim(), 'dimension')}, but needs samples and channels; unsqueeze one")


def check_same_strides(y: Tensor, *gradients: Tensor | None) -> None:
    """Raises unless all lie in memory alike."""
    for name, x in zip(("g", "rest"), gradients, strict=False):
        if x is not None and x.stride() != y.stride():
            raise RuntimeError(f"y and {name} differ in strides; copy {name}, as in "
                               f"torch.empty_like(y).copy_({name})")


@lru_cache(maxsize=256)
def rounded(bounds: tuple[float, float], dtype: torch.dtype) -> tuple[float, float]:
    """A clamp's bounds as its result of that dtype holds them."""
    low, high = torch.tensor(bounds, dtype=dtype).tolist()
    return low, high


def check_random(sample_ids: Tensor, classes: int, seed: int, probe: int, distribution: str,
                 dtype: torch.dtype | None = None) -> None:
    """Raises unless the arguments name a random gradient."""
    if sample_ids.dtype != torch.int64 or sample_ids.dim() != 1:
        raise TypeError(f"sample_ids is {sample_ids.dtype} {list(sample_ids.shape)}, but has to be int64 [N]; "
                        "use sample_ids.to(torch.int64).flatten()")
    if not 0 <= classes <= 2**34:
        raise ValueError(f"classes is {classes}, but has to be 0 to 2**34, the number of words a sample has")
    if not -2**63 <= seed < 2**63:
        raise ValueError(f"seed is {seed}, but has to fit in int64; reduce it, as in seed % 2**63")
    if not 0 <= probe < 2**32:
        raise ValueError(f"probe is {probe}, but has to be 0 to 2**32 - 1; number probes from 0")
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution is {distribution!r}, but has to be one of {DISTRIBUTIONS}")
    if dtype is not None and dtype not in FLOATING:
        raise TypeError(f"dtype is {dtype}, which no kernel writes; use float32, bfloat16, float16 or float64")


def check_gradient(g: Tensor, eps: float) -> None:
    """Raises unless `g` is a gradient with samples along dimension 0 and `eps` a floor for its length."""
    _floating("g", g)
    if g.dim() < 1:
        raise ValueError("g has no dimension, but needs samples along dimension 0; use g[None]")
    if not eps >= 0:
        raise ValueError(f"eps is {eps}, but has to be 0 or more: it is the least length that is divided by")


def check_writable(args: Sequence[Any], place: int, names: Sequence[str]) -> None:
    """Raises unless the tensor at `place` can be written to: no part of it is another element or argument."""
    x, name = args[place], names[place]
    if not x.is_contiguous() and x.numel() and any(
            size > 1 and not stride for size, stride in zip(x.shape, x.stride(), strict=True)):
        raise RuntimeError(f"{name} is neither contiguous nor channels last: some of its elements are one in memory, "
                           f"and it is written to; pass {name}.clone(memory_format=torch.contiguous_format)")
    for other, y in zip(names, args, strict=False):
        if other != name and isinstance(y, Tensor) and overlap(x, y):
            raise RuntimeError(f"{name} and {other} overlap in memory, and {name} is written to; pass {name}.clone()")


def overlap(x: Tensor, y: Tensor) -> bool:
    """Whether the stretches of memory from the first to the last element of each have a part in common."""
    if torch.compiler.is_compiling() or not x.numel() or not y.numel():
        return False
    if not torch._C._is_alias_of(x, y):  # type: ignore[attr-defined]
        return False
    (x0, x1), (y0, y1) = _stretch(x), _stretch(y)
    return x0 < y1 and y0 < x1


def _stretch(x: Tensor) -> tuple[int, int]:
    """In elements of its storage; PyTorch has no negative strides."""
    first = int(x.storage_offset())
    return first, first + 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
