"""Code that turns gradients off, run as if it did not: what it reads is seen, as of what picks keys, or tokens."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class GradientsStay(TorchFunctionMode):
    """Within the block, torch.no_grad() and torch.set_grad_enabled(False) turn nothing off."""

    def __torch_function__(self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:
        return None if func is torch._C._set_grad_enabled else func(*args, **(kwargs or {}))
