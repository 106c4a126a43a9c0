"""How a batch reaches a model: tensors, (input, ...) tuples, or dicts of keyword arguments."""

import itertools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Batch: TypeAlias = Any
Forward: TypeAlias = Callable[[nn.Module, Batch], Any]


def forward(model: nn.Module, batch: Batch) -> Any:
    """Call `model` on a batch: a tensor as it is, the first element of a tuple or list, a dict as keyword arguments."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(batch[0])
    return model(batch)


def checked(run: Forward) -> Callable[[nn.Module, Batch], Tensor]:
    """`run`, with its output checked to be one floating-point tensor [N, ...], which a gradient can start from."""

    def run_and_check(model: nn.Module, batch: Batch) -> Tensor:
        output = run(model, batch)
        if not isinstance(output, Tensor) or not output.is_floating_point() or output.dim() == 0:
            shown = f"a {output.dtype} tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) \
                else type(output).__name__
            raise TypeError(f"{type(model).__name__} returns {shown}; scores need one floating-point tensor [N, ...]: "
                            "pass forward=lambda model, batch: <the tensor>")
        return output

    return run_and_check


def map_tensors(function: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    """`batch` with `function` applied to each of its tensors, through tuples, lists and dicts."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {key: map_tensors(function, value) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        values = [map_tensors(function, value) for value in batch]
        return values if isinstance(batch, list) else tuple(values)
    return batch


def first_tensor(batch: Batch) -> Tensor | None:
    """The first tensor of a batch, depth first; None where there is none."""
    if isinstance(batch, Tensor):
        return batch
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else ()
    return next((tensor for tensor in map(first_tensor, values) if tensor is not None), None)


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter or buffer; the CPU for a model without any."""
    tensor = next(itertools.chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device


def fork_rng(device: torch.device) -> AbstractContextManager[None]:
    """Random-number states of the CPU and of `device` come back on leaving as they were on entering."""
    if device.type == "cpu":
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device], device_type=device.type)
