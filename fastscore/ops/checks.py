"""What the ops accept: one check per argument, each error naming the argument and the way out."""

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DISTRIBUTIONS = ("normal", "rademacher")


def _floating(name: str, x: Tensor) -> None:
    if x.dtype not in FLOATING:
        raise TypeError(f"{name} has dtype {x.dtype}, which no kernel takes; convert it to float32, bfloat16, float16 "
                        "or float64")


def check_pair(a: Tensor, g: Tensor, channel_dim: int) -> None:
    """Raises unless `a` and `g` are an activation and its gradient with channels at `channel_dim`."""
    if a.shape != g.shape:
        raise ValueError(f"a {list(a.shape)} and g {list(g.shape)} differ in shape; g is the gradient of a, element by "
                         "element (use expand to broadcast without a copy)")
    if a.dtype != g.dtype:
        raise TypeError(f"a is {a.dtype} and g is {g.dtype}; convert one of them, as in g.to(a.dtype)")
    if a.device != g.device:
        raise ValueError(f"a is on {a.device} and g is on {g.device}; move one of them, as in g.to(a.device)")
    _floating("a", a)
    dims = a.dim()
    if dims < 2:
        raise ValueError(f"a has {dims} dimension(s), but needs samples and channels; unsqueeze the missing one")
    if not -dims < channel_dim < dims or channel_dim == 0:
        raise ValueError(f"channel_dim is {channel_dim}, but has to be 1 to {dims - 1} or {1 - dims} to -1 for "
                         f"{dims} dimensions (dimension 0 counts the samples)")


def check_clamp(y: Tensor, g: Tensor, rest: Tensor | None) -> None:
    """Raises unless `y` is what a clamp made and `g` and `rest` are gradients of it."""
    for name, x in (("g", g), ("rest", rest)):
        if x is None:
            continue
        if x.shape != y.shape:
            raise ValueError(f"y {list(y.shape)} and {name} {list(x.shape)} differ in shape; {name} is a gradient of "
                             "y, element by element")
        if x.dtype != y.dtype:
            raise TypeError(f"y is {y.dtype} and {name} is {x.dtype}; convert one of them, as in {name}.to(y.dtype)")
        if x.device != y.device:
            raise ValueError(f"y is on {y.device} and {name} is on {x.device}; move one of them")
    if y.device.type not in ("cpu", "meta"):
        raise ValueError(f"y is on {y.device}, where the op has no kernel; use channel_sums and PyTorch's "
                         "masked_fill")
    _floating("y", y)
    if y.dim() < 2:
        raise ValueError(f"y has {y.dim()} dimension(s), but needs samples and channels; unsqueeze the missing one")


def check_random(sample_ids: Tensor, classes: int, seed: int, probe: int, distribution: str) -> None:
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


def check_gradient(g: Tensor, eps: float) -> None:
    """Raises unless `g` is a gradient with samples along dimension 0 and `eps` a floor for its length."""
    _floating("g", g)
    if g.dim() < 1:
        raise ValueError("g has no dimension, but needs samples along dimension 0; use g[None]")
    if not eps >= 0:
        raise ValueError(f"eps is {eps}, but has to be 0 or more: it is the least length that is divided by")
