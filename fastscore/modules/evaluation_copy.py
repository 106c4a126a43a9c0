"""The evaluation copy: a model that shares the parameters of the user's, and may be changed at will."""

import copy
from typing import Any

from torch import Tensor, nn

from fastscore.modules import multihead_attention
from fastscore.modules.wrappers import check_whole


def evaluation_copy(model: nn.Module) -> nn.Module:
    """A copy of `model` in evaluation mode with frozen parameters, which share their memory with the model's own.

    Raises ValueError for a model whose parameters are sharded.
    """
    check_whole(model)
    shared: dict[int, Any] = {id(parameter): nn.Parameter(parameter.detach(), requires_grad=False)
                              for parameter in model.parameters()}
    for module in model.modules():  # weight_norm keeps the weight that it computes anew in each pass
        shared |= {id(value): value.detach() for value in vars(module).values()
                   if isinstance(value, Tensor) and not value.is_leaf}
    eval_model = copy.deepcopy(model, shared).eval()
    for handle in multihead_attention.replace_attention(eval_model):
        handle.make_permanent()
    return eval_model
