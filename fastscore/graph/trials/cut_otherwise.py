"""Channels that code cuts at places of which no module keeps a number: `gamma, beta = x.split(y.shape[1], 1)`.

Nobody sees where the code has such places from. They may be fixed; they may be widths of what lies side by side, and
move with them; or shares of the whole, half of it or a quarter; or the width of what the layer reads whose outputs are
cut. What the groups would be is tried by surgery: those go that may.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from fastscore.graph.following import ties
from fastscore.graph.following.dependencies import Graph
from fastscore.graph.groups import READS, TIED, ChannelGraph, ChannelGroup
from fastscore.graph.kept.obstacles import CUT
from fastscore.graph.trials import surgery_trial, verification
from fastscore.graph.trials.recording import Recording


def guesses(graph: Graph, plain: ChannelGraph, groups_of: Callable[[Collection[str]], ChannelGraph]
            ) -> list[ChannelGroup]:
    """What the groups would be that are kept as the code fixes where it cuts their channels, if it did not.

    plain: the groups if it does. groups_of: (layers) -> the groups of what they make, as `graph` has them.
    """
    roots = {name for name, reason in plain.skipped.items() if reason.startswith(CUT)}
    own = roots | {name for name, reason in plain.skipped.items() if reason.removeprefix(TIED) in roots}
    found = list[ChannelGroup]()
    if not roots:
        return found
    for graph.cuts in ("moving", "shares"):
        found += [group for group in groups_of(roots).groups if _producers(group) <= own]
    graph.cuts = "moving"
    with ties.widths_read(graph) as readers:
        streams = {name for group in plain.groups if any(member.layer in readers for member in group.role("consumer"))
                   for name in _producers(group)}
        if readers:
            found += [group for group in groups_of(roots | streams).groups if _producers(group) <= own | streams]
    return found


def that_go(recording: Recording, graph: ChannelGraph, guesses: Sequence[ChannelGroup]) -> ChannelGraph:
    """The graph, whose groups were tried and can go, with those of `guesses` that can, too, the first of each layer."""
    found, made = list[ChannelGroup](), set[tuple[str, int]]().union(*map(_outputs, graph.groups))
    for group in guesses:
        if made.isdisjoint(_outputs(group)) and not verification.leaks(recording, [group]) and \
                not verification.leaks(recording, [group], chosen=True) and \
                not surgery_trial.refusals(recording, [group]) and surgery_trial.go_one_by_one(recording, [group]):
            found.append(group)
            made |= _outputs(group)
    refused = surgery_trial.refusals(recording, [*graph.groups, *found]) if found else {}
    found = [group for group in found if group.name not in refused]
    if not found or any(group.name in refused for group in graph.groups):
        return graph
    return with_groups(graph, found)


def with_groups(graph: ChannelGraph, found: Sequence[ChannelGroup]) -> ChannelGraph:
    """The graph with more groups, whose layers are not kept."""
    names = {member.layer for group in found for member in group.members if member.role not in (*READS, "width")}
    return replace(graph, groups=(*graph.groups, *found),
                   skipped={name: reason for name, reason in graph.skipped.items() if name not in names})


def _producers(group: ChannelGroup) -> set[str]:
    return {member.layer for member in group.role("producer")}


def _outputs(group: ChannelGroup) -> set[tuple[str, int]]:
    return {(member.layer, place) for member in group.role("producer") for place in member.index.tolist()}
