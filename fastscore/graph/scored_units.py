"""What is scored of a model beside, or in the place of, its channels: see `units` of fastscore.score."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TypeAlias

from torch import nn

from fastscore.graph.blocks import with_blocks
from fastscore.graph.groups import ChannelGraph, norm_gates
from fastscore.graph.heads.head_dims import with_head_dims, with_heads_and_dims
from fastscore.graph.whole_experts import with_experts

Units: TypeAlias = str | Iterable[str]  # one of UNITS, or several

# units -> the graph with what they add to the groups, or put in their place: of several, one after the other
_WITH: Mapping[str, Callable[[ChannelGraph], ChannelGraph]] = {"head_dims": with_head_dims,
                                                                 "heads_and_dims": with_heads_and_dims,
                                                                 "experts": with_experts, "blocks": with_blocks}
# behind the name of what is kept, in what is skipped
WHOLE: Mapping[str, str] = {"experts": " (whole experts)", "blocks": " (whole branch)"}
_LOOKED_FOR: Mapping[str, str] = {"heads_and_dims": "head_dims"}  # where it is called otherwise than the units
_CHANNELS, _NORMS = "groups", "norms"  # which are there with all of these; which stand alone
UNITS = (_CHANNELS, *_WITH, _NORMS)
_BETWEEN = "+"


def named(units: Units) -> str:
    """What several units are called together, whatever their order: "experts+blocks"; one by its own name. Raises
    ValueError where there are none of that name, or they do not go together."""
    given = (units,) if isinstance(units, str) or not isinstance(units, Iterable) else tuple(units)
    names = {part.strip() for each in given for part in str(each).split(_BETWEEN)}
    if not names or names - set(UNITS):
        raise ValueError(f"units: {units!r} is none of {', '.join(UNITS)}, nor several of them, "
                         'such as "blocks+heads_and_dims"')
    if len(names) > 1 and _NORMS in names:
        raise ValueError(f'units: {units!r}; "norms" are other units than channels and stand alone: leave them, or the '
                         "others, out")
    if {"head_dims", "heads_and_dims"} <= names:
        raise ValueError(f'units: {units!r}; "head_dims" are scored in the place of whole heads, and "heads_and_dims" '
                         "beside them: leave one out")
    return _BETWEEN.join(name for name in (*_WITH, _NORMS) if name in names) or _CHANNELS


def among(units: str) -> frozenset[str]:
    """The units that `named` has put together."""
    return frozenset(units.split(_BETWEEN))


def searched(units: Units) -> frozenset[str]:
    """What a trace has to look for: see ChannelGraph.searched."""
    return frozenset(_LOOKED_FOR.get(each, each) for each in among(named(units)) - {_CHANNELS})


def of_graph(model: nn.Module, graph: ChannelGraph, units: Units) -> ChannelGraph:
    """The graph whose groups are what is scored. Raises ValueError where the graph was traced for other units."""
    units = named(units)
    if missing := searched(units) - graph.searched:
        raise ValueError(f"units: {units!r}, and the graph was traced without {' and '.join(sorted(missing))}: give "
                         f"trace(model, example_inputs, units={units!r})")
    for name, with_units in _WITH.items():
        if name in among(units):
            kept = {each + WHOLE[name]: reason for each, reason in graph.kept_whole.get(name, {}).items()}
            graph = with_units(graph)
            graph = replace(graph, skipped={**graph.skipped, **kept})
    return norm_gates(model, graph) if units == _NORMS else graph
