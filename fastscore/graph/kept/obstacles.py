"""Why channels that come to a node cannot be removed."""

from collections.abc import Iterator
from typing import Any

from fastscore.graph import layers_inside
from fastscore.graph.following.cuts import LAYERS, shape
from fastscore.graph.following.nested import INTO, comes_out
from fastscore.graph.following.nodes import CHANNELWISE, NORM, PRODUCERS, TRANSPARENT, Nodes
from fastscore.graph.kept import over_channels
from fastscore.graph.layer_types import OPTYPE
from fastscore.modules.norms import channel_norms

CUT = "its channels are cut at positions that the model's code fixes"
DIVIDED = "a view divides its channels over several dimensions"
SEVERAL = ", the forward of whose class returns several things"


def why(graph: Nodes, node: Any, function: Any) -> str | None:
    """Why channels that come to a node cannot be removed; None where they can."""
    if (part := getattr(node.grad_fn, "scripted", None)) is not None:
        return f"its channels pass through {graph._module2name[part]} ({part.part.original_name}), which " \
               "torch.jit made, and which cannot lose channels"
    if comes_out(node.grad_fn):
        return INTO
    if (layer := next((graph._several[key] for key in _taken_by(graph, node) if key in graph._several), None)):
        return f"its channels come to {layer}{SEVERAL}"
    if node.type == OPTYPE.CUSTOMIZED:
        return f"{DIVIDED} ({node.grad_fn.name()})"
    if node.type == OPTYPE.PARAMETER and node in graph._dims:
        return None  # one number, or more, for each channel
    width = channel_norms.width(node.module) if node.type == NORM else None
    if width is not None and width != shape(node)[graph._dims[node]]:
        return f"{node._name} normalises over {width} of several dimensions"
    if node.type == OPTYPE.PARAMETER:
        owner = node._name.rpartition(".")[0]
        beside = [source for operation in node.outputs for source in operation.inputs
                  if source.type == OPTYPE.PARAMETER and source._name.rpartition(".")[0] == owner]
        return graph.taken_with(max(beside, key=lambda one: one.module.dim())._name)  # a weight, before a bias
    if node.type not in PRODUCERS | CHANNELWISE | TRANSPARENT | {NORM, OPTYPE.OUTPUT}:
        return f"its channels pass through {node._name or type(node.module).__name__} " \
               f"({type(node.module).__name__}), which cannot lose channels yet"
    reads = node.type in LAYERS and function.__name__ == "prune_in_channels"
    if not reads and (node.type == OPTYPE.OUTPUT or node.grad_fn in graph.returned or not node.outputs) and \
            node.grad_fn not in graph.unread:
        return "its channels are the model's output"
    if any(reduced(graph, node)):
        return over_channels.why(node)
    cropped = graph._is_padded(node) and min(graph._padding(node)) < 0
    if cropped or (graph._is_unknown(node) and graph.cuts == "fixed"):
        return f"{CUT} ({node.grad_fn.name()})"
    if node.type in (OPTYPE.CONV, OPTYPE.DEPTHWISE_CONV) and node.module.transposed and \
            1 < node.module.groups != max(node.module.in_channels, node.module.out_channels):
        return f"{node._name} is a grouped transposed convolution, which cannot lose channels yet"
    return None


def reduced(graph: Nodes, node: Any) -> Iterator[Any]:
    """The inputs of a node over whose channels it reduces, or normalises."""
    return (source for source in node.inputs if source in graph._dims and
            over_channels.runs(node, graph._dims[source], len(shape(source))))


def _taken_by(graph: Nodes, node: Any) -> Iterator[int]:
    """The id of each parameter that an operation takes, as it is or turned."""
    for source, _ in getattr(node.grad_fn, "next_functions", ()) if graph._several else ():
        yield id(getattr(layers_inside.before_turned(source), "variable", None))
