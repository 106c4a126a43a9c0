"""Parameters that the code of a module reads itself: layer scales, gains, embeddings of positions, class tokens."""

import torch
import torch_pruning as tp
from torch import Tensor, nn


def cut(model: nn.Module, name: str, dim: int, index: Tensor) -> None:
    """Take `index` (int64) of dimension `dim` out of the parameter or buffer of that qualified name, in place.

    A parameter is a new object afterwards.
    """
    path, _, key = name.rpartition(".")
    owner = model.get_submodule(path)
    old: Tensor = getattr(owner, key)
    stays = torch.ones(old.shape[dim], dtype=torch.bool).index_fill(0, index.cpu(), False).nonzero()[:, 0]
    new = old.detach().index_select(dim, stays.to(old.device))
    setattr(owner, key, nn.Parameter(new, old.requires_grad) if key in owner._parameters else new)


def randomize_constants(model: nn.Module) -> None:
    """Make those that hold one number throughout, as layer scales of 1e-6 do before training, random in [0.5, 1.5).

    In place, for a copy that is traced: what hardly shows cannot be followed.
    """
    generator = torch.Generator().manual_seed(0)
    random: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if tp.ops.module2type(module) != tp.ops.OPTYPE.ELEMENTWISE:
            continue
        for parameter in module._parameters.values():
            if parameter is not None and parameter.is_floating_point() and parameter.numel() > 1 and \
                    bool((parameter == parameter.flatten()[0]).all()):
                values = 0.5 + torch.rand(parameter.shape, generator=generator)
                random[id(parameter)] = nn.Parameter(values.to(parameter), parameter.requires_grad)
    for module in model.modules():  # one that several hold stays one
        module._parameters.update({name: random[id(parameter)] for name, parameter in module._parameters.items()
                                   if id(parameter) in random})
