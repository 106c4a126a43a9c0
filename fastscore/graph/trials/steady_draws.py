"""Random numbers that a model's code draws as it runs: one number in place of all of them.

A smaller model draws fewer, so that those that stay get other ones: dropout that runs in evaluation mode, noise that is
added. Where every one is the same, what is left is what the channels do.
"""

from typing import Any

import torch

from fastscore.batches.parts import tensors_of
from fastscore.graph.following.operations import name_of
from fastscore.modules.operations_run import OperationsRun

_DRAWN = 0.5  # of every distribution; of what is kept or not, all is kept
# operations whose results are drawn element by element, all alike; but not about means that layers make, by
# torch.normal, through which no gradient comes
_ALIKE = {"rand", "randn", "uniform", "normal", "exponential", "cauchy", "log_normal", "geometric"}


class SteadyDraws(OperationsRun):
    """In the block, what is drawn element by element is one number everywhere."""

    supports_higher_order_operators = True

    def operation(self, func: Any, args: Any, kwargs: Any) -> Any:
        out = func(*args, **kwargs)
        name = name_of(func).removesuffix("_")
        if name == "native_dropout" and isinstance(out, tuple):
            return args[0].clone(), torch.ones_like(out[1])
        if name == "bernoulli":
            out.fill_(1)
        elif name in ("rand_like", "randn_like") or (name in _ALIKE and all(x is out for x in tensors_of(args))):
            out.fill_(_DRAWN)
        return out
