"""Attentions of which names say nothing: their heads, as fastscore.graph.heads.heads_by_use finds them, tried as all
others are (see fastscore.graph.heads.attention)."""

import itertools
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from fastscore.graph.groups import ChannelGroup
from fastscore.graph.heads import attention, attention_calls, given_biases, head_dims, head_numbers, heads_by_use
from fastscore.graph.heads.attention_calls import Call, randomized
from fastscore.graph.heads.found_heads import Found
from fastscore.modules.inspection import parameter_owners

_MIXED = "its heads read each other"
_UNNAMED = "no layers make queries, keys and values, and nothing else, of its heads one after another"


def find(model: nn.Module, run: Callable[[nn.Module], Any], products: Mapping[tuple[nn.Module, ...], Collection[int]],
         divided: Collection[str], unused: Container[str], named: Found, dims: bool = False) -> Found:
    """Heads beside those of `named`, which are known; and why others are kept, whose names may have shown them.

    products: modules whose code multiplies activations, the innermost first -> the sizes of what it multiplies.
    divided: layers whose channels a view divides, or code cuts, as it does those of heads. unused: those that the
    output does not depend on. dims: look for the dimensions of heads, too.
    """
    every, names = Found(), {module: name for name, module in model.named_modules()}
    done = {model.get_submodule(each.layer) for group in named.groups for each in group.role("heads")}
    made = {member.layer for group in named.groups for member in group.role("producer")}
    left = {*divided} - {member.layer for group in named.groups for member in group.role("producer", "consumer")}

    def under(module: nn.Module, layers: Collection[str]) -> bool:
        inside = f"{names[module]}." if names.get(module) else ""
        return module in names and any(f"{layer}.".startswith(inside) for layer in layers)

    def sizes_of(module: nn.Module) -> set[int]:
        """Of products that may be of a module's own heads: of its code, or of what it calls, but of modules that are
        done; where some are in it, of its own layers' alone."""
        sizes = set[int]()
        for modules, of_product in products.items() if under(module, left) else ():
            inner = modules[:modules.index(module)] if module in modules else None
            if inner is not None and done.isdisjoint(inner) and not (
                    any(under(each, left) for each in inner) and under(module, [names[each] for each in done])):
                sizes.update(of_product)
        return sizes

    # those within others first
    modules = sorted({module: None for calling in products for module in calling
                      if module in names and sizes_of(module)},
                     key=lambda module: len(names[module].split(".")) if names[module] else 0, reverse=True)
    if not modules:
        return every
    calls = attention_calls.record(model, {names[module]: 0 for module in modules}, run)
    owners = parameter_owners(model)
    known = dict[Any, list[ChannelGroup | list[str]]]()  # of modules that are built alike
    tried = dict[Any, list[ChannelGroup | str]]()  # of those that are called alike: they have the same random weights
    kind_of = head_numbers.kinds({names[module]: module for module in modules})
    for module in modules:
        name, sizes = names[module], sizes_of(module)
        if name not in calls.of or not sizes:
            continue
        kind = kind_of[name]
        if kind not in known:
            inside = [names[each].removeprefix(f"{name}.") for each in done if each is not module and
                      under(module, [names[each]])]
            known[kind] = heads_by_use.find(module, calls.of[name], sizes, inside)
            if name in calls.again and any(isinstance(likely, list) for likely in known[kind]):
                # that of several keys, where the first is of one; it is given keys of all heads, and shows no fewer
                last = attention_calls.record(model, {name: 0}, run, last=True).of[name]
                known[kind] = heads_by_use.find(module, last, sizes, inside) or known[kind]
        call = calls.of[name]
        for likely in (each for each in known[kind] if isinstance(each, list)):
            layers = [f"{name}.{layer}" if name else layer for layer in likely]
            layers = [layer for layer in layers if layer in divided] or layers  # not those that they read
            every.skipped |= dict.fromkeys(layers[:1], _MIXED)
            every.tie(layers)
            left.difference_update(layers)
            done.add(module)
        groups = [each for each in known[kind] if isinstance(each, ChannelGroup)]
        if not groups:
            continue
        done.add(module)
        for group in groups:
            left.difference_update(member.layer for member in attention.within(name, group).role("producer"))
        if (kind, call.kind) not in tried:
            tried[kind, call.kind] = _tried(module, groups, call, owners)
        found = tried[kind, call.kind]
        for group, result in zip(groups, found, strict=True):
            whole = attention.within(name, result if isinstance(result, ChannelGroup) else group)
            if any(edge.layer in unused for edge in whole.edges) or not made.isdisjoint(
                    member.layer for member in whole.role("producer")):
                continue
            if isinstance(result, str):
                every.skipped[whole.name] = result
                every.tie(member.layer for member in whole.role("producer"))
            elif whole.name not in (each.name for each in every.groups):  # of several, that go together
                every.groups.append(whole)
                if dims:
                    _find_dims(every, name, module, result, call)
    return every


