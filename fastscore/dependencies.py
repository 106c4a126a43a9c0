"""What Torch-Pruning's tracer knows about a model: which node follows which, and where channels lie in each."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch_pruning as tp
from torch_pruning.dependency import index_mapping

OPTYPE = tp.ops.OPTYPE
# What a group may pass through, and the part it plays there. A depthwise convolution and a normalisation work on each
# channel alone: they lose the channel, but neither make it nor end it.
CHANNELWISE = {OPTYPE.DEPTHWISE_CONV, OPTYPE.BN, OPTYPE.GN, OPTYPE.IN, OPTYPE.PRELU}
LAYERS = {OPTYPE.CONV, OPTYPE.LINEAR}
TRANSPARENT = {OPTYPE.ELEMENTWISE, OPTYPE.CONCAT, OPTYPE.SPLIT, OPTYPE.RESHAPE, OPTYPE.UNBIND, OPTYPE.EXPAND,
               OPTYPE.SLICE}

# (node, pruning function) -> int64 [M, 2]: (position in the node's output or input, channel of the root)
Places: TypeAlias = Mapping[tuple[Any, Any], np.ndarray]


class Graph(tp.DependencyGraph):  # type: ignore[misc]
    """Torch-Pruning's graph, where a view that deals channels out (ShuffleNet's) is no plain reshape.

    What follows such a view, up to the next layer, is none either: the tracer, which infers widths from the neighbours,
    would infer wrong ones, or divide by zero.
    """

    def _build_dependency(self, module2node: Mapping[Any, Any]) -> None:
        super()._build_dependency(module2node)
        work = [node for node in module2node.values() if node.type == OPTYPE.RESHAPE and _splits_channels(node)]
        while work:
            node = work.pop()
            if node.type == OPTYPE.RESHAPE or node.type == OPTYPE.ELEMENTWISE and "Transpose" in str(node.module):
                node.type = OPTYPE.CUSTOMIZED
                work += node.outputs


def _splits_channels(node: Any) -> bool:
    """Whether a view makes [N, A, B, H, W] of [N, A x B, H, W]."""
    before = list(getattr(node.grad_fn, "_saved_self_sym_sizes", ()))
    after = list(node.grad_fn._input_metadata[0].shape)  # the backward's input is what the view gave
    return len(before) == 4 and len(after) == 5 and before[2:] == after[3:] and before[1] == after[1] * after[2]


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
                        dependency.index_mapping[0] = index_mapping._SplitIndexMapping(
                            offset=[part * size, (part + 1) * size], reverse=reverse)


def normalized_by(graph: Any) -> dict[str, str]:
    pairs = ((node, node.outputs[0]) for node in graph.module2node.values()
             if node.type in LAYERS | {OPTYPE.DEPTHWISE_CONV} and len(node.outputs) == 1)
    return {graph._module2name[layer.module]: graph._module2name[norm.module] for layer, norm in pairs
            if norm.type == OPTYPE.BN and norm.inputs == [layer]}


def places_of(root: Any, pruner: Any) -> Places:
    """(node, pruning function) -> [M, 2] (position, channel of the root), for everything the root's channels touch."""
    channels = np.arange(pruner.get_out_channels(root.module))
    places: dict[tuple[Any, Any], np.ndarray] = {}
    work = [(root, pruner.prune_out_channels, channels << 32 | channels)]
    while work:
        node, function, arrived = work.pop()
        known = places.get((node, function))
        if known is None:
            new = places[node, function] = arrived
        else:
            new = np.setdiff1d(arrived, known, assume_unique=True)
            if not len(new):
                continue
            places[node, function] = np.union1d(known, new)
        for dependency in node.dependencies:
            if dependency.is_triggered_by(function):
                onward = _follow(dependency, new)
                if len(onward):
                    work.append((dependency.target, dependency.handler, onward))
    return {key: np.stack([both >> 32, both & 0xFFFFFFFF], axis=1) for key, both in places.items()}


def _follow(dependency: Any, places: np.ndarray) -> np.ndarray:
    """Places, one integer each (position << 32 | channel), distinct and ascending, on the far side of a dependency."""
    for mapping in dependency.index_mapping:
        if mapping is not None:
            move = _MOVES.get((type(mapping), mapping.reverse))
            places = places[:0] if move is None else move(mapping, places)  # where they get lost, the trial says so
    return places


def _repeat(mapping: Any, places: np.ndarray) -> np.ndarray:
    position, channel = places >> 32, places & 0xFFFFFFFF
    every = position[:, None] * mapping._stride + np.arange(mapping._stride)
    return np.unique(every << 32 | channel[:, None])


def _merge(mapping: Any, places: np.ndarray) -> np.ndarray:
    return np.unique((places >> 32) // mapping._stride << 32 | places & 0xFFFFFFFF)


def _cut(mapping: Any, places: np.ndarray) -> np.ndarray:
    begin, end = mapping.offset
    return places[(places >= begin << 32) & (places < end << 32)] - (begin << 32)


def _shift(mapping: Any, places: np.ndarray) -> np.ndarray:
    return places + (mapping.offset[0] << 32)


def _pick(mapping: Any, places: np.ndarray) -> np.ndarray:
    position = places >> 32
    inside = (position >= mapping.start) & (position < mapping.end) & ((position - mapping.start) % mapping.step == 0)
    return ((position - mapping.start) // mapping.step << 32 | places & 0xFFFFFFFF)[inside]


def _spread(mapping: Any, places: np.ndarray) -> np.ndarray:
    return (places >> 32) * mapping.step + mapping.start << 32 | places & 0xFFFFFFFF


# (Torch-Pruning's index mapping, reverse?) -> the same on arrays
_MOVES: dict[tuple[type, bool], Callable[[Any, np.ndarray], np.ndarray]] = {
    (index_mapping._FlattenIndexMapping, False): _repeat, (index_mapping._FlattenIndexMapping, True): _merge,
    (index_mapping._ConcatIndexMapping, False): _shift, (index_mapping._ConcatIndexMapping, True): _cut,
    (index_mapping._SplitIndexMapping, False): _cut, (index_mapping._SplitIndexMapping, True): _shift,
    (index_mapping._SliceIndexMapping, False): _pick, (index_mapping._SliceIndexMapping, True): _spread,
}


def chunks(places: Places) -> Iterator[tuple[int, np.ndarray]]:
    """(width of a part, places) for each split into equal parts."""
    return ((node.grad_fn._saved_split_size, at) for (node, _), at in places.items()
            if node.type == OPTYPE.SPLIT and hasattr(node.grad_fn, "_saved_split_size"))
