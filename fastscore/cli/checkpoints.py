"""Checkpoints as people have them: whatever stands around the weights is taken off and said. No code of theirs runs."""

import argparse
import hashlib
import pathlib
import pickle
import shlex
import zipfile
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from fastscore.wording import counted

# Under which name training loops keep the weights; of several in one file the first is taken.
ENVELOPES = ("state_dict", "model_state_dict", "model", "net", "network", "model_ema", "ema_state_dict",
             "state_dict_ema", "ema", "weights", "module")
# What wrappers write into the middle of names: torch.compile, activation checkpointing, FSDP.
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module.")
_COUNTER = "num_batches_tracked"  # of a BatchNorm, which only momentum=None reads
# Types that stand beside the weights, hold data and run nothing.
_HARMLESS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [argparse.Namespace, pathlib.PosixPath]


class ResizedError(ValueError):
    """A checkpoint that fits, but for a layer of another number of outputs: `outputs`, in the checkpoint."""

    def __init__(self, what: str, outputs: int) -> None:
        super().__init__(what, outputs)
        self.what, self.outputs = what, outputs

    def __str__(self) -> str:
        return self.what


def load_checkpoint(model: nn.Module, path: str | PathLike[str]) -> str:
    """Read `path` into `model`; what was done for it in one line, "" where the file was a state dict of this model.

    Prefixes in front of every name (DataParallel, torch.compile, Lightning) are taken off, what is no part of the model
    (an averaging counter, a loss's weights) is left, and missing counters of BatchNorms stay as they are. path:
    safetensors, or what torch.load(weights_only=True) reads. Raises ValueError, naming the first layers, where the two
    do not fit, and for a file that holds more than tensors; the model is unchanged then.
    """
    own = model.state_dict()
    found, notes = _unwrapped(path)
    state, prefix, others = _unprefixed(found, own)
    if prefix:
        notes.append(f"{prefix!r} taken off its names")
    if others:
        notes.append(f"it holds the model more than once, and {_some(others)} was left")
    fitting = {key: tensor for key, tensor in state.items() if key in own}
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    resized = [f"{key} {tuple(fitting[key].shape)} for {tuple(own[key].shape)}" for key in fitting
               if fitting[key].shape != own[key].shape]
    left = [key for key in found if not any(key.startswith(each) for each in (prefix, *others))]
    counters = [key for key in missing if key.endswith(_COUNTER)]
    unneeded = [key for key in unexpected if key.endswith(_COUNTER)]
    problems = [f"{what} {_some(keys)}" for what, keys in
                (("it lacks", [key for key in missing if key not in counters]),
                 ("the model lacks", [key for key in unexpected if key not in unneeded]), ("other shapes:", resized))
                if keys]
    if problems:
        what = f"checkpoint: {path} does not fit {type(model).__name__}: {'; '.join(problems)}"
        widths = {len(tensor) for key, tensor in fitting.items() if tensor.shape != own[key].shape and tensor.dim()}
        raise ResizedError(what, widths.pop()) if len(problems) == len(widths) == 1 else ValueError(what)
    if left or unneeded:
        notes.append(f"left: {_some([*left, *unneeded])}")
    if counters:
        notes.append(f"without {_some(counters)}, which evaluation does not read")
    model.load_state_dict(fitting, strict=False)
    return f"checkpoint: {path}: {counted(len(fitting), 'tensor')} taken; {'; '.join(notes)}" if notes else ""


