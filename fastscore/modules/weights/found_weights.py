"""Weights, found again in what a model's code hands to functions, however it turns or scales them."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastscore.modules.weights import products


@dataclass(frozen=True)
class Seen:
    """A tensor that is, or is computed from, a weight.

    base: the tensor that was added. dims: which dimensions of the parameter those of the tensor are. copy: the
    dimension of the copies, and which of them it is. scales: what was done to it.
    """

    base: Tensor
    dims: tuple[int, ...]
    copy: tuple[int, int] | None = None
    scales: tuple[Callable[[Tensor], Tensor], ...] = ()


class Weights:
    """Tensors of some weights, found again by their memory, however code turns them."""

    def __init__(self) -> None:
        self._known: dict[int, list[tuple[Tensor, Seen]]] = {}

    def add(self, tensor: Tensor, dims: tuple[int, ...]) -> None:
        """A weight. dims: which dimensions of the parameter its own are."""
        if not any(known is tensor for known, _ in self._known.get(tensor.untyped_storage()._cdata, ())):
            self._add(tensor, Seen(tensor, dims))

    def find(self, tensor: Any) -> Seen | None:
        """What a tensor is; None of any that is no weight."""
        if not isinstance(tensor, Tensor):
            return None
        with torch._C.DisableTorchFunction():
            if tensor.layout is not torch.strided or tensor.is_nested or \
                    torch._C._functorch.maybe_get_level(tensor) != -1:
                return None
            for known, seen in self._known.get(tensor.untyped_storage()._cdata, ()):
                if tensor is known:
                    return seen
                if (found := _part(tensor, known, seen)) is not None:
                    return found
        return None

    def is_weight(self, tensor: Any) -> bool:
        """Whether it is one."""
        return self.find(tensor) is not None

    def product(self, func: Any, args: tuple[Any, ...], kwargs: Any) -> tuple[products.Product, Seen] | None:
        """The product with a weight that a call is, where it has (copies,) outputs and inputs."""
        found = products.product(func, args, kwargs, self.is_weight)
        seen = None if found is None else self.find(found.weight)
        if found is None or seen is None:
            return None
        order = tuple(seen.dims[dim] for dim in found.order)
        return found, Seen(seen.base, order if seen.copy is None else (seen.copy[0], *order), seen.copy, seen.scales)

    def scales(self, func: Any, args: tuple[Any, ...], kwargs: Any) -> bool:
        """Whether a call multiplies a weight by one number."""
        return products.scaled(func, args, kwargs, self.is_weight) is not None

    def note_scaled(self, func: Any, args: tuple[Any, ...], kwargs: Any, output: Any) -> None:
        """Know from then on what comes of such a call."""
        found = products.scaled(func, args, kwargs, self.is_weight)
        seen = None if found is None else self.find(found[0])
        if found is not None and seen is not None:
            self._add(output, Seen(seen.base, seen.dims, seen.copy, (*seen.scales, found[1])))

    def _add(self, tensor: Tensor, seen: Seen) -> None:
        with torch._C.DisableTorchFunction():
            self._known.setdefault(tensor.untyped_storage()._cdata, []).append((tensor, seen))


def _part(tensor: Tensor, known: Tensor, seen: Seen) -> Seen | None:
    shape, strides = tuple(tensor.shape), tensor.stride()
    beyond = int(tensor.storage_offset()) - int(known.storage_offset())
    if beyond == 0 and tensor.dim() == known.dim():
        for dims in itertools.permutations(range(known.dim())):
            if all(known.shape[dim] == size and known.stride(dim) == stride
                   for dim, size, stride in zip(dims, shape, strides, strict=True)):
                return Seen(seen.base, tuple(seen.dims[dim] for dim in dims), seen.copy, seen.scales)
    if known.dim() == 3 and tensor.dim() == 2 and seen.copy is None and beyond >= 0:
        for dim, *order in itertools.permutations(range(3)):
            number, left = divmod(beyond, known.stride(dim))
            if not left and number < known.shape[dim] and all(
                    known.shape[at] == size and known.stride(at) == stride
                    for at, size, stride in zip(order, shape, strides, strict=True)):
                return Seen(seen.base, tuple(seen.dims[at] for at in order), (seen.dims[dim], number), seen.scales)
    return None