def _tried(module: nn.Module, groups: Sequence[ChannelGroup], call: Call, owners: Mapping[int, int]
           ) -> list[ChannelGroup | str]:
    """For each group of heads of a module, of layers named from there, that which goes; or why it does not. Those that
    do not go one by one may go together, where one number counts the heads of all."""
    def attempt(group: ChannelGroup, but: Collection[ChannelGroup]) -> ChannelGroup | str:
        beside = [edge.layer for other in groups if all(other is not each for each in but)
                  for edge in other.role("consumer")]
        if why := attention.computed(module, group, owners):
            return why
        fails = partial(attention.difference, module, call=call, known={}, beside=beside)
        result = head_numbers.with_numbers(module, group, fails)
        given = given_biases.with_arguments(module, group, call) if isinstance(result, str) else None
        read = result if given is None else head_numbers.with_numbers(module, given, fails)
        return read if isinstance(read, ChannelGroup) else result

    found = [attempt(group, [group]) for group in groups]
    rest = [group for group, result in zip(groups, found, strict=True) if isinstance(result, str)]
    if len(rest) > 1 and all(torch.equal(group.unit, rest[0].unit) for group in rest):
        more = (member for group in rest[1:] for member in group.members if member.role != "heads")
        together = attempt(replace(rest[0], members=(*rest[0].members, *more)), rest)
        if isinstance(together, ChannelGroup):
            found = [together if isinstance(result, str) else result for result in found]
    return found


def _find_dims(every: Found, name: str, module: nn.Module, heads: ChannelGroup, call: Call) -> None:
    """Note the dimensions of the heads of a module, of layers named from there; or why there are none."""
    reason = ""
    for projections in _projections(heads):
        found = head_dims.find(heads.name, module, projections, call, randomized)
        if isinstance(found, ChannelGroup):
            every.head_dims.append(whole := attention.within(name, found))
            if why := head_dims.beside(module, found, heads, call, randomized):
                every.not_both[whole.name] = why
            return
        reason = reason or found
    every.whole_heads[attention.within(name, heads).name] = reason or _UNNAMED


def _projections(group: ChannelGroup) -> Iterator[head_dims.Projections]:
    """Which layers may make queries, keys and values, by how many outputs they have and which heads these are of."""
    count, shared = len(next(group.role("heads")).index), head_numbers.units_of(group)
    width = group.channels // count
    outputs = tuple(edge.layer for edge in group.role("consumer") if len(edge.index) == group.channels)
    if count % shared or not torch.equal(group.unit, torch.arange(group.channels) // (width * (count // shared))):
        return
    every, once = group.unit, torch.arange(shared).repeat_interleave(width)
    kinds = {"queries": every, "keys or values": once, "both": torch.cat([once, once]),
             "all": torch.cat([every, once, once])}
    made: dict[str, list[str]] = {kind: [] for kind in kinds}
    for member in group.role("producer"):
        rows, owner = torch.arange(len(member.index)), group.unit[member.channel]
        if not torch.equal(member.index, rows):
            continue
        for kind, units in kinds.items():
            if torch.equal(owner, units):
                made[kind].append(member.layer)
        if shared == count and len(rows) == 3 * len(every) and torch.equal(owner, rows // (3 * width)):
            layer = member.layer
            yield head_dims.Projections((layer, layer, layer), count, shared, width, outputs, by_head=True)
    ways = [(layer, layer, layer) for layer in made["all"]]
    ways += [(one, two, two) for one, two in itertools.product(made["queries"], made["both"])]
    if shared == count:  # one of these may as well make two of the three, one after the other
        ways += [(two, two, one) for one, two in itertools.product(made["queries"], made["both"])]
    for query, key, value in itertools.product(made["queries"], *[made["keys or values"]] * 2):
        if len({query, key, value}) == 3 and (shared < count or query < key):  # queries for keys are the same
            ways.append((query, key, value))
    for layers in ways:
        yield head_dims.Projections(layers, count, shared, width, outputs)
