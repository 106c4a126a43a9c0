"""Parts of a model that torch.jit made: one module each in evaluation copies, whose layers nobody sees."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_unflatten


class Scripted(nn.Module):
    """Calls a part that torch.jit made, as one node of autograd's graph.

    The part's own modules look like layers, and are not called when it runs: here it has none, and their parameters.
    """

    def __init__(self, part: torch.jit.ScriptModule) -> None:
        super().__init__()
        self._part = (part,)  # no child of it, that is
        self._parameters |= {name.replace(".", "_"): parameter for name, parameter in part.named_parameters()}
        self.training = part.training

    @property
    def part(self) -> torch.jit.ScriptModule:
        """What is called."""
        return self._part[0]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the part makes of its arguments."""
        values, form = tree_flatten((args, kwargs))
        followed = any(isinstance(value, Tensor) and value.requires_grad for value in values)
        if not followed or not torch.is_grad_enabled():
            return self.part(*args, **kwargs)
        made: list[Any] = []
        outputs = iter(_OneNode.apply(self, form, made, *values))
        found, returned = made
        return tree_unflatten([next(outputs) if isinstance(value, Tensor) else value for value in found], returned)

    def train(self, mode: bool = True) -> "Scripted":
        """Of the part, too."""
        self.part.train(mode)
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> "Scripted":
        self.part._apply(fn)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Scripted":
        return opaque(self.part)


def copied(part: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    """A copy whose parameters have no history, as those of copy.deepcopy() have."""
    with torch.no_grad():
        made: torch.jit.ScriptModule = copy.deepcopy(part)
    for new, parameter in zip(made.parameters(), part.parameters(), strict=True):
        new.requires_grad_(parameter.requires_grad)
    return made


def copies(model: nn.Module) -> dict[int, Any]:
    """For copy.deepcopy() of a model: id of each part that torch.jit made -> a copy of it."""
    return {id(part): copied(part) for _, part in outermost(model)}


def opaque(part: torch.jit.ScriptModule) -> Scripted:
    """A copy of the part, frozen."""
    scripted = Scripted(copied(part))
    for parameter in scripted.part.parameters():
        parameter.requires_grad_(False)
    return scripted


def outermost(model: nn.Module) -> Iterator[tuple[str, torch.jit.ScriptModule]]:
    """The parts of a model that torch.jit made, and that stand in no other, with their names."""
    work = [("", model)]
    while work:
        name, module = work.pop()
        if isinstance(module, torch.jit.ScriptModule):
            yield name, module
        else:
            work += [(f"{name}.{key}".lstrip("."), child) for key, child in module.named_children()]


class _OneNode(torch.autograd.Function):
    """Calls a part on copies of its arguments, whose own graph stays behind the node."""

    @staticmethod
    def forward(ctx: Any, scripted: Scripted, form: Any, made: list[Any], *values: Any) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            own = [value.detach().requires_grad_(value.requires_grad).clone() if isinstance(value, Tensor) else value
                   for value in values]
            args, kwargs = tree_unflatten(own, form)
            found, returned = tree_flatten(scripted.part(*args, **kwargs))
        if any(isinstance(value, Tensor) and value._version for value in own):
            raise ValueError(f"{scripted.part.original_name}, which torch.jit made, writes in place to what it is "
                             "called on, which cannot be followed: script it without")
        ctx.scripted, ctx.own = scripted, own
        ctx.outputs = [value for value in found if isinstance(value, Tensor)]
        made += [found, returned]
        outputs = tuple(value.detach() for value in ctx.outputs)
        ctx.mark_non_differentiable(*(output for output, value in zip(outputs, ctx.outputs, strict=True)
                                      if not value.requires_grad))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        pairs = [(output, gradient) for output, gradient in zip(ctx.outputs, gradients, strict=True)
                 if output.requires_grad and gradient is not None]
        wanted = [value for value in ctx.own if isinstance(value, Tensor) and value.requires_grad]
        found = iter(torch.autograd.grad([output for output, _ in pairs], wanted, [gradient for _, gradient in pairs],
                                         retain_graph=True, allow_unused=True))
        return None, None, None, *(next(found) if isinstance(value, Tensor) and value.requires_grad else None
                                   for value in ctx.own)
