"""How much of a network can go: the share of its MACs in layers that scored channels make or read."""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from torch import nn

from fastscore.graph.cutting import heads
from fastscore.graph.groups import READS, TIED, ChannelGraph
from fastscore.modules.weights.weight_products import weight_name
from fastscore.wording import and_like_it

_SHOWN = 3  # of the reasons
_READERS = {*READS, "norm"}


@dataclass(frozen=True)
class Coverage:
    """Of all products with weights (Conv, Linear, projections and experts that a module holds as parameters), counted
    in MACs of one sample, the share that can go.

    Attributes:
        macs: Of all these layers; products of activations, as in attention, are in none.
        outputs: Share of `macs` in layers whose outputs can go, all or a part of them, 0 to 1.
        shrink: Share of `macs` in layers that shrink at all: whose outputs or inputs can go.
        kept: Layer, or parameter, whose outputs stay -> its share of `macs`, the greatest first.
        reasons: Each of these -> why its outputs stay.
        uncounted: Operation that no formula knows -> the modules that it ran in, whose MACs are not in these figures.
    """

    macs: float
    outputs: float
    shrink: float
    kept: Mapping[str, float]
    reasons: Mapping[str, str]
    uncounted: Mapping[str, str] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """In short: the shares, and the reasons that weigh most."""
        said = [f"coverage: {self.outputs:.1%} of {self.macs:,.0f} MACs (of layers with weights) are of layers whose "
                f"outputs can go, {self.shrink:.1%} of layers that shrink at all"]
        alike: dict[str, list[str]] = {}  # reason, without the numbers in it -> layers, the greatest first
        for layer in self.kept:
            alike.setdefault(re.sub(r"\d+", "", self.reasons[layer]), []).append(layer)
        for layers in sorted(alike.values(), key=self._share, reverse=True)[:_SHOWN]:
            said.append(f"  outputs that stay: {self._share(layers):.1%} {and_like_it(layers)} "
                        f"({self.reasons[layers[0]]})")
        return [*said, *(f"  not counted: {operation}, in {places}" for operation, places in self.uncounted.items())]

    def _share(self, layers: Iterable[str]) -> float:
        return sum(self.kept[layer] for layer in layers)


def coverage(model: nn.Module, graph: ChannelGraph, scored: Collection[str], skipped: Mapping[str, str]
             ) -> Coverage | None:
    """What `scored`, groups of a graph by name, cover; None for channels that can be masked and not removed: the gates
    of units="norms".

    model: that was traced, or a copy of it. skipped: layer -> why its channels are kept.
    """
    if any(True for group in graph.groups for _ in group.role("gate")):
        return None
    roles: dict[str, set[str]] = defaultdict(set)
    for group in graph.groups:
        for member in group.members if group.name in scored else ():
            if member.role in ("width", "head_dims", "rotary", "query", "handed"):
                continue
            name = weight_name(model, member.layer) if member.role == "tensor" else member.layer
            roles[name].add(member.role)
    total = sum(graph.macs.values())
    kept = {name: macs / total for name, macs in sorted(graph.macs.items(), key=lambda item: -item[1])
            if macs and not _roles(model, name, roles) - _READERS}
    rest = sum(share for name, share in kept.items() if not _roles(model, name, roles))
    return Coverage(total, 1 - sum(kept.values()) if total else 0.0, 1 - rest if total else 0.0, kept,
                    {name: _reason(name, skipped) for name in kept}, graph.uncounted)


def _roles(model: nn.Module, name: str, roles: Mapping[str, set[str]]) -> set[str]:
    """What a layer is in the groups; what a parameter's module is, but for heads that are none of the parameter's."""
    own = roles.get(name, set()).union(*(roles.get(f"{name}.{key}", ()) for key in _parameters(model, name)))
    owner, _, parameter = name.rpartition(".")
    if parameter in (module := model.get_submodule(owner))._parameters:
        own = own | roles.get(owner, set()) - (set() if parameter in heads.tensors(module) else {"heads"})
    return own


def _parameters(model: nn.Module, name: str) -> Collection[str]:
    """Names of the parameters of the module of that name; none where it is a parameter's."""
    try:
        return model.get_submodule(name)._parameters.keys()
    except AttributeError:
        return ()


def _reason(name: str, skipped: Mapping[str, str]) -> str:
    """Why a layer's outputs stay; where it goes with another one, why that one's do."""
    for key in (name, name.rpartition(".")[0]):
        if (reason := skipped.get(key)) is not None:
            first = reason.removeprefix(TIED)
            return skipped[first] if first != reason and first in skipped else reason
    return "no group covers it"
