"""Channels that go together though nothing leads from one to the other in the traced graph."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch_pruning as tp
from torch import nn

from fastscore.graph.following import contractions
from fastscore.graph.following.cuts import LAYERS, slice_of
from fastscore.graph.following.index_maps import IndexMap, SliceMap
from fastscore.graph.following.nodes import PRODUCERS, Nodes
from fastscore.graph.layer_types import OPTYPE, type_of
from fastscore.modules.weights import recurrent
from fastscore.modules.weights.own_linear import OwnLinear, TiedLinear

_End: TypeAlias = tuple[Any, Any]  # (node, what prunes those of its channels that are meant)


def tie(graph: Nodes) -> None:
    """Add dependencies between the nodes of such channels."""
    _tie_embeddings(graph)
    _tie_products(graph)
    _tie_states(graph)
    _tie_places(graph)
    _tie_numbers(graph)
    for sources in contractions.partners(graph):
        _together([_made(graph, source) for source in sources])


def weights(names: Mapping[nn.Module, str]) -> dict[int, dict[str, nn.Module]]:
    """Id of a weight -> the layers that multiply by it, with their names. names: of all modules."""
    held: dict[int, dict[str, nn.Module]] = {}
    for module, name in names.items():
        weight: Any = module._parameters.get("weight") if type_of(module) in PRODUCERS else None
        weight = module.stored[0] if isinstance(module, TiedLinear) else weight
        if weight is not None:
            held.setdefault(id(weight), {})[name] = module
    return held


def _tie_embeddings(graph: Nodes) -> None:
    """Embeddings that share a weight, as an encoder's and a decoder's do, lose the same channels; and so does what
    a head reads whose weight is an embedding's."""
    sharing: dict[int, list[_End]] = {}
    for node in graph.module2node.values():
        if node.type == OPTYPE.EMBED:
            sharing.setdefault(id(node.module.weight), []).append(_made(graph, node))
        elif type(node.module) is nn.Linear:
            pruner = graph.get_pruner_of_module(node.module)
            sharing.setdefault(id(node.module.weight), []).append((node, pruner.prune_in_channels))
    for ends in sharing.values():
        if any(node.type == OPTYPE.EMBED for node, _ in ends):
            _together(ends)


def _tie_products(graph: Nodes) -> None:
    """A product with a weight that another layer holds loses what that does."""
    for node in list(graph.module2node.values()):
        if isinstance(node.module, TiedLinear) and (holder := graph.module2node.get(node.module.owner)) is not None:
            for dim, end in enumerate(_ends(graph, holder)):
                one = _ends(graph, node)[dim]
                if one is not None and end is not None:
                    _together([one, end])


def _ends(graph: Nodes, node: Any) -> list[_End | None]:
    """What goes of each dimension of the parameter that a layer multiplies by, or looks up in."""
    pruner = graph.get_pruner_of_module(node.module)
    if node.type == OPTYPE.EMBED:
        return [None, (node, pruner.prune_out_channels)]
    dims = node.module.dims if isinstance(node.module, OwnLinear) else (0, 1)
    ends: list[_End | None] = [None] * len(dims)
    ends[dims[-2]], ends[dims[-1]] = (node, pruner.prune_out_channels), (node, pruner.prune_in_channels)
    return ends


def _tie_states(graph: Nodes) -> None:
    """All layers and directions of a recurrent module keep states of one width: they lose the same units."""
    for module in graph.model.modules():
        for layers in (recurrent.state_layers(module), recurrent.projections(module)):
            _together([_made(graph, graph.module2node[layer]) for layer in layers if layer in graph.module2node])


