"""Why channels that come to a node cannot be removed."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from fastscore.graph.autograd_nodes import parameters_of
from fastscore.graph.following import index_maps
from fastscore.graph.following.cuts import LAYERS, shape
from fastscore.graph.following.nested import INTO, comes_out
from fastscore.graph.following.nodes import CHANNELWISE, NORM, PRODUCERS, TRANSPARENT, Nodes
from fastscore.graph.layer_types import OPTYPE
from fastscore.modules.norms import channel_norms

CUT = "its channels are cut at positions that the model's code fixes"
DIVIDED = "a view divides its channels over several dimensions"
_FOLLOWED = "a normalisation is followed where a module does it"
_WAY_OUT = (f"{_FOLLOWED}, and then at most activations (nn.LayerNorm, or one of your own, with no parameters but a "
            "weight and a bias for each channel)")
# operations of PyTorch's functions -> these
_FUNCTIONS = {"NativeLayerNorm": "F.layer_norm", "NativeGroupNorm": "F.group_norm", "FusedRmsNorm": "F.rms_norm"}
SEVERAL = ", the forward of whose class returns several things"


def why(graph: Nodes, node: Any, function: Any) -> str | None:
    """Why channels that come to a node cannot be removed; None where they can."""
    if (part := getattr(node.grad_fn, "scripted", None)) is not None:
        return f"its channels pass through {graph._module2name[part]} ({part.part.original_name}), which " \
               "torch.jit made, and which cannot lose channels"
    if comes_out(node.grad_fn):
        return INTO
    for parameter in parameters_of(node.grad_fn) if graph._several else ():
        if id(parameter) in graph._several:
            return f"its channels come to {graph._several[id(parameter)]}{SEVERAL}"
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
        return _why_over_all(node)
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
            _runs_over(node, graph._dims[source], len(shape(source))))



def _runs_over(node: Any, dim: int, dims: int) -> bool:
    """Whether a node reduces or normalises over the dimension `dim` of an input of so many; no module of PyTorch's that
    normalises, whose channels are known to go."""
    name: str = node.grad_fn.name() if hasattr(node.grad_fn, "name") else ""
    if node.type == OPTYPE.ELEMENTWISE and name.startswith(tuple(_FUNCTIONS)):
        if name.startswith("NativeGroup"):
            return dim == 1 and not _in_a_layer(node)
        return dim >= dims - len(node.grad_fn._saved_normalized_shape)
    return index_maps.runs_over(node.grad_fn, dim, dims)


def _in_a_layer(node: Any) -> bool:
    """Whether a GroupNorm's own code runs it, and then more, as timm's with an activation: then it is the layer's."""
    taken = {id(getattr(source, "variable", None)) for source, _ in node.grad_fn.next_functions}
    work, seen = [node], {node}
    while work:
        onwards = {onward for onward in work.pop().outputs if onward.type in TRANSPARENT or
                   isinstance(onward.module, nn.GroupNorm)} - seen
        if any(isinstance(onward.module, nn.GroupNorm) and id(onward.module.weight) in taken for onward in onwards):
            return True
        seen |= onwards
        work += onwards
    return False


def _why_over_all(node: Any) -> str:
    """Why channels are kept that come to such an operation, and the way out, if there is one."""
    name: str = node.grad_fn.name()
    function = next((function for kind, function in _FUNCTIONS.items() if name.startswith(kind)), None)
    if function is not None:
        several = getattr(node.grad_fn, "_saved_group", 1) > 1
        over, way_out = ("groups of its channels", f"{_FOLLOWED} (nn.GroupNorm)") if several else (
            "all its channels", _WAY_OUT)
        return f"{function} runs over {over}: {way_out}"
    squares = any(source.grad_fn.name().startswith("Pow") for source in node.inputs if hasattr(source.grad_fn, "name"))
    centres = name.startswith(("Mean", "Std", "Var")) and any(  # x - x.mean(), x / x.std()
        onward.grad_fn.name().startswith(("Sub", "Div")) and not set(onward.inputs).isdisjoint(node.inputs)
        for onward in node.outputs if hasattr(onward.grad_fn, "name"))
    normalises = centres or name.startswith("LinalgVectorNorm") or (squares and name.startswith("Mean"))
    hint = f": {_WAY_OUT}" if normalises else ""
    return f"an operation runs over all its channels ({name}){hint}"
