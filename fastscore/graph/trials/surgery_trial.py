"""Groups tried by surgery, on a copy, before they are offered: whoever scores them can prune them.

Some channels of every group go at once, and then others, so that each goes once: code that reads one fixed entry of a
parameter, or its largest, shows only where that entry goes. The smaller copy then runs with the outputs that the whole
model's layers had, so that each layer, and each stretch of code between layers, is judged by itself: it must run,
layers must read what they read before at the channels that stay, and must make of it what they made with the others
read as zero.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial, reduce
from typing import Any

import torch
from torch import Tensor, nn

from fastscore.graph.cutting import surgery
from fastscore.graph.groups import ChannelGroup
from fastscore.graph.layers_inside import holds_norm
from fastscore.graph.trials import plain_layers
from fastscore.graph.trials.differences import all_close
from fastscore.graph.trials.halving import first_failing
from fastscore.graph.trials.recording import MISREAD, Recording
from fastscore.graph.trials.replaced_layers import read_by, unwrapped
from fastscore.graph.trials.some_channels import some_channels
from fastscore.modules import frames
from fastscore.modules.evaluation_copy import evaluation_copy
from fastscore.modules.hooks import with_input
from fastscore.modules.inspection import channel_dim, runs_own_code, submodule
from fastscore.modules.narrower import staying, without
from fastscore.modules.weights.computed_weights import why_it_computes_on
from fastscore.modules.weights.own_linear import OwnLinear
from fastscore.wording import said

_PLACE = re.compile(r"\(([^ ()]+) \(\w+\)")  # in a reason: the module that does not run
_IN_VAIN = 4  # groups that are tried beside one which does not go alone, besides those that join it one after another


@dataclass
class _Findings:
    """layers: layer -> what is wrong with what it reads or makes. misread: those of them that read something else.
    elsewhere: what the model does instead, and details, where no layer's own place is wrong."""

    layers: dict[str, str] = field(default_factory=dict)
    misread: set[str] = field(default_factory=set)
    elsewhere: tuple[str, str] | None = None

    def __bool__(self) -> bool:
        return bool(self.layers) or self.elsewhere is not None

    def reason(self, group: ChannelGroup) -> str:
        """Why `group` cannot go."""
        if self.elsewhere is None:
            own = [self.layers[member.layer] for member in group.members if member.layer in self.layers]
            return next(iter((*own, *self.layers.values())))
        does, details = self.elsewhere
        return f"the model {does} with fewer {'heads' if any(group.role('heads')) else 'channels'} there{details}"


def refusals(recording: Recording, groups: Sequence[ChannelGroup]) -> dict[str, str]:
    """Name of each group that cannot go by surgery -> why, naming the innermost module and what it said. Those that
    have gone all at once are noted in the recording."""
    refused: dict[str, str] = {}
    left = list(groups)
    while left and (found := _try(recording, left)):
        suspects = {layer: _suspects(layer, left, layer in found.misread) for layer in found.layers}
        blamed = {groups[0].name: found.layers[layer] for layer, groups in suspects.items() if len(groups) == 1}
        if not blamed and len(left) == 1:
            blamed = {left[0].name: found.reason(left[0])}
        if not blamed:  # several groups meet there, or it is in no layer's own place
            near = next(iter(suspects.values()), None) or _near(found, left)
            blamed = _culprit(recording, near) or _culprit(recording, left) or \
                {group.name: found.reason(group) for group in left}  # what fails at random is no ground to stand on
        refused |= blamed
        left = [group for group in left if group.name not in refused]
    recording.tried = tuple(left)
    return refused


def together(recording: Recording, groups: Sequence[ChannelGroup], refused: Mapping[str, str]) -> list[ChannelGroup]:
    """Groups that go as one, though none goes alone: the code between them takes their widths to be the same, as where
    a convolution's output is given the shape of its input. Each is made, channel by channel, of some of `refused`,
    those of `groups` that were tried and fail -> why."""
    found, used = list[ChannelGroup](), set[str]()
    left = [group for group in groups if group.name in refused]
    for at, group in enumerate(left):
        if group.name not in used:
            others = [other for other in left if other is not group and other.name not in used]
            counted = [other for other in others if _counted_alike(group, other)]
            if any(other in counted for other in left[:at]):  # they were tried
                counted = []
            joined, tried = _joined(recording, group, refused[group.name], others, counted)
            used |= tried
            found += joined
    return found


