"""Pruned models in files: the weights, and the recipe that makes room for them in a freshly built dense model."""

import copy
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastscore import files
from fastscore.arguments import check_path, in_users_code
from fastscore.default_device import keeps_own_on_cpu
from fastscore.modules.evaluation_copy import own_copies
from fastscore.modules.inspection import held_in
from fastscore.modules.wrappers import unwrapped
from fastscore.pruning.result import PruneResult
from fastscore.pruning.saved import recipes

_FORM = "fastscore-pruned-1"
_OF_TORCH = (".pt", ".pth", ".th", ".bin", ".pkl", ".ckpt", ".tar")  # by which files are known that torch.load reads


@keeps_own_on_cpu
def save_pruned(pruned: nn.Module | PruneResult, path: str | PathLike[str]) -> None:
    """Write what prune() made, fine-tuned since or not, to a safetensors file, whole or not at all.

    The file holds the model's state dict and a JSON header: the recipe (what was removed from which layer, once or
    several times, in the dense model's numbering), the dense model's structure, where a result is given where it
    comes from and what remains, and a checksum over everything.

    Args:
        pruned: the smaller model, or the result that holds it.
        path: the file, *.safetensors.

    Raises:
        ValueError: a model that prune() did not make; a suffix of files that torch.load, torch.export or ONNX reads.
        FileNotFoundError: a folder that is not there.
    """
    check_path("path", path, "; the model comes first: save_pruned(result, path)")
    suffix = Path(path).suffix.lower()
    if suffix in (*_OF_TORCH, ".pt2", ".onnx"):
        other = f"torch.save(model.state_dict(), {str(path)!r}), which keeps the weights without the recipe" \
            if suffix in _OF_TORCH else f"fastscore.save(result, example_inputs, {str(path)!r})"
        raise ValueError(f"path: {path}: what is written is safetensors, for fastscore.load_pruned, and nothing else "
                         f"reads it by that name: {Path(path).with_suffix('.safetensors').name}; or {other}")
    model, notes = (pruned.model, pruned.report.kept_notes) if isinstance(pruned, PruneResult) else (pruned, {})
    recipe, state = recipe_and_state(model)
    files.write(path, _FORM, {"recipe": recipe, "notes": notes}, state)


@keeps_own_on_cpu
def load_pruned(model: nn.Module | Callable[[], nn.Module], path: str | PathLike[str]) -> nn.Module:
    """The pruned model in a file.

    Args:
        model: the dense model, with whatever weights, which is left as it is, or a function that builds it. Of what
            stands around it (DataParallel, torch.compile: see fastscore.modules.wrappers) the one inside.
        path: what fastscore.save_pruned wrote.

    Returns:
        The smaller model, with the modes, flags and device of the one built, and the weights, buffers and dtypes of the
        one saved.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is foreign, truncated or altered, or a dense model that is not built as the one that was
            pruned.
        TypeError: no model, nor a function.
    """
    if not callable(model):  # as modules are
        raise TypeError(f"model: {type(model).__name__}; give the dense model, or a function that builds it, and then "
                        "the file")
    check_path("path", path, ": of the file that save_pruned(result, path) wrote; what prune() returned holds the "
               "smaller model already, as its .model")
    header, state = files.read(path, _FORM, "pruned model", "save it again with fastscore.save_pruned")
    with in_users_code("model: load_pruned calls it without arguments, to build the dense model"):
        dense = unwrapped(model if isinstance(model, nn.Module) else model())
    if isinstance(model, nn.Module):
        dense = copy.deepcopy(dense, own_copies(dense))
    try:
        return load_state(recipes.apply(dense, header["recipe"]), state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_notes(path: str | PathLike[str]) -> dict[str, str]:
    """What a file that save_pruned wrote says of where the model comes from.

    Raises FileNotFoundError, or ValueError for a file that is foreign, truncated or altered.
    """
    notes: dict[str, str] = files.read(path, _FORM, "pruned model", "save it again with fastscore.save_pruned")[0].get(
        "notes", {})
    return notes


def recipe_and_state(model: nn.Module) -> tuple[recipes.Recipe, dict[str, Tensor]]:
    """What a file keeps of a pruned model. Raises ValueError for a model that prune() did not make."""
    model = unwrapped(model)
    recipe = recipes.get(model)
    if recipe is None:
        raise ValueError(f"{type(model).__name__} has no recipe: save what fastscore.prune returned, a copy of it, or "
                         "the module within a wrapper; for models not pruned, torch.save(model.state_dict())")
    state = model.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name}: {type(value).__name__} in the state dict; only tensors can be saved")
    return recipe, state


def load_state(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """`model`, with the values and dtypes of `state` in its tensors. Raises ValueError where the shapes differ."""
    own = model.state_dict(keep_vars=True)
    for name in {**own, **state}:
        if name not in own or name not in state or own[name].shape != state[name].shape:
            shapes = [list(tensors[name].shape) if name in tensors else "missing" for tensors in (state, own)]
            raise ValueError(f"{name} is {shapes[0]} in the file and {shapes[1]} in the model, which was changed after "
                             "pruning; save its state dict, and load that into a model changed alike")
    filled: dict[int, str] = {}  # id -> the first name of what several modules hold
    for name, tensor in state.items():
        first = filled.setdefault(id(own[name]), name)
        if tensor.layout is not torch.strided:  # the data of a compressed one cannot be set
            held, key = _holder(model, name)
            value = tensor.to(own[name].device, copy=True).to_sparse(layout=own[name].layout)
            held[key] = nn.Parameter(value, own[name].requires_grad) if isinstance(held[key], nn.Parameter) else value
        elif first == name or torch.equal(state[first], tensor):
            own[name].data = torch.empty_like(own[name], dtype=tensor.dtype).copy_(tensor)
        else:  # tied in the model that is built, and no longer in the one that was saved
            held, key = _holder(model, name)
            held[key] = copy.deepcopy(own[name])
            held[key].data = torch.empty_like(own[name], dtype=tensor.dtype).copy_(tensor)
    return model


def _holder(model: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """Where a module keeps what the state dict of `model` has under a name, and under which."""
    module, key = held_in(model, name)
    return (module._parameters if key in module._parameters else module._buffers), key
