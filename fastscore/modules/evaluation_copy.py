"""The evaluation copy: a model that shares the parameters of the user's, and may be changed at will."""

import copy
from typing import Any

from torch import nn

from fastscore.batches import tensors_of
from fastscore.modules import experts, multihead_attention, transposed_linear
from fastscore.modules.wrappers import check_whole

_OF_EVERY_MODULE = set(vars(nn.Module()))


def evaluation_copy(model: nn.Module) -> nn.Module:
    """A copy of `model` in evaluation mode with frozen parameters, which share their memory with the model's own.

    Args:
        model: any module; it is left as it is.

    Returns:
        A module of the same class, whose nn.MultiheadAttention runs its projections as layers, and where transformers'
        Conv1D is nn.Linear and its experts are two layers (see fastscore.modules).

    Raises:
        TypeError: torch.jit made it.
        ValueError: its parameters are sharded.
    """
    check_whole(model)
    shared: dict[int, Any] = {id(parameter): nn.Parameter(parameter.detach(), requires_grad=False)
                              for parameter in model.parameters()}
    for module in model.modules():  # weight_norm keeps the weight that it computes, others biases by device
        held = (value for name, value in vars(module).items() if name == "_buffers" or name not in _OF_EVERY_MODULE)
        shared |= {id(tensor): tensor.detach() for value in held for tensor in tensors_of(value) if not tensor.is_leaf}
    eval_model: nn.Module = copy.deepcopy(model, shared)
    eval_model.eval()  # which some models have written anew, without returning themselves
    for handle in multihead_attention.replace_attention(eval_model):
        handle.make_permanent()
    for experts_handle in experts.replace_experts(eval_model):
        experts_handle.make_permanent()
    for module in filter(transposed_linear.is_transposed, list(eval_model.modules())):
        transposed_linear.become_linear(module)
    return eval_model
