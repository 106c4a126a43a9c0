"""What stands where a residual branch was: zeros, of the shape of its input."""

from typing import Any

import torch
from torch import Tensor, nn

from fastscore.batches import tensors_of


class ZeroBranch(nn.Module):
    """Adds nothing to the stream that it reads.

    Attributes:
        returns: how many things it returns: 0 for a tensor alone; else a tuple of zeros and, for all others, None.
    """

    def __init__(self, returns: int = 0) -> None:
        super().__init__()
        self.returns = returns

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Zeros like the first floating-point tensor that it is given."""
        x = first_floating(args, kwargs)
        assert x is not None
        zeros = torch.zeros_like(x)
        return (zeros, *[None] * (self.returns - 1)) if self.returns else zeros

    def extra_repr(self) -> str:
        """What it returns."""
        return f"returns={self.returns}" if self.returns else ""


def first_floating(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The first floating-point tensor among the arguments of a call; None where there is none."""
    return next((tensor for tensor in tensors_of((args, kwargs)) if tensor.is_floating_point()), None)


def put_zeros(model: nn.Module, name: str, returns: int) -> None:
    """Put zeros in the place of the branch of that qualified name, in place."""
    put(model, name, ZeroBranch(returns).train(model.get_submodule(name).training))


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where that name stands, in place."""
    path, _, key = name.rpartition(".")
    model.get_submodule(path)._modules[key] = module
