"""Rotary tables that a model hands to its attentions, as one of them reads them that has lost head dimensions."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastscore.modules.narrower import without

TURNED = "rotary_ndims"  # where attentions of GPT-NeoX, Phi, StableLM and others have it
_KEPT, _WIDTH = "rotary_dims", "rotary_width"  # the entries that are read, int64, of tables as wide as that


class _ReadsPart:
    """What the classes made here have besides the code of their modules."""

    _reads: type[nn.Module]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the class's own, with tables that are as wide as its heads are."""
        kept, width = getattr(self, _KEPT), getattr(self, _WIDTH)

        def part(value: Any) -> Any:
            return type(value)(each.index_select(-1, kept) for each in value) if _tables(value) == width else value

        return super().forward(*map(part, args), **{  # type: ignore[misc]
            name: part(value) for name, value in kwargs.items()})

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _new, (self._reads,), self.__dict__.copy()


def _new(cls: type[nn.Module]) -> nn.Module:
    made: nn.Module = object.__new__(_reads_part(cls))
    return made


_made: dict[type[nn.Module], type[nn.Module]] = {}


def _reads_part(cls: type[nn.Module]) -> type[nn.Module]:
    if cls not in _made:
        _made[cls] = type(cls.__name__, (_ReadsPart, cls), {"_reads": cls, "__module__": cls.__module__,
                                                           "__doc__": cls.__doc__})
    return _made[cls]


def reads_part(module: nn.Module) -> bool:
    """Whether a module has lost entries of its tables: see `narrow`."""
    return isinstance(module, _ReadsPart)


def table_width(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """How wide the tables of cosines and sines are that a module is called with, a pair of tensors, as transformers'
    decoders call their attentions, or what it reads of them; None where there are none."""
    width = next((width for value in (*args, *kwargs.values()) if (width := _tables(value)) is not None), None)
    kept = module._buffers.get(_KEPT)
    return len(kept) if kept is not None and width == getattr(module, _WIDTH) else width


def turned(module: nn.Module, width: int) -> int:
    """How many of the `width` dimensions of a head, the first, a module turns by its tables."""
    part = vars(module).get(TURNED)
    return part if isinstance(part, int) else width


def narrow(module: nn.Module, gone: Tensor, width: int) -> None:
    """Have a module read its tables without the entries `gone` (int64), in place.

    width: of what it reads of them today.
    """
    kept = module._buffers.get(_KEPT)
    if kept is None:
        device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
        kept = torch.arange(width, device=device)
        setattr(module, _WIDTH, width)
        module.__class__ = _reads_part(type(module))
    module.register_buffer(_KEPT, without(kept, 0, gone), persistent=False)


def _tables(value: object) -> int | None:
    """The width of a pair of tables; None of all else."""
    if not isinstance(value, (tuple, list)) or len(value) != 2 or not all(
            isinstance(each, Tensor) and each.is_floating_point() and each.dim() > 1 for each in value):
        return None
    width: int = value[0].shape[-1]
    return width if value[0].shape == value[1].shape else None
