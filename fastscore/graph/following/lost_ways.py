"""Where the tracer loses channels: what it finds further on says nothing of them."""

from collections.abc import Collection, Mapping
from typing import Any, TypeAlias, TypeVar

from fastscore.graph.autograd_nodes import parameters_of
from fastscore.graph.following import contractions, crossings, index_maps
from fastscore.graph.following.cuts import LAYERS, shape
from fastscore.graph.following.nodes import CHANNELWISE, NORM, PRODUCERS, TRANSPARENT, Nodes, reading_dim
from fastscore.graph.layer_types import OPTYPE

Key: TypeAlias = tuple[Any, Any]  # (node, pruning function): where channels come to
ALONG = "works along another dimension than that of its channels"
_KERNEL = ": its kernel runs over the channels themselves, of which others would be neighbours"


def lost(graph: Nodes, came: Mapping[Key, Key | None]) -> dict[Key, str]:
    """Where channels may not be that are said to be there -> what they were lost at.

    came: each key -> the one that its channels first came from, which stands before it.
    """
    found: dict[Key, str] = {}
    for key, before in came.items():
        if before is None:
            continue
        origin = came[before]
        why = found.get(before) or _at_product(graph, before[0], None if origin is None else origin[0]) \
            or _between(graph, before[0], key[0])
        if why is not None and not (origin is not None and _within(origin, before[0])):
            found[key] = why
    layers = (why for why in found.values() if ALONG in why)
    one: str | None = next(layers, None)  # which says more
    return {key: one if one is not None and why.startswith(_MEET) else why for key, why in found.items()}


def _within(read: Key, product: Any) -> bool:
    """Whether channels that a layer reads have come to the product in it of another of its calls, whose input they are:
    a layer that is called more often reads as many channels each time."""
    layer, function = read
    return layer.type in LAYERS and function.__name__ == "prune_in_channels" and product in layer.inputs


def at_end(graph: Nodes, came: Mapping[Key, Key | None], last: Key) -> str | None:
    """Why channels are lost at the last operation that they come to; None where they are not."""
    before = came[last]
    return None if before is None else _at_product(graph, last[0], before[0])


def unread(graph: Nodes, positions: Mapping[Key, Any]) -> str | None:
    """Why channels are not followed from where they are known to be; None where they are as far as they go."""
    reached = {node for node, _ in positions}
    onward = [(node, after) for node, function in positions for after in node.outputs
              if after not in reached and (node.type not in LAYERS or function.__name__ != "prune_in_channels")]
    for node, after in onward:
        if crossings.at(graph, node, after) is not None:
            return "its channels lie along one dimension, and those of another layer along another, of what " \
                   f"{after.grad_fn.name()} makes of both: those of one are followed"
    for node, after in onward:
        if (why := _at_product(graph, after, node) or _between(graph, node, after)) is not None:
            return why
    return None


_T = TypeVar("_T")
_SUMS = tuple(f"a product with other activations ({product}" for product in ("Mm", "Bmm", "Baddbmm", "Mv", "Dot"))
_MEET = "the tracer cannot follow its channels past where they meet others"


def sure(positions: Mapping[Key, _T], lost: Mapping[Key, str]) -> dict[Key, _T]:
    """Of where channels are said to be, where they are, or where as many go as go of them: those whose product with
    them is summed over."""
    return {key: at for key, at in positions.items() if key not in lost or lost[key].startswith(_SUMS)}


