"""How weights are updated, and how fast: what distill() takes where nothing else is asked for."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from fastscore.arguments import check_number

OptimizerMaker: TypeAlias = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
OptimizerName = Literal["sgd", "adamw"]
# class, its settings, learning rate
OPTIMIZERS: Mapping[str, tuple[Callable[..., torch.optim.Optimizer], Mapping[str, Any], float]] = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}, 0.03),
    "adamw": (torch.optim.AdamW, {"weight_decay": 1e-4}, 3e-3),
}


def make_optimizer(parameters: Iterable[nn.Parameter], optimizer: OptimizerName | OptimizerMaker,
                   lr: float | None) -> torch.optim.Optimizer:
    """An optimizer for those of `parameters` that are not frozen, with its highest learning rate.

    Raises ValueError for a name that there is not, a rate that is not above 0, or one beside an optimizer that brings
    its own.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if callable(optimizer):
        if lr is not None:
            raise ValueError("lr: an optimizer of your own brings its own; leave one of the two out")
        own = optimizer(trained)
        if not isinstance(own, torch.optim.Optimizer):
            raise TypeError(f"optimizer: it returned {type(own).__name__}, where a torch.optim.Optimizer is meant")
        if {id(each) for group in own.param_groups for each in group["params"]}.isdisjoint(map(id, trained)):
            raise ValueError("optimizer: it trains none of the parameters that it was given, those of the smaller "
                             "network: make it of them, as in lambda parameters: torch.optim.SGD(parameters, lr=0.1)")
        return own
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer: {optimizer!r} is none of {', '.join(map(repr, OPTIMIZERS))}, and no function of "
                         "parameters")
    if lr is not None:
        check_number("lr", lr, "0.03")
    if lr is not None and not 0 < lr < math.inf:
        raise ValueError(f"lr: {lr}; it must be above 0")
    make, settings, rate = OPTIMIZERS[optimizer]
    return make(trained, lr=rate if lr is None else lr, **settings)


def schedule(step: int, steps: int, warmup: float) -> float:
    """The share of the highest learning rate in step 0 to steps - 1: up in a line over the share `warmup` of the
    steps, then down to 0 along a cosine."""
    rise = math.ceil(warmup * steps)
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(steps - rise, 1)))
