"""Where a model's code cuts channels: splits and slices, at places that it fixes, that modules keep, or in equal parts.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch import nn

from fastscore.graph.cutting.cut_widths import Cut, Width
from fastscore.graph.following import index_maps
from fastscore.graph.following.asked_sizes import AskedSizes
from fastscore.graph.following.noted_calls import NotedCalls
from fastscore.graph.layer_types import OPTYPE

LAYERS = {OPTYPE.CONV, OPTYPE.LINEAR}


class Cuts:
    """What is known of the splits and slices in a graph, once it is known where channels lie in them."""

    model: nn.Module
    calls: NotedCalls
    cuts: str
    _dims: dict[Any, int]  # node -> the dimension that holds the channels in its output

    def _cuts(self, node: Any) -> bool:
        """Whether a split or slice is along the dimension that holds the channels."""
        return node in self._dims and \
            index_maps.saved_dims(node.grad_fn, "_saved_dim", len(shape(node))) == [self._dims[node]]

    def _is_fixed(self, node: Any) -> bool:
        """Whether the code says where channels are split, or sliced; chunk() takes equal parts of whatever is left."""
        fixed = node.type == OPTYPE.SLICE or hasattr(node.grad_fn, "_saved_split_sizes") or (
            node.type == OPTYPE.SPLIT and self._noted(node) is not None)
        return fixed and self._cuts(node)

    def _is_unknown(self, node: Any) -> bool:
        """Whether no module keeps the places of such a split or slice."""
        return self._is_fixed(node) and not self._widths(node)

    def asked(self) -> AskedSizes:
        """What is known of the numbers that sizes are made of."""
        return self.calls.asked(self.model)

    def kept_of(self, node: Any) -> list[tuple[nn.Module, Width]]:
        """(module, what it keeps) of the places of a split, or slice, that the code says."""
        cut = self._noted(node) if self._is_fixed(node) else None
        return [] if cut is None else [(cut.keeper(width), width) for width in self._widths(node) or ()]

    def _noted(self, node: Any) -> Cut | None:
        cut = next((cut for cut in self.calls.cuts if cut.function is node.grad_fn), None)
        return cut if cut is None or cut.asked.isdisjoint(cut.named.values()) else self.asked().with_known(cut)

    def _widths(self, node: Any) -> list[Width] | None:
        """What modules keep of the places of a split, or slice, along the channels; None where that is nothing."""
        cut, function = self._noted(node), node.grad_fn
        if cut is None:
            return None
        whole = function._saved_self_sym_sizes[self._dims[node]]
        if node.type == OPTYPE.SLICE:
            part = slice_of(function, whole)
            return cut.of_bounds([at for at in (part.begin, part.end) if 0 < at < whole]) if part.step == 1 else None
        if hasattr(function, "_saved_split_sizes"):
            sizes = function._saved_split_sizes
            return cut.of_sizes(sizes, self.asked().split_by(cut, sizes) if cut.may_be_of_several(sizes) else None)
        size = function._saved_split_size
        return cut.of_sizes([size] * (whole // size)) if whole % size == 0 else None

    def parts_of(self, root: Any) -> list[np.ndarray]:
        """The outputs of a layer, int64, in the parts that code splits or slices them into, at numbers that modules
        keep; none where it does not."""
        bounds = set[int]()
        for cut in root.outputs:
            if cut.type in (OPTYPE.SPLIT, OPTYPE.SLICE) and self._is_fixed(cut) and self._widths(cut) and \
                    not self._chunk(cut):
                whole = cut.grad_fn._saved_self_sym_sizes[self._dims[cut]]
                part = slice_of(cut.grad_fn, whole) if cut.type == OPTYPE.SLICE else None
                bounds |= {0, whole, *([part.begin, part.end] if part else np.cumsum(cut.grad_fn._saved_split_sizes))}
        return [np.arange(*each) for each in itertools.pairwise(sorted(bounds))]

    def chunks(self, positions: Mapping[tuple[Any, Any], np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
        """(width of a part, positions) for each split of the channels into equal parts; or 0, and positions of which
        those that are alike go together."""
        for node, width, at in self._chunked(positions):
            step = node.grad_fn._saved_step if node.type == OPTYPE.SLICE else 1
            yield (0, (at >> 32) // step << 32 | at & index_maps.CHANNEL) if step > 1 else (width, at)

    def chunks_others(self, positions: Mapping[tuple[Any, Any], np.ndarray]) -> bool:
        """Whether channels that are not among `positions` are split into equal parts together with those that are."""
        return any(len(np.unique(at >> 32)) < node.grad_fn._saved_self_sym_sizes[self._dims[node]]
                   for node, _, at in self._chunked(positions))

    def _chunked(self, positions: Mapping[tuple[Any, Any], np.ndarray]) -> Iterator[tuple[Any, int, np.ndarray]]:
        """Each split or slice into equal parts, their width, and the positions in the whole."""
        for (node, function), at in positions.items():
            for cut, within in self._cuts_of(node, function, at):
                if (width := self._chunk(cut)) is not None:
                    yield cut, width, within

    def _cuts_of(self, node: Any, function: Any, at: np.ndarray) -> Iterator[tuple[Any, np.ndarray]]:
        """The splits and slices of what lies at a node, and the positions in what each of them cuts: of the whole,
        where positions are those in it."""
        if node.type not in LAYERS or function.__name__ != "prune_in_channels":
            yield from ((cut, at if cut is node else self._in_part(node, cut, at)) for cut in (node, *node.outputs)
                        if cut.type == (OPTYPE.SPLIT if cut is node else OPTYPE.SLICE))

    def _in_part(self, node: Any, onward: Any, at: np.ndarray) -> np.ndarray:
        """Positions at a node in the part of it that the next one reads: those of a split are in what it splits."""
        if node.type != OPTYPE.SPLIT or not self._cuts(node):
            return at
        whole, function = node.grad_fn._saved_self_sym_sizes[self._dims[node]], node.grad_fn
        sizes = getattr(function, "_saved_split_sizes", None) or [function._saved_split_size] * whole
        number = next((part for source, part in onward.grad_fn.next_functions if source is function), 0)
        begin = sum(sizes[:number])
        return index_maps.SliceMap(begin, min(begin + sizes[number], whole)).forward(at)

    def _chunk(self, node: Any) -> int | None:
        """The width of the equal parts that channels are split into; None where they are not, or need not be equal. Of
        parts of several widths the greatest that all are made of."""
        if node.type in (OPTYPE.SPLIT, OPTYPE.SLICE) and self._is_unknown(node):
            return self._share(node) if self.cuts == "shares" else None
        if node.type != OPTYPE.SPLIT or not self._cuts(node):
            return None
        if hasattr(node.grad_fn, "_saved_split_size"):
            width: int = node.grad_fn._saved_split_size
            return width
        widths = self._widths(node)
        alike = widths is not None and len(widths) == 1 and len(set(node.grad_fn._saved_split_sizes)) == 1
        return widths[0].end if widths is not None and alike else None

    def _share(self, node: Any) -> int:
        """The greatest width that the whole and the parts of a split or slice are made of."""
        function = node.grad_fn
        whole: int = function._saved_self_sym_sizes[self._dims[node]]
        if node.type == OPTYPE.SPLIT:
            sizes = getattr(function, "_saved_split_sizes", None)
            return math.gcd(*(sizes or [whole, function._saved_split_size]))
        part = slice_of(function, whole)
        return 1 if part.step > 1 else math.gcd(whole, part.begin, part.end)


def shape(node: Any, onward: Any = None) -> tuple[int, ...]:
    """Of what a node makes; onward: of the part of it that this one reads."""
    if node.type == OPTYPE.PARAMETER:
        return tuple(node.module.shape)
    read = getattr(onward.grad_fn, "next_functions", ()) if onward is not None and node.type == OPTYPE.SPLIT else ()
    return index_maps.shape_of(node.grad_fn, next((part for source, part in read if source is node.grad_fn), 0))


def slice_of(function: Any, size: int) -> index_maps.SliceMap:
    """Of a slice along a dimension of that size; code of torch.jit leaves out a bound that is that of the whole."""
    begin, end = (whole if bound is None else bound + size if bound < 0 else min(bound, size) for bound, whole in
                  ((function._saved_start, 0), (function._saved_end, size)))
    return index_maps.SliceMap(begin, end, function._saved_step)
