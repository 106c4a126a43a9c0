"""Modules that make something for each channel of nothing that layers made, as sinusoids of positions: with fewer
channels they go on making all, and return a part.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fastscore.modules.made_classes import Made, made_class
from fastscore.modules.narrower import without

RETURNED = "returned "  # before the dimension, from the end, and its size, in what surgery takes out of a module
_KEPT, _DIM = "_returned_entries", "_returned_dim"


class _ReturnsPart(Made):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the module returns, less what it has lost."""
        whole: Tensor = super().forward(*args, **kwargs)  # type: ignore[misc]
        return whole.index_select(vars(self)[_DIM], vars(self)["_buffers"][_KEPT].to(whole.device))


@cache
def _returns_part(cls: type[nn.Module]) -> type[nn.Module]:
    return made_class(_ReturnsPart, cls, _returns_part)


class Table(nn.Parameter):
    """A buffer, as long as it is a parameter: see fastscore.graph.cutting.own_tensors."""


def makes_alone(module: nn.Module) -> bool:
    """Whether a module has no parameters, and no buffers but integers: what it returns is of its code, and of what it
    is given. A Table is allowed, of which some code lets no gradient come back."""
    return not any(parameter is not None and not isinstance(parameter, Table) for part in module.modules()
                   for parameter in part._parameters.values()) and \
        not any(buffer is not None and buffer.is_floating_point() for buffer in module.buffers())


def attribute(dim: int, size: int) -> str:
    """What a member is called that is what a module returns along a dimension, from the end, of a size."""
    return f"{RETURNED}{dim} {size}"


def narrow(module: nn.Module, attribute: str, gone: Tensor) -> None:
    """Have a module return less, in place. attribute: as `attribute` makes it; gone: positions of what it returns."""
    dim, size = map(int, attribute.removeprefix(RETURNED).split())
    if _KEPT not in module._buffers:
        module.register_buffer(_KEPT, torch.arange(size), persistent=False)
        setattr(module, _DIM, dim)
        kind: Any = type(module)
        module.__class__ = _returns_part(kind)
    module.register_buffer(_KEPT, without(getattr(module, _KEPT), 0, gone), persistent=False)
