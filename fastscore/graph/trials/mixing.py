"""Which operation of a model's code mixes channels, or moves them, so that they show where the tracer does not know
them.

A few channels are changed, one by one, beside a run in which nothing is. The first operation that gives more of a
tensor another value than it was given, or another place of it, is the one.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fastscore.batches.parts import tensors_of
from fastscore.graph.groups import ChannelGroup
from fastscore.graph.trials.beside import Beside, Key, Places, places_of, replayed, touched
from fastscore.graph.trials.recording import Recording
from fastscore.modules import frames

_CHANNELS = 4  # of a group, that are changed
_MORE = 1.5  # times the share of a tensor that differed before
# operations that leave every number as it is, in another shape
_VIEWS = {"transpose", "permute", "t", "T", "mT", "H", "mH", "swapaxes", "swapdims", "movedim", "moveaxis", "reshape",
          "view", "flatten", "unflatten", "contiguous", "clone", "detach", "to", "adjoint"}
_PARTS = {"split", "split_with_sizes", "chunk", "tensor_split", "narrow", "getitem"}  # and these leave some out
_SPOKEN = {"getitem": "indexing", "item": "item()", "float": "float()", "int": "int()", "bool": "bool()",
           "tolist": "tolist()", "numpy": "numpy()"}


def mixers(recording: Recording, groups: Sequence[ChannelGroup]) -> dict[str, str]:
    """Name of a group -> the operation, the module whose code it is in, and what it does, where one is found."""
    made: dict[Key, Places] = {}
    for group in groups:
        channels = torch.linspace(0, group.channels - 1, _CHANNELS).long().unique().tolist()
        made |= {(group.name, channel): places_of(recording, group, torch.arange(group.channels) == channel)
                 for channel in channels}
    if not made:
        return {}
    mode = _Mixing({id(module): name for name, module in recording.model.named_modules()})
    try:
        replayed(recording, mode, made)
    except Exception:  # of code that does not run beside itself
        return {}
    return mode.found


class _Mixing(Beside):
    """names: of modules, by id. found: group -> what mixes its channels."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.found: dict[str, str] = {}
        self._names = names
        self._parts: Any = WeakTensorKeyDictionary()  # cut from what held more channels -> the share of it that it is

    def follows(self, key: Key) -> bool:
        """Until what mixes them is found."""
        return key[0] not in self.found

    def take(self, out: Any, others: Mapping[Key, Any], name: str, inputs: Sequence[Tensor]) -> None:
        """Note what mixes, and what is a part of what."""
        before = {key: [(touched(known[key], x), self._part(x)) for x in inputs if key in (known := self.others_of(x))]
                  for key in others}
        for x in tensors_of(out):
            self._parts[x] = max(map(self._part, inputs))
            if name in _PARTS and x.dim() == inputs[0].dim():
                narrow = {at for ((places, _), *_) in before.values() for at, along in enumerate(places)
                          if _is_narrow([along])}
                self._parts[x] *= math.prod(x.shape[at] / inputs[0].shape[at] for at in narrow)
        for key, each in others.items():
            if self.follows(key) and self._mixes(key, out, each, name, before[key]):
                module = frames.innermost(frames.outwards())
                where = "" if module is None else self._names.get(id(module), "")
                one = isinstance(out, Tensor) and any(part < 1 and any(
                    len(along) == 1 < size for along, size in zip(places, out.shape, strict=False))
                    for places, part in before[key] if len(places) == out.dim())
                self.found[key[0]] = f"{_SPOKEN.get(name, name)} in the code of " \
                    f"{f'{where} ({type(module).__name__})' if where else type(module).__name__} " \
                    f"{'spreads one of them, which is cut off, over others' if one else 'mixes or moves them'}"

    def _part(self, x: Tensor) -> float:
        return float(self._parts.get(x, 1.0))

    def _mixes(self, key: Key, out: Any, other: Any, name: str, read: Sequence[tuple[list[Tensor], float]]) -> bool:
        """Whether the channel of `key` shows in more of what an operation gives, or elsewhere; read: where it showed in
        what that read, and which part of the channels this was. What it gives is noted."""
        if isinstance(out, (bool, int, float)):
            return bool(out != other)
        before = [places for places, _ in read]
        most, mixes = max(_share(places) * part for places, part in read), False
        for x, changed_x in zip(tensors_of(out), tensors_of(other), strict=False):
            if x.shape != changed_x.shape:
                return True
            after = touched(changed_x, x)
            if not after or not all(bool(along.any()) for along in after):
                continue
            alike = [each for each in before if [len(along) for along in each] == list(x.shape)]
            moved = name not in _VIEWS and len(alike) == len(before) and any(
                bool((here & ~torch.stack(there).any(0)).any()) for here, *there in zip(after, *alike, strict=True)
                if _is_narrow(there))
            mixes |= moved or _share(after) * self._part(x) > _MORE * most
            self.note(x, key, changed_x)
        return mixes


def _share(places: Iterable[Tensor]) -> float:
    """The part of a tensor that the places of all dimensions span."""
    share = 1.0
    for along in places:
        share *= float(along.double().mean()) if len(along) else 1.0
    return share


def _is_narrow(along: Sequence[Tensor]) -> bool:
    """Whether a channel is a few places of a dimension alone."""
    return float(torch.stack(list(along)).any(0).double().mean()) < 0.5
