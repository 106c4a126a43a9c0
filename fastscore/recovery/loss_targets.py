"""What a loss of the user's own takes the dense network's output for."""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

# functions of PyTorch that take probabilities for targets -> what makes these of logits
_OF_PROBABILITIES: Mapping[Any, str] = {F.cross_entropy: "softmax(1)", F.binary_cross_entropy_with_logits: "sigmoid()",
                                        F.binary_cross_entropy: "sigmoid()", F.kl_div: "softmax(1)"}


class TargetsChecked(TorchFunctionMode):
    """Within it, a function of PyTorch that takes probabilities for targets raises ValueError where it is given logits,
    of which it would make a number that means nothing; and F.kl_div, which reads their logarithms, where its input is
    none."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (made := _OF_PROBABILITIES.get(func)) is not None:
            given = dict(zip(("input", "target"), args, strict=False)) | (kwargs or {})
            target, log = given["target"], given.get("log_target", False)
            if func is F.kl_div and _outside(given["input"].exp()):
                raise ValueError("loss: kl_div takes logarithms of probabilities, and was given logits: their "
                                 ".log_softmax(1)")
            if isinstance(target, Tensor) and target.is_floating_point() and _outside(target.exp() if log else target):
                raise ValueError(f"loss: {func.__name__} takes probabilities for targets, and the dense network's "
                                 f"output was given, which is none: give its .{made}, or leave loss= out, which "
                                 "compares what both decide")
        return func(*args, **(kwargs or {}))


def _outside(x: Tensor) -> bool:
    """Whether any value is no probability, by more than rounding."""
    return bool(((x < -1e-3) | (x > 1 + 1e-3)).any())
