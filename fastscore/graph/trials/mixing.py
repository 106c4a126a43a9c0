"""Which operation of a model's code mixes channels, or moves them, so that they show where the tracer does not know
them.

A few channels are changed, one by one, beside a run in which nothing is: what comes of each of them is computed next to
what comes of the whole, operation by operation. The first that gives more of a tensor another value than it was given,
or another place of it, is the one.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils.weak import WeakTensorKeyDictionary

from fastscore.batches.parts import map_tensors, tensors_of
from fastscore.graph.groups import ChannelGroup
from fastscore.graph.trials.differences import changed, close
from fastscore.graph.trials.recording import Recording
from fastscore.modules import frames
from fastscore.modules.inspection import channel_dim

_CHANNELS = 4  # of a group, that are changed
_MORE = 1.5  # times the share of a tensor that differed before
# operations that leave every number as it is, in another shape
_VIEWS = {"transpose", "permute", "t", "T", "mT", "H", "mH", "swapaxes", "swapdims", "movedim", "moveaxis", "reshape",
          "view", "flatten", "unflatten", "contiguous", "clone", "detach", "to", "adjoint"}
_PARTS = {"split", "split_with_sizes", "chunk", "tensor_split", "narrow", "getitem"}  # and these leave some out
_SPOKEN = {"getitem": "indexing", "item": "item()", "float": "float()", "int": "int()", "bool": "bool()",
           "tolist": "tolist()", "numpy": "numpy()"}
_Key: TypeAlias = tuple[str, int]  # group, which of the channels that are tried


def mixers(recording: Recording, groups: Sequence[ChannelGroup]) -> dict[str, str]:
    """Name of a group -> the operation, the module whose code it is in, and what it does, where one is found."""
    made: dict[_Key, dict[str, Tensor]] = {}
    for group in groups:
        for number, channel in enumerate(torch.linspace(0, group.channels - 1, _CHANNELS).long().unique().tolist()):
            made[group.name, number] = {
                member.layer: member.index[member.channel == channel] for member in group.members
                if member.role == "producer" or member.layer in recording.norms}
    if not made:
        return {}
    names = {id(module): name for name, module in recording.model.named_modules()}
    mode = _Beside(names)

    def forward_of(layer: str) -> Callable[..., Tensor]:
        calls, module = iter(recording.outputs[layer]), recording.layers[layer]

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            known = next(calls, None)
            if known is None:
                computed: Tensor = type(module).forward(module, *args, **kwargs)
                return computed
            output = known.clone()
            for key, places in made.items():
                if len(places.get(layer, ())):
                    mode.note(output, key, changed(known, channel_dim(module), places[layer]))
            return output

        return forward

    try:
        with mode:
            recording.replay({layer: forward_of(layer) for layer in recording.outputs}, recording.model)
    except Exception:  # of code that does not run beside itself
        return {}
    return mode.found


class _Beside(TorchFunctionMode):
    """Follows what comes of changed tensors. names: of modules, by id. found: group -> what mixes its channels."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.found: dict[str, str] = {}
        self._names = names
        self._others: Any = WeakTensorKeyDictionary()
        self._parts: Any = WeakTensorKeyDictionary()  # cut from what held more channels -> the share of it that it is

    def note(self, x: Tensor, key: _Key, other: Tensor) -> None:
        """`other` is what x would be where the channel of `key` is changed."""
        self._others.setdefault(x, {})[key] = other

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [x for x in tensors_of((args, kwargs)) if x in self._others]
        keys = dict.fromkeys(key for x in inputs for key in self._others[x] if key[0] not in self.found)
        name = resolve_name(func) or getattr(func, "__name__", "")
        if not keys or name.endswith("__set__"):
            return func(*args, **kwargs)
        name = (name.removesuffix(".__get__").rpartition(".")[2]).strip("_")
        writes = getattr(func, "__name__", "").rstrip("_") == getattr(func, "__name__", "")[:-1] or "out" in kwargs
        others: dict[_Key, Any] = {}
        for key in keys:
            def other(x: Tensor, key: _Key = key) -> Tensor:
                known: Tensor | None = self._others[x].get(key) if x in self._others else None
                return known if known is not None else x.clone() if writes else x

            others[key] = func(*map_tensors(other, args), **map_tensors(other, kwargs))
        out = func(*args, **kwargs)
        before = {key: [(_touched(self._others[x][key], x), self._part(x)) for x in inputs if key in self._others[x]]
                  for key in others}
        for x in tensors_of(out):
            self._parts[x] = max(map(self._part, inputs))
            if name in _PARTS and x.dim() == inputs[0].dim():
                narrow = {at for ((touched, _), *_) in before.values() for at, along in enumerate(touched)
                          if _is_narrow([along])}
                self._parts[x] *= math.prod(x.shape[at] / inputs[0].shape[at] for at in narrow)
        for key, each in others.items():
            if key[0] not in self.found and self._mixes(key, out, each, name, before[key]):
                module = frames.innermost(frames.outwards())
                where = "" if module is None else self._names.get(id(module), "")
                one = isinstance(out, Tensor) and any(part < 1 and any(
                    len(along) == 1 < size for along, size in zip(touched, out.shape, strict=False))
                    for touched, part in before[key] if len(touched) == out.dim())
                self.found[key[0]] = f"{_SPOKEN.get(name, name)} in the code of " \
                    f"{f'{where} ({type(module).__name__})' if where else type(module).__name__} " \
                    f"{'spreads one of them, which is cut off, over others' if one else 'mixes or moves them'}"
        return out

    def _part(self, x: Tensor) -> float:
        return float(self._parts.get(x, 1.0))

    def _mixes(self, key: _Key, out: Any, other: Any, name: str, read: Sequence[tuple[list[Tensor], float]]) -> bool:
        """Whether the channel of `key` shows in more of what an operation gives, or elsewhere; read: where it showed in
        what that read, and which part of the channels this was. What it gives is noted."""
        if isinstance(out, (bool, int, float)):
            return bool(out != other)
        before = [touched for touched, _ in read]
        most, mixes = max(_share(touched) * part for touched, part in read), False
        for x, changed_x in zip(tensors_of(out), tensors_of(other), strict=False):
            if x.shape != changed_x.shape:
                return True
            touched = _touched(changed_x, x)
            if not touched or not all(bool(along.any()) for along in touched):
                continue
            alike = [each for each in before if [len(along) for along in each] == list(x.shape)]
            moved = name not in _VIEWS and len(alike) == len(before) and any(
                bool((here & ~torch.stack(there).any(0)).any()) for here, *there in zip(touched, *alike, strict=True)
                if _is_narrow(there))
            mixes |= moved or _share(touched) * self._part(x) > _MORE * most
            self.note(x, key, changed_x)
        return mixes


def _touched(x: Tensor, before: Tensor) -> list[Tensor]:
    """Along each dimension, whether x differs at a place from what it was: bool [size]."""
    differs = ~close(x, before) if x.is_floating_point() or x.is_complex() else x != before
    return [differs.movedim(dim, 0).flatten(1).any(1) if x.dim() > 1 else differs for dim in range(x.dim())]


def _share(touched: Iterable[Tensor]) -> float:
    """The part of a tensor that the touched places of all dimensions span."""
    share = 1.0
    for along in touched:
        share *= float(along.double().mean()) if len(along) else 1.0
    return share


def _is_narrow(along: Sequence[Tensor]) -> bool:
    """Whether a channel is a few places of a dimension alone."""
    return float(torch.stack(list(along)).any(0).double().mean()) < 0.5