def _joined(recording: Recording, group: ChannelGroup, reason: str, others: Sequence[ChannelGroup],
            counted: Sequence[ChannelGroup]) -> tuple[list[ChannelGroup], set[str]]:
    """(the group with some of `others` with which it runs, none if there are none; names of those, or of all that were
    tried). reason: why it does not go alone. counted: those of the others by whose number it goes, which are tried
    beside it first. One that joins in vain is left out again, a few times."""
    used = set[str]()

    def more(joined: ChannelGroup, names: set[str], reason: str) -> Iterator[tuple[ChannelGroup, set[str]]]:
        place = _PLACE.search(reason)
        for other in reversed(others) if "does not run" in reason else ():  # the last is tried first
            if other.name not in names and _may_join(joined, other, "" if place is None else f"{place[1]}."):
                yield _with(joined, other), {*names, other.name}

    def tried(waiting: list[tuple[ChannelGroup, set[str]]]) -> Iterator[tuple[ChannelGroup, set[str]]]:
        for _ in range(len(others) + _IN_VAIN):
            if not waiting:
                break
            joined, names = waiting.pop()
            if not (failed := _try(recording, [joined])):
                yield joined, names
                return
            used.update(names - {each.name for each in (group, *counted)})
            waiting += more(joined, names, failed.reason(joined))

    first, *rest = sorted((group, *counted), key=lambda each: each.channels)
    for waiting in ([(reduce(_with, rest, first), {each.name for each in (first, *rest)})] if rest else [],
                    list(more(group, {group.name}, reason))):
        for joined, names in tried(waiting):
            return [joined], names
    return [], used


def _with(group: ChannelGroup, other: ChannelGroup) -> ChannelGroup:
    """The group, with what is in another one, of as many units; a number that both go by is made smaller once."""
    known = {(member.layer, member.attribute) for member in group.role("width")}
    more = (member for member in other.members
            if member.role != "width" or (member.layer, member.attribute) not in known)
    if not torch.equal(group.unit, other.unit):  # of which each of the group's channels is one
        more = (replace(member, channel=other.unit[member.channel]) for member in more)
    return replace(group, members=(*group.members, *more))


def _counted_alike(group: ChannelGroup, other: ChannelGroup) -> bool:
    """Whether a module keeps one number for the channels of both groups, as in `a[:, :self.n]` and `b[:, :self.n]`: as
    many go of each, or of both pairs that are cut there."""
    kept, theirs = ({(member.layer, member.attribute) for member in each.role("width")} for each in (group, other))
    few, many = sorted((group, other), key=lambda each: each.channels)
    return bool(kept & theirs) and group.section is other.section is None and (
        torch.equal(group.unit, other.unit) or torch.equal(few.unit, many.unit.unique()))


def _may_join(group: ChannelGroup, other: ChannelGroup, place: str) -> bool:
    """Whether two groups of the same width meet where the model does not run: in the module of a name that ends with a
    dot, of which the other's first layer is one and reads the first, or is read by it; or in its own code."""
    if not torch.equal(group.unit, other.unit):
        return False
    if not place:
        return True
    if not other.name.startswith(place):
        return False
    made, read = ([{member.layer for member in each.role(role)} for each in (group, other)]
                  for role in ("producer", "consumer"))
    return bool(made[0] & read[1] or made[1] & read[0])


def _suspects(layer: str, groups: Sequence[ChannelGroup], misread: bool) -> list[ChannelGroup]:
    """The groups that a layer reads, if any; else those that it makes, which are not to blame for what it reads."""
    roles = {group.name: {member.role for member in group.members if member.layer == layer} for group in groups}
    return [group for group in groups if "consumer" in roles[group.name]] or \
        [group for group in groups if roles[group.name] - ({"producer"} if misread else set())]


def _near(found: _Findings, groups: Sequence[ChannelGroup]) -> list[ChannelGroup]:
    """Those with a layer in the innermost module that does not run: mostly one of these is to blame."""
    place = _PLACE.search("".join(found.elsewhere or ()))
    return [] if place is None else [group for group in groups if any(
        member.layer.startswith(f"{place[1]}.") for member in group.members)]


