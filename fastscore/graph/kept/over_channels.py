"""Operations that a model's code runs over all channels: what they are, and the way out, if there is one."""

from typing import Any

from torch import nn

from fastscore.graph.following import index_maps
from fastscore.graph.following.nodes import TRANSPARENT
from fastscore.graph.layer_types import OPTYPE

_WAY_OUT = ("a normalisation is followed where a module does it, and then at most activations (nn.LayerNorm, or one of "
            "your own, with no parameters but a weight and a bias for each channel)")
# operations of PyTorch's functions -> these
_FUNCTIONS = {"NativeLayerNorm": "F.layer_norm", "NativeGroupNorm": "F.group_norm", "FusedRmsNorm": "F.rms_norm"}


def runs(node: Any, dim: int, dims: int) -> bool:
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


def why(node: Any) -> str:
    """Why channels are kept that come to such an operation. node: of Torch-Pruning's graph."""
    name: str = node.grad_fn.name()
    function = next((function for kind, function in _FUNCTIONS.items() if name.startswith(kind)), None)
    if function is not None:
        return f"{function} runs over all its channels: {_WAY_OUT}"
    squares = any(source.grad_fn.name().startswith("Pow") for source in node.inputs if hasattr(source.grad_fn, "name"))
    centres = name.startswith(("Mean", "Std", "Var")) and any(  # x - x.mean(), x / x.std()
        onward.grad_fn.name().startswith(("Sub", "Div")) and not set(onward.inputs).isdisjoint(node.inputs)
        for onward in node.outputs if hasattr(onward.grad_fn, "name"))
    normalises = centres or name.startswith("LinalgVectorNorm") or (squares and name.startswith("Mean"))
    hint = f": {_WAY_OUT}" if normalises else ""
    return f"an operation runs over all its channels ({name}){hint}"