def sha256(*paths: str | PathLike[str]) -> str:
    """Of all these files, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while part := file.read(2**20):
                digest.update(part)
    return digest.hexdigest()


def _unwrapped(path: str | PathLike[str]) -> tuple[dict[str, Tensor], list[str]]:
    """(The state dict in a file, what was said about the rest of it.)"""
    if not Path(path).is_file():
        raise FileNotFoundError(f"checkpoint: {path} is a folder; name a file in it" if Path(path).is_dir() else
                                f"checkpoint: there is no file {path}")
    if Path(path).suffix == ".safetensors":
        try:
            with safetensors.safe_open(str(path), "pt") as file:
                kind = (file.metadata() or {}).get("format", "")
            if kind.startswith("fastscore-"):
                raise ValueError(f"checkpoint: {path} is {kind}, not a state dict; what prune wrote comes from a "
                                 f"function that returns fastscore.load_pruned(<the dense model>, {str(path)!r})")
            return safetensors.torch.load_file(path), []
        except safetensors.SafetensorError as error:
            raise ValueError(f"checkpoint: {path} is not a readable safetensors file: it is of another "
                             "kind, or damaged; copy it again") from error
    content, notes, names = _load(path), [], []
    while isinstance(content, Mapping) and not _is_state(content):
        inner = next((name for name in ENVELOPES if isinstance(content.get(name), Mapping) and content[name]), None)
        if inner is None:
            raise ValueError(f"checkpoint: {path} holds no state dict (name -> tensor), neither alone nor under "
                             f"{', '.join(ENVELOPES)}; it has {_some([str(key) for key in content])}: save "
                             "model.state_dict() with torch.save")
        names.append(inner)
        beside = [str(key) for key in content if key != inner]
        if beside:
            notes.append(f"left: {_some(beside)}")
        content = content[inner]
    if not isinstance(content, Mapping):
        raise ValueError(f"checkpoint: {path} holds no state dict (name -> tensor) but {type(content).__name__}: save "
                         "model.state_dict() with torch.save")
    if names:
        notes.insert(0, f"under {' / '.join(map(repr, names))}")
    state = content
    for wrapper in _WRAPPERS:
        if any(wrapper in key for key in state):
            notes.append(f"{wrapper!r} taken out of its names")
            state = {key.replace(wrapper, ""): tensor for key, tensor in state.items()}
    return dict(state), notes


def _load(path: str | PathLike[str]) -> Any:
    with open(path, "rb") as file:
        start = file.read(2)
    if start != b"PK" and start[:1] != pickle.PROTO:  # neither of the two that torch.save writes
        raise ValueError(f"checkpoint: {path} is no file of weights: torch.save did not write it, and a safetensors "
                         "file is told by its suffix; name what holds model.state_dict()")
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:  # the last: cut short
        if start == b"PK" and not zipfile.is_zipfile(path):  # what torch.save writes, without its end
            raise ValueError(f"checkpoint: {path} is cut short, or damaged; copy it again") from error
        raise ValueError(
            f"checkpoint: {path} holds more than tensors{_foreign(path)}, or is damaged; reading it could run code. "
            f"If you trust it, run once torch.save(torch.load({str(path)!r}, weights_only=False).state_dict(), "
            "'weights.pt'), with torch.jit.load for a script, and give that file") from error


def _foreign(path: str | PathLike[str]) -> str:
    """The classes in a file that are no tensors, in brackets; nothing of it is run."""
    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # an older or a damaged file, which does not say
        return ""
    return f" ({_some(named)})" if named else ""


def _is_state(content: Mapping[Any, Any]) -> bool:
    return bool(content) and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items())


def _unprefixed(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str, list[str]]:
    """(`state` without what stands before the model's own names and without the rest, that prefix, others that fit).

    The prefix is the one under which most of the model's names are found; "" unless another has more.
    """
    needed = [key for key in own if not key.endswith(_COUNTER)]
    if not needed:
        return state, "", []
    candidates = dict.fromkeys(["", *(key.removesuffix(needed[0]) for key in state if key.endswith(f".{needed[0]}"))])
    counts = {prefix: sum(f"{prefix}{key}" in state for key in needed) for prefix in candidates}
    prefix = max(counts, key=lambda each: counts[each])
    if not prefix:
        return state, "", []
    others = [other for other, count in counts.items() if other not in ("", prefix) and count == counts[prefix]]
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}, prefix, others


def noted_weights(notes: Mapping[str, str]) -> tuple[str, str] | None:
    """(the weights that the notes of scores name, the option that gives them to a command again); None: they name none.

    The option names the file only where it still is the one that was scored.
    """
    if "checkpoint" in notes:
        file, _, digest = notes["checkpoint"].removesuffix(")").partition(" (sha256 ")
        there = Path(file).is_file()
        if there and sha256(file) == digest:
            return notes["checkpoint"], shlex.join(["--checkpoint", file])
        return notes["checkpoint"], ("--checkpoint FILE, the file with those weights "
                                     f"({file} is {'another' if there else 'not there'} now)")
    if "weights" in notes:
        return f"the weights {notes['weights']}", shlex.join(["--weights", notes["weights"]])
    return None


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
