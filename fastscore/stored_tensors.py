"""Tensors that safetensors does not hold, sparse ones and complex ones of double precision, as such that it does."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_INDICES, _VALUES = " (indices)", " (values)"


def plain(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(strided tensors that hold what `tensors` do, how those are made of them that are not there as they are, which
    JSON can hold); a sparse one comes back as a coordinate list."""
    found: dict[str, Tensor] = {}
    how: dict[str, Any] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        if tensor.layout is torch.strided:
            parts = {"": tensor}
        else:
            listed = tensor.to_sparse_coo().coalesce()
            parts = {_INDICES: listed.indices(), _VALUES: listed.values()}
            how[name] = list(tensor.shape)
        for part, held in parts.items():
            if held.dtype is torch.complex128:
                held = torch.view_as_real(held.resolve_conj())
                how[name + part] = "complex"
            found[name + part] = held
    return found, how


def whole(tensors: Mapping[str, Tensor], how: Mapping[str, Any]) -> dict[str, Tensor]:
    """What `plain` was given."""
    found = {name: torch.view_as_complex(tensor) if how.get(name) == "complex" else tensor
             for name, tensor in tensors.items()}
    for name, shape in how.items():
        if shape != "complex":
            found[name] = torch.sparse_coo_tensor(found.pop(name + _INDICES), found.pop(name + _VALUES), shape,
                                                  is_coalesced=True, check_invariants=True)
    return found
