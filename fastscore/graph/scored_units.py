"""What is scored of a model beside, or in the place of, its channels: see `units` of fastscore.score."""

from collections.abc import Callable, Mapping

from torch import nn

from fastscore.graph.blocks import with_blocks
from fastscore.graph.groups import ChannelGraph, Units, norm_gates
from fastscore.graph.head_dims import with_head_dims, with_heads_and_dims
from fastscore.graph.whole_experts import with_experts

# units -> the graph with what they add to the groups, or put in their place
_WITH: Mapping[str, Callable[[ChannelGraph], ChannelGraph]] = {"head_dims": with_head_dims, "experts": with_experts,
                                                                 "blocks": with_blocks,
                                                                 "heads_and_dims": with_heads_and_dims}
_LOOKED_FOR: Mapping[str, str] = {"heads_and_dims": "head_dims"}  # where it is called otherwise than the units


def searched(units: Units) -> frozenset[str]:
    """What a trace has to look for: see ChannelGraph.searched."""
    return frozenset({_LOOKED_FOR.get(units, units)} & _WITH.keys())


def of_graph(model: nn.Module, graph: ChannelGraph, units: Units) -> ChannelGraph:
    """The graph whose groups are what is scored.

    Raises:
        ValueError: the graph was traced for other units.
    """
    if missing := searched(units) - graph.searched:
        raise ValueError(f"units: {units!r}, and the graph was traced without {' and '.join(sorted(missing))}: give "
                         f"trace(model, example_inputs, units={units!r})")
    if units == "norms":
        return norm_gates(model, graph)
    return _WITH[units](graph) if units in _WITH else graph
