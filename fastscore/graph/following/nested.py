"""Nested tensors inside of a model, in which channels are not followed: the layers that see them stay, and so do the
channels that go into them; what comes out of them is one operation of the traced graph."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastscore.batches.parts import map_tensors, tensors_of
from fastscore.modules import hooks

WAY_OUT = "in which channels are not followed: it is scored where the model's code pads what it joins " \
          "(torch.nn.utils.rnn.pad_sequence), and masks the padding"
INTO = f"its channels go into a nested tensor, {WAY_OUT}"


class Nested:
    """What each nested tensor of a run is made of, and what comes out of them."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[Tensor, list[Tensor]]] = {}  # id -> the nested tensor, what it is made of

    def passed(self, args: Any, kwargs: Mapping[str, Any], output: Any) -> Any:
        """The output of a function; where nested tensors go in and others come out, as one node of autograd's graph
        whose inputs are all that the nested ones are made of."""
        made = [tensor for tensor in tensors_of(output) if tensor.is_nested]
        if not made and not self._made:
            return output
        sources: dict[int, Tensor] = {}
        among = False
        for tensor in tensors_of((args, tuple(kwargs.values()))):
            nested, of = self._made.get(id(tensor), (None, ()))
            among |= nested is not None
            sources |= {id(source): source for source in ([tensor] if nested is None else of)
                        if source.grad_fn is not None and not source.is_nested}
        for tensor in made:
            self._made[id(tensor)] = tensor, list(sources.values())
        if made or not among:
            return output
        return map_tensors(lambda tensor: _OneNode.apply(tensor.detach(), torch.empty(0, requires_grad=True),
                                                         *sources.values())
                           if tensor.grad_fn is not None else tensor, output)

    def forget(self) -> None:
        """Let go the tensors."""
        self._made.clear()


def seeing(model: nn.Module, layers: Mapping[str, nn.Module], run: Callable[[nn.Module], object]) -> set[str]:
    """Those of the layers of a model that nested tensors come to, or come from, in one run."""
    return hooks.layers_that(layers, lambda: run(model), lambda args, output: any(
        tensor.is_nested for tensor in tensors_of((args, output))))


def comes_out(function: Any) -> bool:
    """Whether an autograd function is of what comes out of nested tensors."""
    return getattr(function, "out_of_nested", False)


class _OneNode(torch.autograd.Function):
    """The first of its arguments, as computed from the others, of which one at least needs a gradient."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, *sources: Tensor) -> Tensor:
        ctx.out_of_nested = True
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError("of a traced run, gradients are not taken")
