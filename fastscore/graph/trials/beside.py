"""What comes of changed channels, operation by operation, beside a run in which nothing is changed."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils.weak import WeakTensorKeyDictionary

from fastscore.batches.parts import map_tensors, tensors_of
from fastscore.graph.groups import ChannelGroup
from fastscore.graph.trials.differences import changed, close
from fastscore.graph.trials.recording import Recording
from fastscore.modules.inspection import channel_dim

Key: TypeAlias = tuple[str, int]  # group, and which of its changes
Places: TypeAlias = Mapping[str, Tensor]  # layer -> positions of its output


class Beside(TorchFunctionMode):
    """Follows what tensors would be if others were changed."""

    def __init__(self) -> None:
        super().__init__()
        self._others: Any = WeakTensorKeyDictionary()

    def note(self, x: Tensor, key: Key, other: Tensor) -> None:
        """`other` is what x would be with the change of `key`."""
        self._others.setdefault(x, {})[key] = other

    def others_of(self, x: Tensor) -> Mapping[Key, Tensor]:
        """What x would be, by the changes that come to it."""
        known: Mapping[Key, Tensor] = self._others.get(x, {})
        return known

    def follows(self, key: Key) -> bool:
        """Whether a change is to be followed any further."""
        return True

    def take(self, out: Any, others: Mapping[Key, Any], name: str, inputs: Sequence[Tensor]) -> None:
        """An operation of that name made `out` of `inputs`, and `others` of what they would be."""
        for key, other in others.items():
            for x, changed_x in zip(tensors_of(out), tensors_of(other), strict=False):
                if x.shape == changed_x.shape:
                    self.note(x, key, changed_x)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [x for x in tensors_of((args, kwargs)) if x in self._others]
        keys = dict.fromkeys(key for x in inputs for key in self._others[x] if self.follows(key))
        own: str = getattr(func, "__name__", "")
        whole: str = (resolve_name(func) if keys else "") or own
        if not keys or whole.endswith("__set__"):
            return func(*args, **kwargs)
        writes = "out" in kwargs or (own.endswith("_") and not own.endswith("__")) or own == "__setitem__"
        others: dict[Key, Any] = {}
        for key in keys:
            def other(x: Tensor, key: Key = key) -> Tensor:
                known = self.others_of(x).get(key)
                return known if known is not None else x.clone() if writes else x

            others[key] = func(*map_tensors(other, args), **map_tensors(other, kwargs))
        out = func(*args, **kwargs)
        name = whole.removesuffix(".__get__").rpartition(".")[2].strip("_")
        self.take(out, others, name, inputs)
        return out


def replayed(recording: Recording, mode: Beside, made: Mapping[Key, Places]) -> None:
    """Run a recorded model in `mode`, whose layers give what they gave, and what that would be with each of the changes
    that `made` has. Raises what the model's code does."""
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

    with mode:
        recording.replay({layer: forward_of(layer) for layer in recording.outputs}, recording.model)


def places_of(recording: Recording, group: ChannelGroup, channels: Tensor) -> Places:
    """Where layers make some channels of a group. channels: bool [C]."""
    return {member.layer: member.index[channels[member.channel]] for member in group.members
            if member.role == "producer" or member.layer in recording.norms}


def touched(x: Tensor, before: Tensor) -> list[Tensor]:
    """Along each dimension, whether x differs at a place from what it was: bool [size]."""
    differs = ~close(x, before) if x.is_floating_point() or x.is_complex() else x != before
    return [differs.movedim(dim, 0).flatten(1).any(1) if x.dim() > 1 else differs for dim in range(x.dim())]
