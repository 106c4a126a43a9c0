"""Operations on nested tensors, which PyTorch's own counter of operations cannot run."""

from collections.abc import Container, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from fastscore.batches.parts import tensors_of
from fastscore.modules.weights.weight_products import WeightProducts


class OfNested(TorchDispatchMode):
    """Within the block, runs them out of sight of the modes around it.

    flops: those of Linears. unknown: other products -> the modules that they run in, in order.
    """

    def __init__(self, known: Container[Any], weights: WeightProducts, running: Sequence[str],
                 unknown: dict[str, dict[str, None]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0
        self._known, self._weights, self._running, self._unknown = known, weights, running, unknown

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operands = (*args, *kwargs.values())
        if not any(tensor.is_nested for tensor in tensors_of(operands)):
            return func(*args, **kwargs)
        place = self._running[-1] if self._running else ""
        with _disable_current_modes():
            if func is torch.ops.aten.linear.default:
                flops = 2 * sum(part.numel() for part in args[0].unbind()) * len(args[1])
                self._weights.credit(operands, flops, place)
                self.flops += flops
            elif func._opname == "matmul" or func._overloadpacket in self._known:
                self._unknown.setdefault(f"{func._opname} of nested tensors", {})[place or "the model itself"] = None
            return func(*args, **kwargs)
