"""What a traced run shows beside what autograd keeps of it."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastscore.batches import tensors_of
from fastscore.graph.cutting.cut_widths import Cut, calling_module, cut_of

_SPLITS = (torch.split, Tensor.split, torch.split_with_sizes, Tensor.split_with_sizes)


@contextmanager
def outputs_of(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, list[Any]]]:
    """Module -> the autograd function of the tensor that it returned, in each call within the block."""
    made: dict[nn.Module, list[Any]] = {}

    def note(module: nn.Module, args: Any, output: Any) -> None:
        made.setdefault(module, []).append(output.grad_fn if isinstance(output, Tensor) else None)

    handles = [module.register_forward_hook(note) for module in modules]
    try:
        yield made
    finally:
        for handle in handles:
            handle.remove()


class NotedCalls(TorchFunctionMode):
    """Notes what autograd does not keep: splits into parts of a given width (which look like those of chunk()) and
    slices, with the module whose code they stand in, the widths that a concatenation joins, those of tensors that
    need no gradient included, and which modules' code reads the weights of other modules' layers.

    weights: id of a weight -> the layers that hold it, with their names.
    """

    def __init__(self, weights: Mapping[int, Mapping[str, nn.Module]]) -> None:
        super().__init__()
        self._weights = weights
        self.read_elsewhere: dict[str, str] = {}  # layer -> the class of the module whose code reads its weight
        self.cuts: list[Cut] = []
        self.concatenated: list[tuple[Any, list[int]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        part = output[0] if func in _SPLITS and output else output if func is Tensor.__getitem__ else None
        if part is not None and part.grad_fn is not None and (cut := cut_of(part.grad_fn)) is not None:
            self.cuts.append(cut)
        for weight in tensors_of((args, tuple(kwargs.values()))):
            if (layers := self._weights.get(id(weight))) and _computed_from(output, weight, args, kwargs):
                reader = calling_module()
                if reader is not None and not any(reader is layer for layer in layers.values()):
                    self.read_elsewhere |= dict.fromkeys(layers, type(reader).__name__)
        if func in (torch.cat, torch.concat, torch.concatenate) and output.grad_fn is not None:
            tensors = args[0] if args else kwargs["tensors"]
            dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
            self.concatenated.append((output.grad_fn, [tensor.shape[dim] if tensor.dim() > 1 else tensor.numel()
                                                       for tensor in tensors]))
        return output


def _computed_from(output: Any, weight: Tensor, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether autograd has the output of a function of `args` computed from the weight itself."""
    others = {tensor.grad_fn for tensor in tensors_of((args, tuple(kwargs.values()))) if tensor is not weight}
    work = [tensor.grad_fn for tensor in tensors_of(output)]
    while work:
        node = work.pop()
        if node is None or node in others:
            continue
        if getattr(node, "variable", None) is weight:
            return True
        work += [source for source, _ in node.next_functions]
    return False
