"""Parameters that channels meet, number by number, in branches that no example runs: mask tokens."""

import ast

import torch
from torch import Tensor, nn

from fastscore.graph.groups import ChannelGroup
from fastscore.graph.trials.recording import Recording
from fastscore.graph.trials.training_trial import long_dim, shows
from fastscore.modules.channel_uses import Dims, Use
from fastscore.modules.reachable_code import ReachableCode
from fastscore.modules.settled_branches import is_none

_ELEMENTWISE = {"where", "add", "sub", "mul", "div"}
_OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div)


def meets_one_by_one(use: Use, model: nn.Module, name: str, by: object, dims: Dims, count: int, group: ChannelGroup,
                     at: Tensor) -> bool:
    """Whether channels of a group meet each its own number of a parameter of that name, or a view of it, `by`.

    dims: of the tensor of `count` dimensions that meets it, where a unit's channels lie; at: where in the group, bool.
    """
    node = use.innermost.node
    parameter = dict(model.named_parameters(remove_duplicate=False)).get(name)
    called = getattr(node.func, "attr", "") if isinstance(node, ast.Call) else ""
    if parameter is None or not isinstance(by, Tensor) or any(group.role("heads")) or not (
            called in _ELEMENTWISE or (isinstance(node, ast.BinOp) and isinstance(node.op, _OPERATORS))):
        return False
    dim, places = long_dim(parameter), list(dims)
    long = [each for each, size in enumerate(by.shape) if size > 1]
    return dim is not None and parameter.numel() == group.channels and len(long) == 1 and places == [
        count - by.dim() + long[0]] and by.shape[long[0]] == group.channels and by.data_ptr() == parameter.data_ptr() \
        and by.stride(long[0]) == parameter.stride(dim) and torch.equal(dims[places[0]].cpu(), at)


def dim_alone(recording: Recording, code: ReachableCode, name: str) -> int | None:
    """The dimension along which all numbers of a parameter lie, if code reads it at one place alone, and nothing that
    runs depends on it; None of any other."""
    parameter, key = recording.model.get_parameter(name), name.rpartition(".")[2]
    places = 0
    for function in code.mention(key):
        if (source := code.source(function)) is None:
            return None
        tree, parents = source
        places += sum(getattr(node, "attr", getattr(node, "value", None)) == key and not (
            isinstance(parent := parents[node], ast.Compare) and all(map(is_none, parent.comparators)))
            for node in ast.walk(tree))
    return long_dim(parameter) if places == 1 and not shows(recording, name, parameter) else None
