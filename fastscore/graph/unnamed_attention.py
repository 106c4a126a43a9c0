"""Attentions of which names say nothing: their heads, as fastscore.graph.heads_by_use finds them, tried as all others
are (see fastscore.graph.attention)."""

from collections.abc import Callable, Collection, Container, Mapping
from functools import partial
from typing import Any

from torch import nn

from fastscore.graph import attention, attention_calls, head_numbers, heads_by_use
from fastscore.graph.found_heads import Found
from fastscore.graph.groups import ChannelGroup
from fastscore.modules.inspection import parameter_owners

_MIXED = "its heads read each other"
_UNNAMED = "the names of its layers do not say which make queries, keys and values"


def find(model: nn.Module, run: Callable[[nn.Module], Any], products: Mapping[nn.Module, Collection[int]],
         divided: Collection[str], unused: Container[str], named: Found) -> Found:
    """Heads beside those of `named`; and why others are kept, whose names may have shown them.

    Args:
        model: an evaluation copy.
        run: run(model) runs it on example inputs.
        products: modules whose code multiplies activations -> the sizes of what it multiplies.
        divided: layers whose channels a view divides, as it does those of heads.
        unused: layers that the output does not depend on.
        named: heads that are known.
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
    # those within others first
    for name in sorted(sizes, key=lambda name: len(name.split(".")) if name else 0, reverse=True):
        if holds(name, done) or name not in calls:
            continue
        module, call = model.get_submodule(name), calls[name]
        key = head_numbers.built(module)
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
        found = failed.get(key) or attention.computed(module, likely, owners) or head_numbers.with_numbers(
            module, likely, partial(attention.difference, module, call=call))
        if isinstance(found, ChannelGroup):
            known[key] = found
            every.groups.append(attention.within(name, found))
            every.whole_heads[whole.name] = _UNNAMED
        else:
            every.skipped[whole.name] = failed[key] = found
            every.tie(member.layer for member in whole.role("producer"))
    return every