def _culprit(recording: Recording, groups: Sequence[ChannelGroup]) -> dict[str, str]:
    """The group with which `groups`, tried in their order, begin to fail, and why; none where they do not."""
    if not groups or not (found := _try(recording, groups)):
        return {}
    at, found = first_failing(groups, found, partial(_try, recording))
    return {groups[at].name: found.reason(groups[at])}


def _try(recording: Recording, groups: Sequence[ChannelGroup]) -> _Findings:
    """What is wrong with one part of the channels gone, or with the other."""
    return _try_part(recording, groups, 0) or _try_part(recording, groups, 1)


def go_one_by_one(recording: Recording, groups: Sequence[ChannelGroup]) -> set[str]:
    """Names of those that can lose their first unit alone, and their last: code that cuts their channels by their
    number alone would cut them alike. All are tried together, and where that fails, each by itself."""
    if not groups or not any(_try_without(recording, groups, {
            group.name: (group.unit == (0 if first else int(group.unit[-1]))).nonzero()[:, 0] for group in groups})
            for first in (True, False)):
        return {group.name for group in groups}
    return set[str]().union(*(go_one_by_one(recording, [group]) for group in groups)) if len(groups) > 1 else set()


def _try_part(recording: Recording, groups: Sequence[ChannelGroup], part: int) -> _Findings:
    return _try_without(recording, groups, some_channels(groups, part))


def _try_without(recording: Recording, groups: Sequence[ChannelGroup], removed: Mapping[str, Tensor]) -> _Findings:
    found = _Findings()
    gone = surgery.removed_indices(groups, removed)
    small: nn.Module = recording.model
    expected = recording.steady[1]
    try:
        small = surgery.remove_indices(evaluation_copy(recording.model), gone)
        with recording.steady_draws():
            output = recording.replay({name: _watched(recording, small, name, gone, found)
                                       for name in recording.outputs}, small)
    except Exception as error:  # whatever the model's code does with a width that it does not expect
        found.elsewhere = "does not run", f" ({frames.where(small, error.__traceback__)}: {said(error)})"
        return found
    if not _alike(output, expected):
        found.elsewhere = "returns something else", ""
    return found


def _watched(recording: Recording, small: nn.Module, name: str, gone: surgery.RemovedIndices,
             found: _Findings) -> Callable[..., Tensor]:
    """A layer's forward in the smaller copy: compares what it reads and makes, and returns what the whole one made."""
    layer, whole = submodule(small, name), recording.layers[name]
    dim = channel_dim(layer)
    gone_out = gone.get((name, "outputs"))
    gone_in = gone_out if name in recording.norms else gone.get((name, "inputs"))
    copies = gone.get((name, f"dim{whole.dims[0]}")) if isinstance(whole, OwnLinear) and len(whole.dims) > 2 else None

    def kept(x: Tensor, gone_there: Tensor | None) -> Tensor:
        return _kept(x if copies is None else without(x, 0, copies), dim, gone_there)

    calls, inputs = enumerate(recording.outputs[name]), recording.steady[0]
    holds_rest = cache(lambda: plain_layers.holds_rest(layer, whole, gone_in, gone_out))

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        call, full = next(calls, (-1, None))
        if full is None or call >= len(inputs[name]):  # one call more, or from within a layer
            computed: Tensor = type(layer).forward(layer, *args, **kwargs)
            return computed
        expected = kept(full, gone_out)
        before = inputs[name][call]
        x = read_by(args, kwargs)
        if before is None or x is None:
            return expected
        read, x = kept(before, gone_in), unwrapped(x)
        if not _alike(x, read):
            found.misread.add(name)
            found.layers.setdefault(name, f"{name} {MISREAD}: the code before it depends on which and how many there "
                                          "are")
        if name in found.layers or name in recording.transformed:
            return expected
        if (name, call) not in recording.swapped and holds_rest() and \
                plain_layers.reads_one(whole, args, kwargs) and _strides_as_ever(x, before, full, expected, dim):
            return expected
        multiplies = runs_own_code(whole) and (name, call) not in recording.swapped and \
            len(args) + len(kwargs) == 1 and plain_layers.is_product(whole, before, full)
        if not multiplies and gone_in is not None and name not in recording.norms and runs_own_code(whole) and \
                _reads_besides(whole, args, kwargs, before):
            found.layers[name] = f"the code of {name} ({type(whole).__name__}) does more with what it reads than " \
                                 "multiply it by its weight"
            return expected
        try:
            made: Tensor = type(layer).forward(layer, *args, **kwargs)
        except Exception as error:
            found.layers.setdefault(name, f"{name} ({type(whole).__name__}) does not run with fewer channels "
                                          f"({said(error)})")
            return expected
        if multiplies and plain_layers.is_product(whole, x, made, gone_in, gone_out):
            return torch.empty_like(made).copy_(expected) if made.shape == expected.shape else expected
        masked = before if gone_in is None else before.index_fill(dim, gone_in.to(before.device), 0)
        args, kwargs = with_input(args, kwargs, masked)
        if gone_in is None and gone_out is None and why_it_computes_on(whole) is not None:
            if not _alike(made, full):  # `whole` computes what it was told last
                found.layers.setdefault(name, f"what {name} computes its weight from depends on which channels there "
                                              "are")
            return expected
        with recording.parameters_of(name, call), _outputs_zero(whole, gone_out):
            want = kept(type(whole).forward(whole, *args, **kwargs), gone_out)
        if not _alike(made, want):
            found.layers.setdefault(name, f"{name} ({type(whole).__name__}) computes something else with fewer "
                                          "channels: its weight, or what else its code does, is computed from all")
        return torch.empty_like(made).copy_(expected) if made.shape == expected.shape else expected  # in its strides

    return forward


