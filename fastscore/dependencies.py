"""What Torch-Pruning's tracer knows about a model: which node follows which, and where channels lie in each."""

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch_pruning as tp

OPTYPE = tp.ops.OPTYPE
# What a group may pass through, and the part it plays there. A depthwise convolution and a normalisation work on each
# channel alone: they lose the channel, but neither make it nor end it.
CHANNELWISE = {OPTYPE.DEPTHWISE_CONV, OPTYPE.BN, OPTYPE.GN, OPTYPE.IN, OPTYPE.PRELU}
LAYERS = {OPTYPE.CONV, OPTYPE.LINEAR}
TRANSPARENT = {OPTYPE.ELEMENTWISE, OPTYPE.CONCAT, OPTYPE.SPLIT, OPTYPE.RESHAPE, OPTYPE.UNBIND, OPTYPE.EXPAND,
               OPTYPE.SLICE}

# (node, pruning function) -> int64 [M, 2]: (position in the node's output or input, channel of the root)
Places: TypeAlias = Mapping[tuple[Any, Any], np.ndarray]


def order_splits(graph: Any) -> None:
    """Torch-Pruning numbers the parts of a split in the order it meets them; autograd knows which is which."""
    for node in graph.module2node.values():
        if node.type != OPTYPE.SPLIT or not hasattr(node.grad_fn, "_saved_split_size"):
            continue
        size = node.grad_fn._saved_split_size
        for target in set(node.outputs):
            parts = [part for function, part in target.grad_fn.next_functions if function is node.grad_fn]
            there = [dependency for dependency in node.dependencies if dependency.target is target]
            back = [dependency for dependency in target.dependencies if dependency.target is node]
            for reverse, dependencies in ((False, there), (True, back)):
                for part, dependency in zip(parts, dependencies, strict=False):
                    if dependency.index_mapping[0] is not None:  # None: not split along the channels
                        dependency.index_mapping[0] = tp.dependency.index_mapping._SplitIndexMapping(
                            offset=[part * size, (part + 1) * size], reverse=reverse)


def normalized_by(graph: Any) -> dict[str, str]:
    pairs = ((node, node.outputs[0]) for node in graph.module2node.values()
             if node.type in LAYERS | {OPTYPE.DEPTHWISE_CONV} and len(node.outputs) == 1)
    return {graph._module2name[layer.module]: graph._module2name[norm.module] for layer, norm in pairs
            if norm.type == OPTYPE.BN and norm.inputs == [layer]}


class IndexTables:
    """A dependency's index mapping as an array of (position in the target, position in the source), made once."""

    def __init__(self) -> None:
        self._tables: dict[int, tuple[int, np.ndarray]] = {}  # id(dependency) -> (positions covered, table)

    def apply(self, dependency: Any, places: np.ndarray) -> np.ndarray:
        """[M, 2] (position in the source, channel) -> [M', 2] (position in the target, channel)."""
        mappings = [mapping for mapping in dependency.index_mapping if mapping is not None]
        if not mappings:
            return places
        needed = 1 << int(places[:, 0].max()).bit_length()  # in powers of two, not to make a table anew for each width
        covered, table = self._tables.get(id(dependency), (0, np.empty((0, 2), dtype=np.int64)))
        if covered < needed:
            indices = [tp._helpers._HybridIndex(idx=i, root_idx=i) for i in range(needed)]
            for mapping in mappings:
                indices = mapping(indices)
            table = np.array([(i.idx, i.root_idx) for i in indices], dtype=np.int64).reshape(-1, 2)
            table = table[np.argsort(table[:, 1], kind="stable")]
            self._tables[id(dependency)] = needed, table
        begin = np.searchsorted(table[:, 1], places[:, 0], side="left")
        count = np.searchsorted(table[:, 1], places[:, 0], side="right") - begin
        row = np.repeat(begin, count) + np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
        return np.stack([table[row, 0], np.repeat(places[:, 1], count)], axis=1)


def places_of(root: Any, pruner: Any, tables: IndexTables) -> Places:
    """(node, pruning function) -> [M, 2] (position, channel of the root), for everything the root's channels touch."""
    channels = np.arange(pruner.get_out_channels(root.module))
    places: dict[tuple[Any, Any], np.ndarray] = {}
    work = [(root, pruner.prune_out_channels, np.stack([channels, channels], axis=1))]
    while work:
        node, function, arrived = work.pop()
        known = places.get((node, function))
        merged = _distinct(arrived if known is None else np.concatenate([known, arrived]))
        if known is not None and len(merged) == len(known):
            continue
        places[node, function] = merged
        for dependency in node.dependencies:
            if dependency.is_triggered_by(function):
                onward = tables.apply(dependency, merged)
                if len(onward):
                    work.append((dependency.target, dependency.handler, onward))
    return places


def _distinct(places: np.ndarray) -> np.ndarray:
    """The distinct rows of [M, 2], in order of position and channel."""
    both = np.unique(places[:, 0] << 32 | places[:, 1])  # one integer a row: sorted ten times as fast as rows
    return np.stack([both >> 32, both & 0xFFFFFFFF], axis=1)


def chunks(places: Places) -> Iterator[tuple[int, np.ndarray]]:
    """(width of a part, places) for each split into equal parts."""
    return ((node.grad_fn._saved_split_size, at) for (node, _), at in places.items()
            if node.type == OPTYPE.SPLIT and hasattr(node.grad_fn, "_saved_split_size"))
