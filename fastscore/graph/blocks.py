"""Residual branches that can go whole: what is only added to a stream that it is computed from.

Each is a group of one channel, a gate on the output of the branch's last module. Where it goes, zeros stand for that
module and for all that runs for it alone, each of the shape that it reads: see fastscore.modules.zero_branch.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastscore import rng
from fastscore.graph.autograd_nodes import Readers, readers_of
from fastscore.graph.cutting import surgery
from fastscore.graph.following.cuts import LAYERS
from fastscore.graph.following.residual_sums import (
    Call,
    Calls,
    Makers,
    Places,
    added_at,
    beside_shortcut,
    holders,
    makers_of,
    note,
    runs_before,
    within,
)
from fastscore.graph.groups import ChannelGraph, ChannelGroup, Member
from fastscore.graph.kept import branches as other_branches
from fastscore.graph.layer_types import type_of
from fastscore.graph.trials.differences import all_close
from fastscore.graph.trials.some_channels import some_channels
from fastscore.modules.evaluation_copy import evaluation_copy
from fastscore.modules.hooks import OwnHook, put_on
from fastscore.modules.inspection import channel_dim, device_of, parameter_owners
from fastscore.modules.weights.own_products import OWN
from fastscore.modules.zero_branch import ONE, SAME, WIDER, put, put_zeros, resized, windows
from fastscore.wording import said

_NO_WEIGHTS = "its modules hold no weights but those of normalisations"
_MORE = "its modules read more than the stream that it is added to"
_INNER = "branches within it go by themselves"


@dataclass(frozen=True)
class Branch:
    """A residual branch.

    name: of its last module. call: of that. before: what runs for it alone, and how many things each of it returns.
    zeros: what stands for the last module where the branch changes the shape (see zero_branch.SAME): its shortcut does.
    larger: why more of the model does not go with it, as one branch.
    """

    name: str
    call: Call
    before: tuple[tuple[str, int], ...]
    zeros: int = 0
    larger: str = ""

    @property
    def modules(self) -> Mapping[str, int]:
        """All that goes, and how many things each of it returns."""
        return {self.name: self.zeros or self.call.returns, **dict(self.before)}

    def holds(self, other: "Branch") -> bool:
        """Whether all that goes with the other goes with it."""
        return all(any(within(inner, outer) for outer in self.modules) for inner in other.modules)


def find(model: nn.Module, run: Callable[[nn.Module], Tensor]) -> tuple[list[Branch], dict[str, str]]:
    """The branches of a model, an evaluation copy whose parameters require gradients, to be tried (see that_go): in the
    order of the modules, of branches within branches the innermost; and module -> why the branch that it is, or ends,
    stays. run: (model) -> its output, on an example."""
    modules = {name: module for name, module in model.named_modules() if name and not isinstance(module, OWN)}
    calls: dict[str, list[Call | None]] = {name: [] for name in modules}
    with torch.enable_grad(), put_on(module.register_forward_hook(partial(note, calls[name]), with_kwargs=True)
                                     for name, module in modules.items()):
        output = run(model)
    readers, makers, owners = readers_of(output.grad_fn), makers_of(calls), parameter_owners(model)
    found: dict[Any, Branch] = {}  # by where they are added
    # where a branch is added (of one beside a shortcut, the sum alone) -> what it is called, and why it stays
    kept: dict[tuple[Any, Any], tuple[str, str]] = {}
    for name in modules:  # outer modules come before inner ones that return the same
        call = calls[name][0] if len(calls[name]) == 1 else None
        added = None if call is None else added_at(call, readers)
        if call is not None and added is None:
            where, way = _beside_shortcut(modules, name, call, calls, readers, makers) or (None, "")
            why = way if isinstance(way, str) else _held_elsewhere(modules, way.modules, owners)
            if where is not None and why:
                kept.setdefault((where[0], None), (name, why))
            elif isinstance(way, Branch):
                found.setdefault(where, way)
        if call is None or added is None or added[0] in found or call.node is call.source:
            continue
        before = runs_before(name, call, added[1], modules, calls, readers, makers)
        ways = [] if before is None else [Branch(name, call, _as_wide(modules, call, before, calls))]
        for branch in [*ways, *_last_alone(modules, Branch(name, call, ()))]:
            weights = _with_weights(modules, branch)
            if added[0] in found:
                break
            if why := _held_elsewhere(modules, branch.modules, owners) if weights else _NO_WEIGHTS:
                kept.setdefault(added[0], (_named(modules, branch), why))
            else:
                found[added[0]] = replace(branch, larger=kept.pop(added[0], ("", ""))[1])
        if before is None and added[0] not in found:
            kept.setdefault(added[0], (makers[call.node][0][1], _MORE))
    sums = {reader for reader, _ in found}
    kept = {where: stays for where, stays in kept.items() if where[1] is not None or where[0] not in sums}
    innermost = _innermost(modules, [*found.values()])
    places = Places(name for branch in innermost for name in branch.modules)
    around = {branch.name: _INNER for branch in found.values() if not places.meet(branch.modules)}
    stay = {**other_branches.why(modules, calls, readers, {*found, *kept}), **dict(kept.values()), **around}
    return innermost, {name: stay[name] for name in modules if name in stay}


def _beside_shortcut(modules: Mapping[str, nn.Module], name: str, call: Call, calls: Mapping[str, list[Call | None]],
                     readers: Readers, makers: Makers) -> tuple[Any, Branch | str] | None:
    """(where it is added, a branch beside a shortcut that changes the shape as it does, with the larger part of the
    weights, or why it stays); None where that is none."""
    parent, _, own = name.rpartition(".")
    if parent not in modules or call.returns or len(call.shape) < 3:  # those that a shortcut of vectors stands beside
        return None
    children = list(modules[parent]._modules)
    siblings = {child: calls[f"{parent}.{child}"] for child in children
                if child != own and f"{parent}.{child}" in calls}
    sum_and_stream = beside_shortcut(call, siblings, readers)
    if sum_and_stream is None:
        return None
    added, stream, shortcut = sum_and_stream
    before = runs_before(name, call, stream, modules, calls, readers, makers)
    if before is None:
        return added, _MORE
    branch = Branch(name, call, tuple((other, SAME) for other, _ in before), SAME - 1 - children.index(shortcut))
    if sum(_layers(modules[other]) for other in branch.modules) <= _layers(modules[f"{parent}.{shortcut}"]):
        return added, f"it has no more layers than {shortcut}, which is added to it and is no shortcut then"
    for other in branch.modules:
        seen = calls[other][0]
        try:
            told = seen is not None and resized(seen.read[2:], windows(modules[other])) == [*seen.shape[2:]]
        except ValueError:
            told = False
        if not told or seen is None or seen.returns:
            return added, f"how {other} changes the size is not told by kernels and strides"
    return added, branch


def that_go(model: nn.Module, run: Callable[[nn.Module], Tensor], branches: Sequence[Branch],
            groups: Sequence[ChannelGroup]) -> tuple[tuple[ChannelGroup, ...], dict[str, str]]:
    """A group for each of `branches` that can go, in the order of the modules, and why the others stay.

    Without each of them, and without all, the model computes what it does where they add zeros; so does what is left of
    it where channels of `groups` are gone as well.
    """
    models = {"": model}
    if branches and groups:
        with suppress(Exception):  # of a model's code, which prune() tries again
            gone = surgery.removed_indices(groups, some_channels(groups, 0))
            small = surgery.remove_indices(evaluation_copy(model), gone)
            with torch.no_grad():
                run(small)
            models[", where channels are gone as well"] = small

    def why(branches: Sequence[Branch]) -> str:
        return next((reason + where for where, each in models.items() if (reason := _difference(each, run, branches))),
                    "")

    modules, left, kept = dict(model.named_modules()), list[Branch](), dict[Branch, str]()
    parts = [list(branches)] if branches else []
    while parts:  # halves, where all together do not go, so that few are tried alone
        part = parts.pop()
        if not (reason := why(part)):
            left += part
        elif len(part) == 1:
            ways = [*_last_alone(modules, part[0]), *([replace(part[0], zeros=ONE)] if _may_be_one_wide(
                modules[part[0].name], part[0].call) and not part[0].zeros else [])]
            others = list(itertools.islice((way for way in ways if not why([way])), 1))
            left += others
            kept |= {} if others else {part[0]: part[0].larger or reason}
        else:
            parts += part[len(part) // 2:], part[:len(part) // 2]
    if len(left) > 1 and left != list(branches) and (reason := why(left)):
        kept |= {branch: f"{reason}, and without the others" for branch in left}
        left = []
    return tuple(_groups(model, left)), {_named(modules, branch): reason for branch, reason in kept.items()}


def with_blocks(graph: ChannelGraph) -> ChannelGraph:
    """The graph's groups, and its residual branches as groups beside them; one that is called as a group of heads is
    gets a name of its own."""
    names = {group.name for group in graph.groups}
    branches = (replace(branch, name=f"{branch.name} (whole)") if branch.name in names else branch
                for branch in graph.blocks)
    return replace(graph, groups=(*graph.groups, *branches))


def zero_outputs(model: nn.Module, groups: "list[ChannelGroup]") -> Iterator[Any]:
    """Hooks by which the branches of `groups` add zeros."""
    for group in groups:
        for member in group.role("branch"):
            yield model.get_submodule(member.layer).register_forward_hook(OwnHook(_zeroed))


def _zeroed(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)


def _with_weights(modules: Mapping[str, nn.Module], branch: Branch) -> list[str]:
    """The modules of a branch that hold weights, and not the numbers of a normalisation alone."""
    return [name for name in branch.modules if any(parameter.dim() > 1 for parameter in modules[name].parameters())]


def _layers(module: nn.Module) -> int:
    """How many layers with weights a module holds, or is."""
    return sum(any(parameter is not None and parameter.dim() > 1 for parameter in layer._parameters.values())
               for layer in module.modules())


def _last_alone(modules: Mapping[str, nn.Module], branch: Branch) -> Iterator[Branch]:
    """The branch whose last module alone goes, where that is more than one layer."""
    module, call = modules[branch.name], branch.call
    if list(module.children()) and call.read == call.shape and any(
            type_of(inner) in LAYERS for inner in module.modules()):
        yield replace(branch, before=())


def _held_elsewhere(modules: Mapping[str, nn.Module], names: Collection[str], owners: Mapping[int, int]) -> str:
    """What of these modules is not theirs alone: a parameter that another module holds, too, and would stay, or the
    cache of a decoder, whose first layer says how long its keys are; empty where they are alone."""
    inside = Counter[int]()
    for name in names:
        inside.update(parameter_owners(modules[name]))
    if any(owners[key] != count for key, count in inside.items() if key != id(None)):
        return "other modules hold weights of it, too"
    first = any(getattr(modules[name], "layer_idx", None) == 0 for name in names)
    return "the cache of a decoder takes its length from the keys of its first layer" if first else ""


def _innermost(modules: Mapping[str, nn.Module], branches: Sequence[Branch]) -> list[Branch]:
    """Those whose last module holds no other; of what stands before it others may go without it."""
    inside = defaultdict[str, list[Branch]](list)  # module -> the branches whose last module stands in it, or is it
    for branch in branches:
        for outer in holders(branch.name):
            inside[outer].append(branch)
    found, places = list[Branch](), Places()
    for branch in branches:
        near = dict.fromkeys(other for outer in branch.modules for other in inside[outer])
        inner = [other for other in near if other is not branch and branch.holds(other)]
        for way in [branch] if not inner else _last_alone(modules, branch):
            if not any(within(other.name, way.name) for other in inner) and not places.meet(way.modules):
                found.append(way)
                places.add(way.modules)
    return found


def _groups(model: nn.Module, branches: Sequence[Branch]) -> Iterator[ChannelGroup]:
    """Each is called as the module that holds its weights is, if no other is; or else as its last module."""
    modules = dict(model.named_modules())
    owners = {branch: _named(modules, branch) for branch in branches}
    taken = Counter([*owners.values()])
    nought = torch.zeros(1, dtype=torch.int64)
    for branch in branches:
        call, module = branch.call, modules[branch.name]
        name = owners[branch] if taken[owners[branch]] == 1 else branch.name
        if not list(module.children()):
            dim = channel_dim(module)
        else:
            last = any(isinstance(inner, nn.Linear) and inner.out_features == call.shape[-1]
                       for inner in module.modules())
            dim = -1 if last else 1
        channels = torch.arange(call.shape[dim])
        yield ChannelGroup(name, 1, nought, (
            Member(branch.name, "branch", channels, torch.zeros_like(channels), dim),
            *(Member(other, "block", torch.tensor([returns]), nought) for other, returns in branch.modules.items())))


def _named(modules: Mapping[str, nn.Module], branch: Branch) -> str:
    return _holder(_with_weights(modules, branch)) or branch.name


def _holder(names: Sequence[str]) -> str:
    """The innermost module that is, or holds, all of these."""
    if not names:
        return ""
    parts = (names[0] + ".").split(".")
    return next(outer for size in range(len(parts) - 1, -1, -1)
                if (outer := ".".join(parts[:size])) == "" or all(within(name, outer) for name in names))


def _difference(model: nn.Module, run: Callable[[nn.Module], Tensor], branches: Sequence[Branch]) -> str:
    """Why the branches cannot go; empty where the model runs without them, and computes what it does where they add
    zeros."""
    replaced = {name: model.get_submodule(name) for branch in branches for name in branch.modules}
    try:
        with torch.no_grad():
            rng.start_over(device_of(model))
            with put_on(model.get_submodule(branch.name).register_forward_hook(OwnHook(_zeroed))
                        for branch in branches):
                want = run(model)
            for branch in branches:
                for name, returns in branch.modules.items():
                    put_zeros(model, name, returns)
            rng.start_over(device_of(model))
            got = run(model)
    except Exception as error:  # whatever the model's code does with a module that is not there
        return f"{type(model).__name__} does not run without it ({said(error)})"
    finally:
        for name, module in replaced.items():
            put(model, name, module)
    return "" if all_close(got, want) else f"{type(model).__name__} computes something else without it"


def _as_wide(modules: Mapping[str, nn.Module], call: Call, before: tuple[tuple[str, int], ...], calls: Calls
             ) -> tuple[tuple[str, int], ...]:
    """What runs `before` the module that makes a `call`: where code makes less of the channels of the one layer among
    it that changes how many there are, as chunk(2) does, the zeros of that are as many times as wide."""
    changing = [(name, made) for name, _ in before for made in calls[name][:1]
                if made is not None and made.shape != made.read]
    if len(changing) == 1:
        name, made = changing[0]
        if type_of(modules[name]) in LAYERS and not made.returns and len(made.shape) == len(call.read):
            dim = channel_dim(modules[name])
            times, rest = divmod(made.shape[dim], call.read[dim])
            if times > 1 and not rest:
                return tuple((other, times * WIDER if other == name else returns) for other, returns in before)
    return before


def _may_be_one_wide(last: nn.Module, call: Call) -> bool:
    """Whether a module may make zeros of one channel, which are as wide as the stream where they are added to it:
    whatever code makes of what runs before it, which it concatenates, say."""
    return type_of(last) in LAYERS and not call.returns
