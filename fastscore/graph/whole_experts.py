"""Whole experts of a mixture, as transformers holds them: each with its row of the router that chooses among them.

Where experts are gone, the router chooses among the others: the smaller model is the one whose router gives those that
went minus infinity. A gate on an expert says what it adds where it is chosen.
"""

import inspect
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastscore import rng
from fastscore.graph.cutting import surgery
from fastscore.graph.groups import ChannelGraph, ChannelGroup, Member
from fastscore.graph.trials.differences import all_close
from fastscore.modules.evaluation_copy import evaluation_copy
from fastscore.modules.hooks import OwnHook, put_on
from fastscore.modules.inspection import device_of
from fastscore.modules.weights.experts import NAMES, ROUTER, ExpertLinear, RouterLinear
from fastscore.wording import said

_CHOOSES = {"softmax", "topk"}  # what the code of a router calls that takes no expert of probability zero
_COUNT, _CHOSEN = "num_experts", "top_k"


def find(model: nn.Module, run: Callable[[nn.Module], Tensor], idle: Container[str] = ()
         ) -> tuple[tuple[ChannelGroup, ...], dict[str, str]]:
    """A group of experts for each mixture whose experts can go: the model, an evaluation copy, runs without some, and
    computes what it does where the router gives them minus infinity; and of the others why their experts stay. idle:
    layers to which no gradient comes back."""
    found: list[ChannelGroup] = []
    kept: dict[str, str] = {}
    for name, block in model.named_modules():
        routers = {key: child for key, child in block._modules.items()
                   if child is not None and isinstance(child._modules.get(ROUTER[0]), RouterLinear)}
        for key, experts in block._modules.items():
            if experts is None or not isinstance(experts._modules.get(NAMES[1]), ExpertLinear):
                continue
            choosing = [router for router, child in routers.items() if _chooses(child)]
            group = _group(name, key, choosing[0], block) if len(choosing) == 1 else \
                "no router beside it takes the most probable by a softmax over all, which experts may leave"
            if f"{name}.{key}.{NAMES[1]}".lstrip(".") in idle:
                group = "no gradient of the output comes back to them"
            if isinstance(group, ChannelGroup):
                found.append(group)
            else:
                kept[f"{name}.{key}".lstrip(".")] = group
    if found:
        found[0] = _with_counts_above(model, found)
    if found and _difference(model, run, found):
        refused = {group.name: why for group in found if (why := _difference(model, run, [group]))}
        found = [group for group in found if group.name not in refused]
        kept |= refused
    return tuple(found), kept


def with_experts(graph: ChannelGraph) -> ChannelGraph:
    """The graph's groups, and its experts as groups beside them."""
    routers = {member.layer for group in graph.experts for member in group.role("router")}  # rows go with experts
    skipped = {layer: reason for layer, reason in graph.skipped.items() if layer not in routers}
    return replace(graph, groups=(*graph.groups, *graph.experts), skipped=skipped)


def never_chosen(model: nn.Module, groups: Iterable[ChannelGroup], removed: Any) -> Iterator[Any]:
    """Hooks by which routers, whose weights run as layers, give the experts of `removed` (group -> int64 [R]) minus
    infinity."""
    for group in groups:
        for member, index in group.removed_at(removed[group.name]) if group.name in removed else ():
            if member.role == "router":
                yield model.get_submodule(member.layer).register_forward_hook(OwnHook(_without(index)))


def _without(index: Tensor) -> Callable[..., Tensor]:
    return lambda module, args, output: output.index_fill(-1, index.to(output.device), -torch.inf)


def _chooses(module: nn.Module) -> bool:
    """Whether a router takes the `top_k` most probable, by a softmax over all."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return next(module.buffers(), None) is None and code is not None and set(code.co_names) >= _CHOOSES \
        and type(vars(module).get(_CHOSEN)) is int


def _group(block: str, experts: str, router: str, module: nn.Module) -> ChannelGroup | str:
    """The group of a mixture; or why there is none: the router is of other experts, or takes them all."""
    down: Any = module.get_submodule(f"{experts}.{NAMES[1]}").weight
    rows: Any = module.get_submodule(f"{router}.{ROUTER[0]}").weight
    count, least = len(down), int(getattr(module.get_submodule(router), _CHOSEN))
    if len(rows) != count:
        return f"the router beside it chooses among {len(rows)}, and there are {count}"
    if count <= least:
        return "all are chosen for every token"
    every = torch.arange(count)
    whole = {key: f"{block}.{key}".lstrip(".") for key in (experts, router)}
    members = [Member(f"{whole[experts]}.{NAMES[1]}", "expert", down.shape[-1] + every, every),
               *(Member(f"{whole[experts]}.{name}", "tensor", every, every, 0) for name in NAMES),
               Member(f"{whole[router]}.{ROUTER[0]}", "router", every, every)]
    owners = {block: module, **{name: module.get_submodule(key) for key, name in whole.items()}}
    members += [Member(name, "width", every, every, attribute=_COUNT) for name, owner in owners.items()
                if vars(owner).get(_COUNT) == count]
    return ChannelGroup(whole[experts], count, every, tuple(members), least)


def _with_counts_above(model: nn.Module, groups: Sequence[ChannelGroup]) -> ChannelGroup:
    """The first of `groups`, with the number of experts that modules around all of them keep, for a loss that balances
    experts: it is one, and goes down with the first's."""
    first = groups[0]
    if {group.channels for group in groups} != {first.channels}:
        return first
    every = torch.arange(first.channels)
    counts = tuple(Member(name, "width", every, every, attribute=_COUNT) for name, module in model.named_modules()
                   if vars(module).get(_COUNT) == first.channels
                   and all(group.name.rpartition(".")[0] != name and f"{group.name}.".startswith(f"{name}.".lstrip("."))
                           for group in groups)
                   and all(member.layer != name for member in first.members))
    return replace(first, members=first.members + counts)


def _difference(model: nn.Module, run: Callable[[nn.Module], Tensor], groups: Sequence[ChannelGroup]) -> str:
    """Why some experts of all groups, or then others, cannot go; empty where the model runs without them, and computes
    what it does where none of them is chosen."""
    for last in (False, True):
        gone = {}
        for group in groups:
            order = torch.randperm(group.channels, generator=torch.Generator().manual_seed(0))
            gone[group.name] = (order.flip(0) if last else order)[:(group.channels - group.least + 1) // 2]
        try:
            with torch.no_grad():
                small = surgery.remove_channels(evaluation_copy(model), groups, gone)
                rng.start_over(device_of(model))
                got = run(small)
                with put_on(never_chosen(model, groups, gone)):
                    rng.start_over(device_of(model))
                    want = run(model)
        except Exception as error:  # whatever the model's code does with fewer of them
            return f"{type(model).__name__} does not run with fewer experts ({said(error)})"
        # a router of fewer rows rounds otherwise
        if not all_close(got, want, rounding=torch.finfo(want.dtype).eps ** (1 / 3)):
            return f"{type(model).__name__} computes something else with fewer experts"
    return ""