def _between(graph: Nodes, node: Any, onward: Any) -> str | None:
    """Why channels are lost that go from one node to the next, or back; None where they are not."""
    if node in onward.inputs:
        source, target = node, onward
    elif onward in node.inputs:
        source, target = onward, node
    else:
        return None  # they are tied
    dim, at, dims = graph.dim_of(source), graph.dim_of(target), len(shape(source))
    if dim is None or dim >= dims:
        return None
    if target.type in PRODUCERS | CHANNELWISE | {NORM}:
        if target.type in LAYERS | {OPTYPE.DEPTHWISE_CONV}:
            expected = reading_dim(target, dims)
        elif at is None or dims != len(shape(target)) or hasattr(target, "dim_is_known"):
            return None
        else:
            expected = at
        if dim == expected:
            return None
        kernel = getattr(target.module, "kernel_size", ()) if source is node else ()
        wide = isinstance(kernel, tuple) and max(kernel, default=1) > 1 and dim > expected  # not where samples lie
        return f"{graph.name_of(target)} {ALONG}{_KERNEL if wide else ''}"
    if at is None or target.type not in TRANSPARENT:
        return None
    after = graph.dim_after(source, target)
    return None if after in (None, at) else f"{_MEET} ({target.grad_fn.name()})"


def _at_product(graph: Nodes, product: Any, origin: Any) -> str | None:
    """Why what passes an operation is lost where that multiplies it by something else than a layer's weight."""
    if product.type not in (OPTYPE.ELEMENTWISE, OPTYPE.OUTPUT) or not index_maps.multiplies(product.grad_fn) or \
            contractions.known(product):
        return None
    others = [source for source in product.inputs if source is not origin]
    made_by_layer, parameters = _made_of(others, product)
    name = product.grad_fn.name()
    own = [factor for source in others if (factor := _parameter_at(source)) is not None]
    if own and origin not in product.inputs and not name.startswith("Convolution"):  # where what comes of it lies
        return graph.taken_with(own[0]._name)
    if (uncalled := _uncalled_weight(graph, product)) is not None:
        return graph.taken_with(uncalled)
    if made_by_layer:
        return f"a product with other activations ({name}) takes them where they cannot be followed"
    parameters.sort(key=lambda parameter: -parameter.dim())  # a weight, before a bias
    names = list(filter(None, map(graph.parameter_name, parameters)))
    layers = [layer for known in names if (layer := graph.layer_of(known)) is not None]
    if layers:  # this is a part of what it does
        dim = graph.dim_of(origin) if origin in product.inputs else None
        across = layers[0].type == OPTYPE.LINEAR and dim is not None and dim != len(shape(origin)) - 1
        return f"{graph.name_of(layers[0])} {ALONG}" if across else None
    if names:
        return graph.taken_with(names[0])
    return f"a product ({name}) takes them where they cannot be followed"


def _uncalled_weight(graph: Nodes, product: Any) -> str | None:
    """The name of the weight, of a layer that is not called, that code multiplies by; None where it does not."""
    if not product.grad_fn.name().startswith(("Mm", "Addmm")):
        return None
    return next((name for weight in parameters_of(product.grad_fn) if weight.dim() > 1
                 and (name := graph.parameter_name(weight)) and graph.layer_of(name) is None), None)


def _made_of(nodes: Collection[Any], product: Any) -> tuple[bool, list[Any]]:
    """(whether a layer makes one of `nodes`, the parameters that they, and `product` itself, are made of)."""
    work, seen, parameters = list(nodes), set[Any](), list[Any]()
    parameters += _parameters_of(product)
    while work:
        node = work.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.type in PRODUCERS | CHANNELWISE | {NORM} or index_maps.looks_up(node.grad_fn):
            return True, parameters
        parameters += [node.module] if node.type == OPTYPE.PARAMETER else _parameters_of(node)
        work += node.inputs
    return False, parameters


def _parameter_at(node: Any) -> Any:
    """The node of the parameter that a node rearranges; None where it does something else."""
    while node.type != OPTYPE.PARAMETER:
        if len(node.inputs) != 1 or node.type not in TRANSPARENT or index_maps.looks_up(node.grad_fn):
            return None
        node = node.inputs[0]
    return node


def _parameters_of(node: Any) -> list[Any]:
    """The parameters that an operation takes as they are."""
    return [function.variable for function, _ in getattr(node.grad_fn, "next_functions", ())
            if function is not None and hasattr(function, "variable")]
