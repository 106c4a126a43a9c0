"""Which of a model's weights a product is with: a layer's, or a parameter's that a module's own code reads."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from fastscore.batches.parts import memory_of, tensors_of
from fastscore.modules.inspection import submodule

_LOOKED_UP = ("embedding", "embedding_bag", "_embedding_bag", "_embedding_bag_forward_only")


class WeightProducts:
    """FLOPs of the products with each weight, in one run of a model.

    A product belongs to the Conv or Linear that runs it. Any other belongs to the last of its operands that is a
    parameter, a view of one, or computed from parameters and buffers alone (a standardised weight, the weights of some
    experts); where there is none, activations are multiplied with each other.
    """

    def __init__(self, model: nn.Module) -> None:
        self.flops: dict[str, float] = defaultdict(float)  # layer, or parameter: see `weight_name`
        self._layers = {name for name, module in model.named_modules()
                        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))}
        # storage -> (itself, the weights in it and their sizes; None: constants)
        self._known: dict[int, tuple[StorageWeakRef, dict[str, int] | None]] = {}
        for tensor in model.buffers():
            self._note(tensor, None)
        for name, parameter in model.named_parameters():
            weights = self._of(parameter) or {}
            self._note(parameter, {**weights, weight_name(model, name): parameter.numel()})

    def follow(self, operation: Any, args: Any, out: Any, product: bool) -> None:
        """Note what an operation makes of weights alone."""
        operands = list(_floating(args))
        alone = not product and operation._opname not in _LOOKED_UP and all(map(self._constant, operands))
        weights = {name: size for tensor in operands for name, size in (self._of(tensor) or {}).items()}
        for tensor in _floating(out):
            if alone and weights:
                self._note(tensor, weights)
            elif not alone and self._of(tensor) is not None:
                self._known.pop(memory_of(tensor))  # written over in place

    def credit(self, args: Any, flops: float, running: str) -> None:
        """Add a product's FLOPs to the weights that it is with. running: the innermost module that runs."""
        if running in self._layers:
            self.flops[running] += flops
            return
        weights = next((found for tensor in reversed(list(_floating(args))) if tensor.dim() > 1
                        and (found := self._of(tensor))), {})
        for name, size in weights.items():
            self.flops[name] += flops * size / sum(weights.values())

    def _note(self, tensor: Tensor, weights: dict[str, int] | None) -> None:
        if storage := memory_of(tensor):
            self._known[storage] = StorageWeakRef(tensor.untyped_storage()), weights

    def _constant(self, tensor: Tensor) -> bool:
        return tensor.dim() == 0 or self._find(tensor) is not None

    def _of(self, tensor: Tensor) -> dict[str, int] | None:
        found = self._find(tensor)
        return None if found is None else found[1]

    def _find(self, tensor: Tensor) -> tuple[StorageWeakRef, dict[str, int] | None] | None:
        found = self._known.get(memory_of(tensor))
        return None if found is None or found[0].expired() else found


def weight_name(model: nn.Module, parameter: str) -> str:
    """What a parameter is called in reports: as its module, or by its own qualified name where that holds others."""
    owner, _, _ = parameter.rpartition(".")
    owner, parametrized, _ = owner.partition(".parametrizations.")
    module = submodule(model, owner)
    return owner if owner and (parametrized or not module._modules) else parameter


def _floating(values: Any) -> Iterator[Tensor]:
    for tensor in tensors_of(values):
        if tensor.is_floating_point():
            yield tensor
