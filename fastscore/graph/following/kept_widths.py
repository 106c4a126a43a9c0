"""Numbers of channels that modules keep in attributes, by which code cuts channels, or makes zeros that meet them."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from fastscore.graph.cutting.cut_widths import Cut, Width
from fastscore.graph.following import index_maps
from fastscore.graph.following.cuts import LAYERS, shape
from fastscore.graph.following.nodes import NORM, PRODUCERS
from fastscore.graph.groups import Member
from fastscore.graph.layer_types import OPTYPE
from fastscore.modules import config_numbers, written_numbers
from fastscore.modules.inspection import channel_dim
from fastscore.modules.returned_part import RETURNED
from fastscore.modules.weights import recurrent

Kept: TypeAlias = tuple[nn.Module, Width, np.ndarray]  # whose number it is, the number, the positions that it counts


def of_group(graph: Any, positions: Mapping[tuple[Any, Any], np.ndarray], unit: Tensor) -> Iterator[Member]:
    """The members of a group that are numbers which modules keep of its channels. positions: of the group. unit: of
    each of its channels, int64: those of one go together."""
    known, kept = set[tuple[str, str]](), set[nn.Module]()
    for (node, function), at in positions.items():
        for owner, width, where in (*_of_cuts(graph, node, function, at, unit), *_of_zeros(graph, node, function, at)):
            asked = graph.asked()
            if not asked.holds(owner, width) or asked.other_use(owner, width) is not None:
                continue
            name, position = graph._module2name[owner], where >> 32
            inside = (position >= width.begin) & (position < width.end)
            if (name, width.number) not in known and inside.any():
                known.add((name, width.number))
                kept.add(owner)
                yield Member(name, "width", torch.from_numpy(position[inside] - width.begin),
                             torch.from_numpy(where[inside] & index_maps.CHANNEL), attribute=width.attribute)
    for (node, _), at in positions.items():
        for member in _of_tables(graph, node, at):
            alone = not member.attribute.startswith(RETURNED) or graph.model.get_submodule(member.layer) not in kept
            if (member.layer, member.attribute) not in known and alone:
                known.add((member.layer, member.attribute))
                yield member
    for name, parts in graph._transformers.items():  # whose code asks whether what it is called on has as many
        norms = (at for (node, _), at in positions.items() if node.type == NORM and node.module in parts)
        for at in itertools.islice(norms, 1):
            yield Member(name, "width", torch.from_numpy(at >> 32), torch.from_numpy(at & index_maps.CHANNEL),
                         attribute="d_model")


def written(graph: Any, positions: Mapping[tuple[Any, Any], np.ndarray], unit: Tensor) -> str | None:
    """Why a group does not go if zeros meet its channels of a width that stands in the code, or if a number that it
    hangs on is for something else, too; None where neither is so."""
    for (node, function), at in positions.items():
        makers = {maker for maker, _ in _tables(graph, node)}
        for code, size, width, _ in _zeros_at(graph, node, function):
            if code.module not in makers and width is None:
                whose, way_out = ("a number that is written there", "let a module keep it (self.hidden), or take it "
                                  "from a layer") if size in code.written else (
                    "a number that it computes", "make them by torch.zeros_like, or let a module keep it")
                return f"the code of {type(code.module).__name__} makes zeros of {size} channels that meet them, " \
                       f"{whose}: {way_out}"
        for owner, width, _ in (*_of_cuts(graph, node, function, at, unit), *_of_zeros(graph, node, function, at)):
            if owner not in makers and graph.asked().holds(owner, width) and \
                    (why := graph.asked().other_use(owner, width)) is not None:
                name = width.name.rpartition(written_numbers.MARK)[2].replace(config_numbers.MARK, ".")
                return f"{name} of {type(owner).__name__} is the size of a view, cut or zeros, and something else in " \
                       f"{why}: let this have a number of its own"
    return None


def _of_cuts(graph: Any, node: Any, function: Any, at: np.ndarray, unit: Tensor) -> Iterator[Kept]:
    """Of the splits and slices of what a node makes, and of a view."""
    code = graph.calls.view_of(node.grad_fn)
    for source in node.inputs if node in graph._dims and node.type == OPTYPE.RESHAPE else ():
        if source in graph._dims and graph._dims[source] < len(shape(source, node)):
            dim = graph._dims[node]
            channels = shape(source, node)[graph._dims[source]]
            found = sorted(code.widths(dim, channels), key=lambda kept: not graph.asked().of_views(*kept))
            if factors := code.factors(dim, channels):
                least = int(np.gcd.reduce(np.unique(unit.numpy()[at & index_maps.CHANNEL], return_counts=True)[1]))
                found += graph.asked().products(factors, code.asked[dim], channels, least)
            yield from itertools.islice(((*kept, at) for kept in found if graph.asked().holds(*kept)), 1)
    for part, within in graph._cuts_of(node, function, at):
        yield from ((*kept, within) for kept in graph.kept_of(part))


def _of_zeros(graph: Any, node: Any, function: Any, at: np.ndarray) -> Iterator[Kept]:
    for code, size, width, begin in _zeros_at(graph, node, function):
        if width is not None:
            yield code.keeper(width), Width(width.attribute, begin, begin + size), at


def _zeros_at(graph: Any, node: Any, function: Any) -> Iterator[tuple[Cut, int, Width | None, int]]:
    """(code that made zeros, their width, the number that it is if any, where they begin) for those that a node reads,
    or makes something of: the state that a recurrent module is given, or one of a cell that is written by hand."""
    reads = node.type in LAYERS and function.__name__ == "prune_in_channels"
    if reads and (recurrent.reads_state(node.module) or recurrent.projects(node.module)):
        for zeros in graph._given.get(node.module.owner, ()):
            if zeros.shape[-1] == node.module.in_features and (code := graph.calls.zeros_of(zeros)) is not None:
                yield code, zeros.shape[-1], graph.asked().width_of(code, tuple(zeros.shape), -1), 0
    for met in graph.calls.met.get(node.module, ()) if reads else ():
        if met.shape:  # a single zero has no channels
            at = channel_dim(node.module) % len(met.shape)
            yield met.code, met.shape[at], graph.asked().width_of(met.code, met.shape, at), (
                met.begin if met.dim == at else 0)
    for met in graph.calls.met.get(node.grad_fn, ()) if node in graph._dims and node.type not in PRODUCERS else ():
        at, joined = graph._dims[node] - len(shape(node)), met.dim == graph._dims[node]
        if -at <= len(met.shape) and (joined or met.shape[at] == shape(node)[at]):
            yield met.code, met.shape[at], graph.asked().width_of(met.code, met.shape, at), met.begin if joined else 0


def _tables(graph: Any, node: Any) -> Iterator[tuple[nn.Module, str]]:
    """(module, what surgery is to narrow of it) of each table that has something for every channel at a node."""
    if node in graph._dims and node.type not in (*PRODUCERS, OPTYPE.CONCAT) and not index_maps.contracts(node.grad_fn):
        dim = graph._dims[node] - len(shape(node))
        if dim < 0:
            yield from graph.calls.tables.at(node.grad_fn, dim, shape(node)[dim])


def _of_tables(graph: Any, node: Any, positions: np.ndarray) -> Iterator[Member]:
    """The members of a group that are tables, where these meet the group's channels at a node."""
    for module, attribute in _tables(graph, node):
        yield Member(graph._module2name[module], "width", torch.from_numpy(positions >> 32),
                     torch.from_numpy(positions & index_maps.CHANNEL), attribute=attribute)
