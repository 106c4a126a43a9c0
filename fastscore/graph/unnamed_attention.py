"""Attentions of which names say nothing: their heads, as fastscore.graph.heads_by_use finds them, tried as all others
are (see fastscore.graph.attention)."""

import itertools
from collections.abc import Callable, Collection, Container, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from fastscore.graph import attention, attention_calls, head_dims, head_numbers, heads_by_use
from fastscore.graph.attention_calls import Call, randomized
from fastscore.graph.found_heads import Found
from fastscore.graph.groups import ChannelGroup
from fastscore.modules.inspection import parameter_owners

_MIXED = "its heads read each other"
_UNNAMED = "the names of its layers do not say which make queries, keys and values"


def find(model: nn.Module, run: Callable[[nn.Module], Any], products: Mapping[nn.Module, Collection[int]],
         divided: Collection[str], unused: Container[str], named: Found, dims: bool = False) -> Found:
    """Heads beside those of `named`; and why others are kept, whose names may have shown them.

    Args:
        model: an evaluation copy.
        run: run(model) runs it on example inputs.
        products: modules whose code multiplies activations -> the sizes of what it multiplies.
        divided: layers whose channels a view divides, as it does those of heads.
        unused: layers that the output does not depend on.
        named: heads that are known.
        dims: look for the dimensions of heads, too.
    """
    every = Found()
    taken = [member.layer for group in named.groups for member in group.role("consumer")]

    def holds(name: str, layers: Collection[str]) -> bool:
        return any(f"{layer}.".startswith(f"{name}." if name else "") for layer in layers)

    sizes = {name: products[module] for name, module in model.named_modules() if module in products
             and holds(name, divided) and not holds(name, taken)}
    if not sizes:
        return every
    calls, owners = attention_calls.record(model, dict.fromkeys(sizes, 0), run).of, parameter_owners(model)
    done = list[str]()
    failed = dict[Any, str]()
    known = dict[Any, ChannelGroup | list[str] | None]()  # of modules that are built alike
    borne_out = set[Any]()  # kinds of modules, and of calls: those have the same random weights, and are tried once
    kind_of = head_numbers.kinds({name: model.get_submodule(name) for name in sizes})
    # those within others first
    for name in sorted(sizes, key=lambda name: len(name.split(".")) if name else 0, reverse=True):
        if holds(name, done) or name not in calls:
            continue
        module, call = model.get_submodule(name), calls[name]
        key = kind_of[name]
        likely = known[key] if key in known else heads_by_use.find(module, call, sizes[name])
        known[key] = likely
        if likely is None:
            continue
        done.append(name)
        if isinstance(likely, list):
            layers = [f"{name}.{layer}" if name else layer for layer in likely]
            every.skipped |= dict.fromkeys(layers[:1], _MIXED)
            every.tie(layers)
            continue
        whole = attention.within(name, likely)
        if any(edge.layer in unused for edge in whole.edges):
            continue
        found = failed.get(key) or attention.computed(module, likely, owners) or (
            likely if (key, call.kind) in borne_out else head_numbers.with_numbers(
                module, likely, partial(attention.difference, module, call=call, known={})))
        if isinstance(found, ChannelGroup):
            known[key] = found
            borne_out.add((key, call.kind))
            every.groups.append(attention.within(name, found))
            if not (dims and _find_dims(every, name, module, found, call)):
                every.whole_heads[whole.name] = _UNNAMED
        else:
            every.skipped[whole.name] = failed[key] = found
            every.tie(member.layer for member in whole.role("producer"))
    return every


def _find_dims(every: Found, name: str, module: nn.Module, heads: ChannelGroup, call: Call) -> bool:
    """Note the dimensions of the heads of a module, of layers named from there; whether there are any."""
    for projections in _projections(heads):
        found = head_dims.find(heads.name, module, projections, call, randomized)
        if isinstance(found, ChannelGroup):
            every.head_dims.append(whole := attention.within(name, found))
            if why := head_dims.beside(module, found, heads, call, randomized):
                every.not_both[whole.name] = why
            return True
    return False


def _projections(group: ChannelGroup) -> Iterator[head_dims.Projections]:
    """Which layers may make queries, keys and values, by how many outputs they have and which heads these are of."""
    count, units = len(next(group.role("heads")).index), int(group.unit.max()) + 1
    width = group.channels // count
    outputs = tuple(edge.layer for edge in group.role("consumer") if len(edge.index) == group.channels)
    if units != count or not torch.equal(group.unit, torch.arange(group.channels) // width):
        return
    layers: dict[str, int] = {}  # -> how many of queries, keys and values it makes, one after another
    for member in group.role("producer"):
        parts, rest = divmod(len(member.index), group.channels)
        rows, owner = torch.arange(len(member.index)), group.unit[member.channel]
        if rest or not torch.equal(member.index, rows):
            continue
        if parts == 3 and torch.equal(owner, rows // (3 * width)):
            layer = member.layer
            yield head_dims.Projections((layer, layer, layer), count, count, width, outputs, by_head=True)
        elif torch.equal(owner, rows // width % count):
            layers[member.layer] = parts
    for size in range(1, 4):
        for chosen in itertools.permutations(layers, size):
            made = tuple(layer for layer in chosen for _ in range(layers[layer]))
            if len(made) == 3 and (size < 3 or chosen[0] < chosen[1]):  # queries for keys are the same
                yield head_dims.Projections((made[0], made[1], made[2]), count, count, width, outputs)
