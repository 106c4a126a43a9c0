"""Tensors that hold the channels of one layer along one dimension and those of another along another: outer products of
vectors, those of keys and values in linear attention. Channels are followed along one of both."""

from collections.abc import Iterable
from typing import Any

from fastscore.graph.following import contractions, index_maps
from fastscore.graph.following.cuts import LAYERS, shape
from fastscore.graph.following.nodes import PRODUCERS, Nodes
from fastscore.graph.layer_types import OPTYPE


def at(graph: Nodes, source: Any, node: Any) -> int | None:
    """The dimension of a node's output along which the channels of its input `source` lie, where those of others lie
    along another that is followed; None where none do."""
    held, before = graph.dim_of(node), graph.dim_of(source)
    if held is None or before is None or node.type != OPTYPE.ELEMENTWISE or contractions.summed(graph, source, node):
        return None
    if not (contractions.known(node) or index_maps.is_broadcast(node.grad_fn, held, shape(source))):
        return None  # a sum of what layers make along different dimensions has all of both in every place
    found = graph.dim_after(source, node)
    sizes = shape(node)
    return found if found is not None and found != held and found < len(sizes) and sizes[found] > 1 and \
        shape(source)[before] == sizes[found] else None


def that_end(graph: Nodes, crossings: Iterable[tuple[Any, Any]]) -> dict[Any, int]:
    """Node -> the other of its dimensions, where the channels end that are followed, and the others may not.

    crossings: (a node, an input of it whose channels lie along another dimension than those that are followed).
    """
    return {node: other for source, node in crossings
            if (other := at(graph, source, node)) is not None and _all_end(graph, node)}


def _all_end(graph: Nodes, node: Any) -> bool:
    """Whether all channels that are followed from a node end in sums over them, or where others are followed or
    read."""
    work, seen = [node], set[Any]()
    while work:
        node = work.pop()
        dim = graph.dim_of(node)
        if not node.outputs or dim is None:
            return False
        for onward in node.outputs:
            if onward in seen or contractions.summed(graph, node, onward) or at(graph, node, onward) is not None or \
                    index_maps.runs_over(onward.grad_fn, dim, len(shape(node))):
                continue
            if onward.type in LAYERS and dim != len(shape(node)) - 1 - len(getattr(onward.module, "kernel_size", ())):
                continue  # which reads other channels
            if onward.type in PRODUCERS | {OPTYPE.OUTPUT} or graph.dim_of(onward) is None:
                return False
            seen.add(onward)
            work.append(onward)
    return True