@contextmanager
def _outputs_zero(layer: nn.Module, gone: Tensor | None) -> Iterator[None]:
    """In the block, a layer that normalises what its weight makes has zeros there at `gone`, as its normalisation is to
    count them; any other is as it is."""
    if gone is None or not holds_norm(layer):
        yield
        return
    before = {name: parameter for name, parameter in layer._parameters.items()
              if parameter is not None and name in ("weight", "bias")}
    try:
        for name, parameter in before.items():
            by_column = isinstance(layer, nn.Embedding) or getattr(layer, "transposed", False)
            dim = int(name == "weight" and by_column)
            layer._parameters[name] = nn.Parameter(
                parameter.detach().index_fill(dim, gone.to(parameter.device), 0), parameter.requires_grad)
        yield
    finally:
        layer._parameters.update(before)


def _reads_besides(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], x: Tensor) -> bool:
    """Whether what a layer makes of x depends on it with a weight of zeros, as where it adds x to a product with it:
    then a gradient at what it reads is not that of the product."""
    weight = layer._parameters.get("weight")
    if weight is None:
        return False
    layer._parameters["weight"] = nn.Parameter(torch.zeros_like(weight), requires_grad=False)
    try:
        made, again = (type(layer).forward(layer, *own_args, **own_kwargs) for own_args, own_kwargs in
                       (with_input(args, kwargs, each) for each in (x, 1.0 - 1.5 * x)))
    except Exception:  # of code that asks what the weight is: it runs as it is, or is found out below
        return False
    finally:
        layer._parameters["weight"] = weight
    return not _alike(made, again)


def _kept(x: Tensor, dim: int, gone: Tensor | None) -> Tensor:
    """A copy of x less the positions `gone` of `dim`."""
    return x.clone() if gone is None else x.index_select(dim, staying(x.shape[dim], gone).to(x.device))


def _strides_as_ever(x: Tensor, before: Tensor, full: Tensor, expected: Tensor, dim: int) -> bool:
    """Whether a layer that reads x makes `expected` in these strides, as it made `full` of `before`: these lie in
    memory alike, and so do those, and in no other way besides, as images of one channel do."""
    orders = {plain_layers.memory_order(tensor) for tensor in (full, expected)}
    return x.dtype == before.dtype and len(orders) == 1 and None not in orders and \
        plain_layers.order_of_dims(x) == plain_layers.order_of_dims(before) and \
        min(x.shape[dim], expected.shape[dim]) > 1


def _alike(x: Tensor, expected: Tensor) -> bool:
    """To the rounding of another algorithm, TF32 among them: what depends on a width differs by far more."""
    if torch.equal(x, expected) or not x.is_floating_point():
        return torch.equal(x, expected)
    return all_close(x, expected, rounding=torch.finfo(x.dtype).eps ** (1 / 3))
