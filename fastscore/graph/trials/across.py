"""Layers that work along another dimension than that of channels, as those that mix tokens do: where all they do is
done to each channel alone, channels pass them. What the groups would be then is tried by surgery: those go that may.
"""

import math
from collections.abc import Callable, Collection, Container, Sequence, Set
from typing import Any

from fastscore.graph.following import index_maps
from fastscore.graph.following.cuts import shape
from fastscore.graph.following.dependencies import Graph
from fastscore.graph.following.nodes import CHANNELWISE, NORM, PRODUCERS, TRANSPARENT, reading_dim
from fastscore.graph.groups import ChannelGraph, ChannelGroup
from fastscore.graph.layer_types import OPTYPE
from fastscore.graph.trials import surgery_trial, verification
from fastscore.graph.trials.cut_otherwise import with_groups
from fastscore.graph.trials.recording import Recording


def guesses(graph: Graph, recording: Recording, groups_of: Callable[[Collection[str]], ChannelGraph]
            ) -> tuple[list[ChannelGroup], set[str]]:
    """What the groups would be of which channels come to layers along another dimension, if they passed these.

    graph: changed, where there are any. groups_of: (layers) -> the groups of what they make, as `graph` has them.
    Returns (these groups, the layers that they pass).
    """
    roots, passed, divided, seen = set[Any](), set[Any](), dict[Any, int](), set[tuple[Any, int]]()
    layers = (graph.module2node.get(recording.layers[name]) for name in recording.order)
    for root in [node for node in layers if node is not None and node.type in PRODUCERS]:
        its, views = (set[Any](), {}) if root in passed else _passed(graph, root, seen)
        if its and roots.isdisjoint(its):  # what one passes is passed for good
            roots.add(root)
            passed |= its
            divided |= views
    names = [{graph.name_of(node) for node in nodes} for nodes in (roots, passed)]
    if passed:
        graph.pass_by(passed, divided)
    return list(groups_of(names[0]).groups) if passed else [], names[1]


def that_go(recording: Recording, graph: ChannelGraph, guesses: Sequence[ChannelGroup], passed: Set[str]
            ) -> ChannelGraph:
    """The graph, whose groups were tried and can go, with those of `guesses` that can, too. passed: the layers that
    these pass, of which others lose channels in trials of their own."""
    beside = [group for group in graph.groups if passed.isdisjoint(member.layer for member in group.members)]
    made = {member.layer for group in graph.groups for member in group.role("producer")}
    with recording.computing(passed):
        left = [group for group in guesses if made.isdisjoint(member.layer for member in group.role("producer"))]
        left = _less(left, verification.leaks(recording, left))
        left = _less(left, verification.leaks(recording, left, chosen=True))
        refused = surgery_trial.refusals(recording, [*beside, *left]) if left else {}
    return graph if any(group.name in refused for group in beside) else with_groups(graph, _less(left, refused))


def _less(groups: Sequence[ChannelGroup], names: Container[str]) -> list[ChannelGroup]:
    return [group for group in groups if group.name not in names]


def _passed(graph: Graph, root: Any, seen: set[tuple[Any, int]]) -> tuple[set[Any], dict[Any, int]]:
    """(the layers that what `root` makes comes to along another dimension than that which they read; each view that
    divides its channels over several dimensions -> the one that holds them then). seen: (node, the dimension of the
    channels there) that need no second look, to which more are added."""
    found, divided = set[Any](), dict[Any, int]()
    dims = {root: reading_dim(root, len(shape(root)))}
    work = [root] if dims[root] in range(len(shape(root))) else []
    # how many channels there are, and places of each side by side, without what a view puts before them, as samples
    widths = {node: (shape(node)[dims[node]], 1) for node in work}
    while work:
        node = work.pop()
        for onward in node.outputs:
            if onward in dims or onward.type not in PRODUCERS | CHANNELWISE | {NORM} | TRANSPARENT:
                continue
            before, after, (width, inner) = shape(node), shape(onward), widths[node]
            across = onward.type not in TRANSPARENT and not hasattr(onward, "dim_is_known") and \
                dims[node] != reading_dim(onward, len(before))
            if not _each_alone(onward) if across else onward.type in PRODUCERS:
                continue
            dim = graph.dim_after(node, onward, dims[node])
            behind = inner * math.prod(before[dims[node] + 1:])
            if dim is None:
                dim = next((at for at, size in enumerate(after) if size == width and behind == math.prod(after[at + 1:])
                            and index_maps.divided(dims[node], before, at, after) is not None), len(after))
                divided[onward], inner = dim, 1
            elif onward.type == OPTYPE.RESHAPE and dim < len(after):
                inner = behind // math.prod(after[dim + 1:])
            if dim < len(after) and (onward, dim) not in seen:
                seen.add((onward, dim))
                dims[onward] = dim
                made = width if onward.type == OPTYPE.RESHAPE else width * after[dim] // max(before[dims[node]], 1)
                widths[onward] = made, inner
                work.append(onward)
                if across:
                    found.add(onward)
    return found, {view: dim for view, dim in divided.items() if view in dims}


def _each_alone(node: Any) -> bool:
    """Whether a layer works on each place along the dimensions alone that it neither reads nor normalises over."""
    return node.type not in (OPTYPE.CONV, OPTYPE.DEPTHWISE_CONV) or \
        set(node.module.kernel_size) | set(node.module.stride) <= {1}
