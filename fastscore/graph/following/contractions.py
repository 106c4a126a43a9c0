"""Products of activations that sum over channels, as those of queries and keys do: channels end there, and those of
both sides go together; what a product does not sum over stays channels, as those of values do."""

from collections.abc import Iterable, Iterator
from typing import Any

from fastscore.graph.following import index_maps
from fastscore.graph.following.cuts import LAYERS, shape
from fastscore.graph.following.nodes import CHANNELWISE, NORM, PRODUCERS, Nodes
from fastscore.graph.layer_types import OPTYPE

_MATRICES = ("Bmm", "Mm")  # of two tensors, by whose last dimensions they multiply
_ADDED = ("Baddbmm", "Addmm")  # the same, and a first tensor that is added to the product
_ATTENTION = "ScaledDotProduct"  # of queries, keys and values


def summed(graph: Nodes, source: Any, product: Any) -> bool:
    """Whether `product` sums over the channels of its input `source`, which meet what other layers make."""
    operands, at = _operands(product), graph.dim_of(source)
    if at is None or sum(operand is source.grad_fn for operand in operands) != 1 or not _all_of_layers(product):
        return False
    number, dims = next(i for i, operand in enumerate(operands) if operand is source.grad_fn), len(shape(source))
    return at == (dims - 1 if number == 0 or (len(operands) == 3 and number == 1) else dims - 2) and number < 2


def carries(graph: Nodes, source: Any, product: Any) -> bool:
    """Whether channels go from an input of an operation to its output, and back, or may: a product of activations has
    those of one input alone."""
    if not known(product):
        return True
    at = graph.dim_of(source)
    return at is not None and at == graph.dim_of(product) and not summed(graph, source, product)


def known(product: Any) -> bool:
    """Whether an operation is a product of activations of which it is known what becomes of channels."""
    return bool(_operands(product)) and _all_of_layers(product)


def end(graph: Nodes, positions: Iterable[tuple[Any, Any]]) -> str | None:
    """Why channels are kept that come to (node, pruning function), and end in a product; None where they do not."""
    product = next((onward for node, function in positions if node.type not in LAYERS
                    or function.__name__ != "prune_in_channels" for onward in node.outputs
                    if summed(graph, node, onward)), None)
    return None if product is None else f"a product with other activations ({product.grad_fn.name()}) sums over its " \
                                        "channels, where nothing can be measured"


def partners(graph: Nodes) -> Iterator[list[Any]]:
    """For each product that sums over channels of both of its inputs, these."""
    for product in graph.module2node.values():
        over = [source for source in product.inputs if summed(graph, source, product)] if _operands(product) else []
        if len(over) == 2:
            yield over


def _operands(product: Any) -> list[Any]:
    """The autograd functions of what a product multiplies; [] of all else."""
    name = product.grad_fn.name() if product.type == OPTYPE.ELEMENTWISE and hasattr(product.grad_fn, "name") else ""
    count = 2 if name.startswith(_MATRICES + _ADDED) else 3 if name.startswith(_ATTENTION) else 0
    begin = 1 if name.startswith(_ADDED) else 0
    operands = [function for function, _ in getattr(product.grad_fn, "next_functions", ())][begin:begin + count]
    return operands if count and len(operands) == count and None not in operands else []


def _all_of_layers(product: Any) -> bool:
    """Whether layers make all that a product multiplies."""
    if not hasattr(product, "is_of_layers"):
        factors = [node for node in product.inputs if any(node.grad_fn is each for each in _operands(product))]
        product.is_of_layers = len(factors) == len(_operands(product)) and all(map(_of_layer, factors))
    found: bool = product.is_of_layers
    return found


def _of_layer(node: Any) -> bool:
    work, seen = [node], set[Any]()
    while work:
        node = work.pop()
        if node.type in PRODUCERS | CHANNELWISE | {NORM} or index_maps.looks_up(node.grad_fn):
            return True
        work += [source for source in node.inputs if source not in seen]
        seen.update(node.inputs)
    return False
