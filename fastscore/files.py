"""One file for tensors and what is said about them: safetensors, a JSON header, a checksum over both. No pickle."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

_TENSOR = "__tensor__"
_INDICES, _VALUES = " (indices)", " (values)"  # parts of a sparse tensor


def write(path: str | PathLike[str], form: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write `tensors` (on any device) and `header` (what JSON can hold) to `path`, whole or not at all.

    form: what kind of file it is, with its version; `read` asks for the same. The file is written beside its place
    and then moved there, so that whoever is killed meanwhile leaves the old one as it was.
    Raises FileNotFoundError where there is no folder for it.
    """
    plain, how = _plain(tensors)
    # clones, since safetensors takes no tensors that share their memory
    tensors = {name: tensor.cpu().clone(memory_format=torch.contiguous_format) for name, tensor in plain.items()}
    text, stored = json.dumps(header), json.dumps(how) if how else ""
    contents = safetensors.torch.save(tensors, {"format": form, "header": text, **({"stored": stored} if how else {}),
                                                "sha256": _checksum(text + stored, tensors)})
    with whole(path) as part, open(part, "wb") as file:
        file.write(contents)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def whole(path: str | PathLike[str]) -> Iterator[Path]:
    """Where to write what is to lie at `path`: beside it, under another name of the same suffix, and moved there in the
    end; gone, and `path` as it was, where the block raises. Raises FileNotFoundError where there is no folder for it,
    IsADirectoryError where it is one.
    """
    place = Path(path)
    if place.is_dir():
        raise IsADirectoryError(f"{path}: it is a folder; name a file in it")
    if not place.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {place.parent}; make it first")
    part = place.with_name(f"part-{place.name}")
    try:
        yield part
        os.replace(part, place)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def form_of(path: str | PathLike[str]) -> str:
    """What kind of file `write` made at `path`, with its version; empty for any other file."""
    try:
        with safetensors.safe_open(str(path), "pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            return metadata.get("format", "")
    except (OSError, safetensors.SafetensorError):
        return ""


def read(path: str | PathLike[str], form: str, what: str, otherwise: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(header, tensors on the CPU) of a file that `write` made.

    what: what such a file is called, "score file". otherwise: what to do when it cannot be used, "score again".
    Raises FileNotFoundError, IsADirectoryError, or ValueError for a file that is foreign, truncated or altered; nothing
    of it is used.
    """
    if Path(path).is_dir():
        raise IsADirectoryError(f"{path}: it is a folder; name a {what}, which is one file")
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: there is no such {what}")
    try:
        with safetensors.safe_open(str(path), "pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file, which a {what} is: it is of another kind, or "
                         f"damaged; {otherwise}") from error
    if metadata.get("format") != form:
        found = metadata.get("format", "")
        but = f" but {found}" if found.startswith("fastscore-") else ""
        if but and found.rpartition("-")[0] != form.rpartition("-")[0]:
            otherwise = f"name a {what}, or {otherwise}"
        raise ValueError(f"{path}: not a fastscore {what} of this version ({form}){but}; {otherwise}")
    text, stored = metadata.get("header", ""), metadata.get("stored", "")
    if _checksum(text + stored, tensors) != metadata.get("sha256"):
        raise ValueError(f"{path}: its contents do not match its checksum; copy it again, or {otherwise}")
    header: dict[str, Any] = json.loads(text)
    return header, _as_given(tensors, json.loads(stored)) if stored else tensors


def write_state(path: str | PathLike[str], form: str, state: Mapping[str, Any]) -> None:
    """Write what a state_dict holds: tensors, and what JSON can hold, in dicts (with text as keys) and lists."""
    tensors: dict[str, Tensor] = {}
    write(path, form, {"state": _without_tensors(state, tensors)}, tensors)


def read_state(path: str | PathLike[str], form: str, what: str, otherwise: str,
               device: torch.device | None = None) -> dict[str, Any]:
    """What `write_state` wrote; tensors that were not on the CPU go to `device`. Raises as `read` does."""
    header, tensors = read(path, form, what, otherwise)
    state: dict[str, Any] = _with_tensors(header["state"], tensors, device)
    return state


def _without_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    """`value` with its tensors, which go into `tensors`, as {_TENSOR: name, "cpu": whether it is there}."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value
        return {_TENSOR: name, "cpu": value.device.type == "cpu"}
    if isinstance(value, Mapping):
        return {key: _without_tensors(each, tensors) for key, each in value.items()}
    return [_without_tensors(each, tensors) for each in value] if isinstance(value, (list, tuple)) else value


def _with_tensors(value: Any, tensors: Mapping[str, Tensor], device: torch.device | None) -> Any:
    if isinstance(value, list):
        return [_with_tensors(each, tensors, device) for each in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return tensors[value[_TENSOR]] if value["cpu"] else tensors[value[_TENSOR]].to(device)
    return {key: _with_tensors(each, tensors, device) for key, each in value.items()}


def bytes_of(tensor: Tensor) -> Any:
    """The bytes of a tensor, in the order of its elements, for a digest; of a sparse one, where they are, too."""
    if tensor.layout is not torch.strided:
        parts = _plain({"": tensor})[0].values()
        return np.concatenate([bytes_of(part) for part in parts])
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _checksum(header: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()


def _plain(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Of tensors, some of which safetensors does not hold, sparse ones and complex ones of double precision: (strided
    tensors that hold what `tensors` do, how those are made of them that are not there as they are, which
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


def _as_given(tensors: Mapping[str, Tensor], how: Mapping[str, Any]) -> dict[str, Tensor]:
    """What `_plain` was given."""
    found = {name: torch.view_as_complex(tensor) if how.get(name) == "complex" else tensor
             for name, tensor in tensors.items()}
    for name, shape in how.items():
        if shape != "complex":
            found[name] = torch.sparse_coo_tensor(found.pop(name + _INDICES), found.pop(name + _VALUES), shape,
                                                  is_coalesced=True, check_invariants=True)
    return found
