"""Whole experts of a mixture, as transformers holds them: each with its row of the router that chooses among them.

Where experts are gone, the router chooses among the others: the smaller model is the one whose router gives those that
went minus infinity. A gate on an expert says what it adds where it is chosen.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastscore.graph.cutting import surgery
from fastscore.graph.groups import ChannelGraph, ChannelGroup, Member
from fastscore.graph.trials.differences import close
from fastscore.modules.evaluation_copy import evaluation_copy
from fastscore.modules.hooks import OwnHook
from fastscore.modules.weights.experts import NAMES, ROUTER, ExpertLinear, RouterLinear

_CHOOSES = {"softmax", "topk"}  # what the code of a router calls that takes no expert of probability zero
_COUNT, _CHOSEN = "num_experts", "top_k"


def find(model: nn.Module, run: Callable[[nn.Module], Tensor]) -> tuple[ChannelGroup, ...]:
    """The mixtures of a model, a group of their experts each.

    Args:
        model: an evaluation copy.
        run: (model) -> its output, on an example.

    Returns:
        Those whose experts can go: the model runs without some, and computes what it does where the router gives them
        minus infinity.
    """
    found: list[ChannelGroup] = []
    for name, block in model.named_modules():
        routers = {key: child for key, child in block._modules.items() if child is not None and _chooses(child)}
        for key, experts in block._modules.items():
            down = None if experts is None else experts._modules.get(NAMES[1])
            if isinstance(down, ExpertLinear) and experts is not None and len(routers) == 1:
                group = _group(name, key, next(iter(routers)), block)
                if group is not None:
                    found.append(group)
    if found and not _same_without(model, run, found):
        found = [group for group in found if _same_without(model, run, [group])]
    return tuple(found)


def with_experts(graph: ChannelGraph) -> ChannelGraph:
    """The graph's groups, and its experts as groups beside them."""
    return replace(graph, groups=(*graph.groups, *graph.experts))


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
    """Whether it is a router that takes the `top_k` most probable, by a softmax over all."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return isinstance(module._modules.get(ROUTER[0]), RouterLinear) and next(module.buffers(), None) is None \
        and code is not None and set(code.co_names) >= _CHOOSES and type(vars(module).get(_CHOSEN)) is int


def _group(block: str, experts: str, router: str, module: nn.Module) -> ChannelGroup | None:
    """The group of a mixture; None where the router is of other experts, or takes them all."""
    down: Any = module.get_submodule(f"{experts}.{NAMES[1]}").weight
    rows: Any = module.get_submodule(f"{router}.{ROUTER[0]}").weight
    count, least = len(down), int(getattr(module.get_submodule(router), _CHOSEN))
    if len(rows) != count or count <= least:
        return None
    every = torch.arange(count)
    whole = {key: f"{block}.{key}".lstrip(".") for key in (experts, router)}
    members = [Member(f"{whole[experts]}.{NAMES[1]}", "expert", down.shape[-1] + every, every),
               *(Member(f"{whole[experts]}.{name}", "tensor", every, every, 0) for name in NAMES),
               Member(f"{whole[router]}.{ROUTER[0]}", "router", every, every)]
    owners = {block: module, **{name: module.get_submodule(key) for key, name in whole.items()}}
    members += [Member(name, "width", every, every, attribute=_COUNT) for name, owner in owners.items()
                if vars(owner).get(_COUNT) == count]
    return ChannelGroup(whole[experts], count, every, tuple(members), least)


def _same_without(model: nn.Module, run: Callable[[nn.Module], Tensor], groups: Sequence[ChannelGroup]) -> bool:
    """Whether the model runs without some experts of all groups, and then others, and computes what it does where none
    of them is chosen."""
    handles: list[Any] = []
    for last in (False, True):
        gone = {}
        for group in groups:
            order = torch.randperm(group.channels, generator=torch.Generator().manual_seed(0))
            gone[group.name] = (order.flip(0) if last else order)[:(group.channels - group.least + 1) // 2]
        try:
            with torch.no_grad():
                small = surgery.remove_channels(evaluation_copy(model), groups, gone)
                torch.manual_seed(0)
                got = run(small)
                handles += never_chosen(model, groups, gone)
                torch.manual_seed(0)
                want = run(model)
        except Exception:  # whatever the model's code does with fewer of them
            return False
        finally:
            for handle in handles:
                handle.remove()
        # a router of fewer rows rounds otherwise
        if got.shape != want.shape or not close(got, want, rounding=torch.finfo(want.dtype).eps ** (1 / 3)).all():
            return False
    return True