def _tie_places(graph: Nodes) -> None:
    """What a max-unpooling reads loses the channels with those whose maxima lay where it puts them."""
    pools, unpools = ([(node, places.data_ptr()) for node in graph.module2node.values()
                       if (places := getattr(node.grad_fn, key, None)) is not None
                       and node.grad_fn.name().startswith(kind)]
                      for kind, key in (("MaxPool", "_saved_result1"), ("MaxUnpool", "_saved_indices")))
    for (pool, made), (unpool, read) in itertools.product(pools, unpools):
        if made == read and graph.dim_of(pool) == graph.dim_of(unpool) is not None:
            _together([_made(graph, pool), _made(graph, unpool)])


def _tie_numbers(graph: Nodes) -> None:
    """Parts that code cuts by one number that a module keeps lose as many channels, the same places of each."""
    parts: dict[tuple[nn.Module, str], list[tuple[Any, SliceMap]]] = {}
    for node in graph.module2node.values():
        for keeper, width in graph.kept_of(node) if node.type == OPTYPE.SPLIT else ():
            parts.setdefault((keeper, width.attribute), []).append((node, SliceMap(width.begin, width.end)))
    for (one, at), (other, there) in itertools.chain(*(itertools.permutations(each, 2) for each in parts.values())):
        dependency = tp.dependency.Dependency(_made(graph, one)[1], _made(graph, other)[1], one, other)
        dependency.index_mapping = [at.forward, there.inverse]
        one.dependencies.append(dependency)


@contextmanager
def widths_read(graph: Nodes) -> Iterator[set[str]]:
    """Within the block, parts that code cuts from what a layer makes, and that are as wide as what it reads, lose what
    that does: `C = x.shape[-1]; q, k, gates = self.joint(x).split([C, C, 2], -1)`. Yields the names of such layers."""
    found, before = set[str](), [(node, list(node.dependencies)) for node in graph.module2node.values()]
    for cut in [node for node, _ in before if graph._is_unknown(node)]:
        layer = _maker(cut)
        pruner = layer and graph.get_pruner_of_module(layer.module)
        for part in _parts(graph, cut, pruner.get_in_channels(layer.module)) if pruner else ():
            read, made = (layer, pruner.prune_in_channels), _made(graph, cut)
            for one, other, maps in ((read, made, [part.inverse]), (made, read, [part.forward])):
                dependency = tp.dependency.Dependency(one[1], other[1], one[0], other[0])
                dependency.index_mapping = maps if cut.type == OPTYPE.SPLIT else []  # of a slice alone
                one[0].dependencies.append(dependency)
            found.add(layer._name)
    yield found
    for node, dependencies in before:
        node.dependencies = dependencies


def _maker(cut: Any) -> Any:
    """The layer that makes what is cut, with nothing but operations on it in between; None where that is not so."""
    node = cut
    while node.type not in LAYERS:
        if len(node.inputs) != 1 or node.type in PRODUCERS:
            return None
        node = node.inputs[0]
    return node


def _parts(graph: Nodes, cut: Any, width: int) -> Iterator[IndexMap]:
    """The parts of a split, or slice, that are so wide."""
    whole = cut.grad_fn._saved_self_sym_sizes[graph._dims[cut]]
    if cut.type == OPTYPE.SLICE:
        parts = [slice_of(cut.grad_fn, whole)]
    else:
        sizes = getattr(cut.grad_fn, "_saved_split_sizes", None) or [cut.grad_fn._saved_split_size] * (
            whole // cut.grad_fn._saved_split_size)
        parts = list(itertools.starmap(SliceMap, itertools.pairwise(itertools.accumulate(sizes, initial=0))))
    yield from (part for part in parts if part.end - part.begin == width and part.step == 1)


def _made(graph: Nodes, node: Any) -> _End:
    return node, graph.get_pruner_of_module(node.module).prune_out_channels


def _together(ends: Iterable[_End]) -> None:
    """What goes of the channels of one goes of all others'."""
    for (one, trigger), (other, handler) in itertools.permutations(ends, 2):
        dependency = tp.dependency.Dependency(trigger, handler, one, other)
        dependency.index_mapping = []
        one.dependencies.append(dependency)
