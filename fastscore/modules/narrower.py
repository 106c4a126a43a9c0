"""Tensors less some of their positions."""

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T", bound=Tensor)


def staying(size: int, gone: Tensor | Sequence[int]) -> Tensor:
    """The positions of `size` that are not among `gone`, int64, ascending, on the CPU."""
    index = torch.as_tensor(gone, dtype=torch.int64, device="cpu")
    return torch.ones(size, dtype=torch.bool, device="cpu").index_fill(0, index, False).nonzero()[:, 0]


def without(x: T, dim: int, gone: Tensor | Sequence[int]) -> T:
    """x less the positions `gone` of `dim`: a copy without a history; of a parameter, a parameter."""
    new = x.detach().index_select(dim, staying(x.shape[dim], gone).to(x.device))
    return in_place_of(x, new)  # type: ignore[return-value]


def in_place_of(x: Tensor, new: Tensor) -> Tensor:
    """`new` as what x is: a parameter, which learns or not, or a tensor, which a module that has x as a buffer has as
    one then."""
    return nn.Parameter(new, x.requires_grad) if isinstance(x, nn.Parameter) else new
