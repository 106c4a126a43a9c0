"""The tensors of a batch: through tuples, lists, mappings and dataclasses, and which of them tell samples apart."""

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

Batch: TypeAlias = Any
MASK = "attention_mask"  # by this name a model is told which tokens are padding
INDEX = "batch"  # and by this one, which graph of a batch each node belongs to


def map_tensors(function: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    """`batch` with `function` applied to each of its tensors, through tuples, lists, mappings and dataclasses, all of
    which stay what they are."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        values = {key: map_tensors(function, value) for key, value in batch.items()}
        if type(batch) is dict or not isinstance(batch, MutableMapping):
            return values
        made = copy.copy(batch)
        for key, value in values.items():
            made[key] = value
        return made
    if isinstance(batch, (tuple, list)):
        parts = [map_tensors(function, value) for value in batch]
        return batch._make(parts) if hasattr(batch, "_make") else parts if isinstance(batch, list) else tuple(parts)
    if fields_of(batch):
        made = copy.copy(batch)
        for name, value in fields_of(batch).items():
            object.__setattr__(made, name, map_tensors(function, value))  # of a frozen one, too
        return made
    return batch


def tensors_of(batch: Batch) -> Iterator[Tensor]:
    """The tensors of a batch, depth first."""
    found: list[Tensor] = []
    _collect(batch, found)
    return iter(found)


def version_of(tensor: Tensor) -> int:
    """How often a tensor has been written to; 0 of one that torch.inference_mode made, as it does not count."""
    return 0 if tensor.is_inference() else tensor._version


def memory_of(tensor: Tensor) -> int:
    """What strided tensors share that are views of each other; 0 of others, and within torch.func."""
    if tensor.layout is not torch.strided or tensor.is_nested or torch._C._functorch.maybe_get_level(tensor) != -1:
        return 0
    try:
        memory: int = tensor.untyped_storage()._cdata
    except NotImplementedError:  # a subclass that holds others
        return 0
    return memory


def _collect(batch: Batch, found: list[Tensor]) -> None:
    """Add the tensors of a batch, depth first: every operation of a model that is watched asks for its operands'."""
    if isinstance(batch, Tensor):
        found.append(batch)
    elif isinstance(batch, (tuple, list)):
        for value in batch:
            _collect(value, found)
    elif type(batch) not in _NO_CONTAINERS:
        for value in batch.values() if isinstance(batch, Mapping) else fields_of(batch).values():
            _collect(value, found)


_NO_CONTAINERS = (bool, int, float, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


def fields_of(value: Any) -> dict[str, Any]:
    """The fields of a dataclass that can be read; none of anything else. A configuration whose layers differ may raise
    whatever error it likes where it is asked for the one value of all."""
    found = {}
    if is_dataclass(value) and not isinstance(value, (type, Mapping)):
        for field in fields(value):
            with suppress(Exception):
                found[field.name] = getattr(value, field.name)
    return found


def mappings(batch: Batch) -> Iterator[Mapping[str, Any]]:
    """The dicts in a batch, or among a call's (args, kwargs)."""
    if isinstance(batch, Mapping):
        yield batch
    elif isinstance(batch, (tuple, list)):
        for value in batch:
            yield from mappings(value)


def valid_tokens(batch: Batch) -> Tensor | None:
    """bool [N, T]: the tokens that are no padding, as an attention_mask [N, T] among a batch's keywords, or a call's,
    has it; None where there is none, or no padding."""
    masks = (value for keywords in mappings(batch) for key, value in keywords.items()
             if key == MASK and isinstance(value, Tensor) and value.dim() == 2)
    return None if (mask := next(masks, None)) is None or bool((mask != 0).all()) else mask != 0


def first_tensor(batch: Batch) -> Tensor | None:
    """The first tensor of a batch, depth first; None where there is none."""
    return next(tensors_of(batch), None)


def first_input(inputs: Any) -> Tensor:
    """The tensor that tells samples apart: the first in a batch, or among a forward call's (args, kwargs)."""
    if (tensor := first_tensor(inputs)) is None:
        raise TypeError("batches: the model is called without a tensor, so its samples cannot be told apart: give "
                        "tensors, or tuples, lists, dicts or dataclasses of them")
    return tensor


def first_samples(batch: Batch, keep: int) -> Batch:
    """The first `keep` samples of a batch: of each of its tensors that has a row for every sample."""
    count = len(first_input(batch))
    return map_tensors(lambda tensor: tensor[:keep] if tensor.dim() and len(tensor) == count else tensor, batch)


def few_samples(batch: Batch, keep: int) -> Batch:
    """`first_samples`, to trace a model with that call_model calls; the batch as it is where it cannot be cut."""
    return first_samples(batch, keep) if can_be_cut(batch[:1] if isinstance(batch, (tuple, list)) else batch) else batch


def can_be_cut(batch: Batch) -> bool:
    """Whether samples can be taken out of a batch by its rows: not where integers of another number, one that counts
    the rows, or a vector that is called `batch`, tell which belong together (edges of graphs, offsets and lengths of
    sequences, the graph of a node)."""
    tensor = first_tensor(batch)
    if tensor is None or not tensor.dim():
        return True
    parts = batch if isinstance(batch, (tuple, list)) else [batch]
    return not any(isinstance(value, Tensor) and value.dim() and value.dtype in (torch.int32, torch.int64)
                   and (len(value) not in (1, len(tensor)) or (name == INDEX and value is not tensor)
                        or _counts_rows(value, tensor))
                   for part in parts for name, value in _own_fields(part).items())


def _counts_rows(value: Tensor, tensor: Tensor) -> bool:
    """Whether a single integer is the number of rows of `tensor`, as the length of the one sequence there is."""
    return value.numel() == 1 < len(tensor) and not value.is_meta and int(value) == len(tensor)


def _own_fields(part: Any) -> Mapping[Any, Any]:
    """What a part of a batch holds, by name; lists of targets are not looked into."""
    return {"": part} if isinstance(part, Tensor) else part if isinstance(part, Mapping) else fields_of(part)
