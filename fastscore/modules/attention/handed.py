"""What a model hands to its attentions, as one of them reads it that has lost heads or dimensions of heads: rotary
tables, of which it reads some entries, and biases for each head (ALiBi), of which it reads those of its heads."""

import inspect
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fastscore.modules.made_classes import Made, made_class, taken_apart
from fastscore.modules.narrower import without

TURNED = "rotary_ndims"  # where attentions of GPT-NeoX, Phi, StableLM and others have it
_KEPT, _WIDTH = "rotary_dims", "rotary_width"  # the entries that are read, int64, of tables as wide as that
_HEADS, _OF, _BIASES = "handed_heads", "handed_of", "handed_biases"  # heads read, int64, of so many; of what arguments


class _ReadsPart(Made):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the class's own, with tables that are as wide as its heads are, and biases of its heads alone."""
        buffers, biases = vars(self)["_buffers"], vars(self).get(_BIASES, ())
        names = _names(taken_apart(type(self))[0], args) if biases else [""] * len(args)

        def part(name: str, value: Any) -> Any:
            if _KEPT in buffers and _tables(value) == getattr(self, _WIDTH):
                return type(value)(each.index_select(-1, buffers[_KEPT]) for each in value)
            return _of_heads(value, buffers[_HEADS], getattr(self, _OF)) if name in biases else value

        return super().forward(*map(part, names, args), **{  # type: ignore[misc]
            name: part(name, value) for name, value in kwargs.items()})


@cache
def _reads_part(cls: type[nn.Module]) -> type[nn.Module]:
    return cls if issubclass(cls, _ReadsPart) else made_class(_ReadsPart, cls, _reads_part)


def reads_part(module: nn.Module) -> bool:
    """Whether a module has lost entries of its tables: see `narrow`."""
    return _KEPT in module._buffers


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
    _keep(module, _KEPT, _WIDTH, gone, width)


def biases(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], heads: int) -> tuple[str, ...]:
    """The arguments of a call that hold something for each of `heads` heads, its own: of four or five dimensions in
    the last but two, as T5's and, block by block, LongT5's, or of three in the first, for each sample or for all, as
    BLOOM, MPT and Falcon have ALiBi's biases; those of which it reads a part already."""
    if _BIASES in vars(module):
        return tuple(vars(module)[_BIASES])
    given = {**dict(zip(_names(type(module), args), args, strict=False)), **kwargs}
    samples = len(first) if isinstance(first := next(iter(given.values()), None), Tensor) and first.dim() else 1
    return tuple(name for name, value in list(given.items())[1:] if name and isinstance(value, Tensor) and (
        (value.dim() in (4, 5) and value.shape[-3] == heads > 1)
        or (value.dim() == 3 and value.shape[1] == 1 < heads and len(value) in (heads, samples * heads))))


def narrow_biases(module: nn.Module, gone: Tensor, heads: int, arguments: Sequence[str]) -> None:
    """Have a module read arguments without what they hold for the heads `gone` (int64), in place.

    heads: that the module has today.
    """
    setattr(module, _BIASES, tuple(arguments))
    _keep(module, _HEADS, _OF, gone, heads)


def _keep(module: nn.Module, kept: str, of: str, gone: Tensor, size: int) -> None:
    """Take `gone` off what the buffer `kept` tells of `of` things: `size` today."""
    if kept not in module._buffers:
        device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
        module.register_buffer(kept, torch.arange(size, device=device), persistent=False)
        setattr(module, of, size)
        kind: Any = type(module)
        module.__class__ = _reads_part(kind)
    module.register_buffer(kept, without(getattr(module, kept), 0, gone), persistent=False)


def _names(cls: type[nn.Module], args: tuple[Any, ...]) -> list[str]:
    """What the forward of a class calls what it is given by position; empty for more than it names."""
    names = [name for name, parameter in inspect.signature(cls.forward).parameters.items()
             if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)][1:]
    return [*names, *[""] * len(args)][:len(args)]


def _of_heads(value: Any, kept: Tensor, heads: int) -> Any:
    """What an argument holds for the heads `kept`."""
    if not isinstance(value, Tensor) or value.dim() not in (3, 4, 5):
        return value
    dim = value.dim() - 3
    if value.shape[dim] % heads or (dim and value.shape[dim] != heads):
        return value  # as a mask for all heads
    rows = torch.arange(value.shape[dim], device=value.device).view(-1, heads)
    return value.index_select(dim, rows.index_select(1, kept.to(value.device)).flatten())


def _tables(value: object) -> int | None:
    """The width of a pair of tables; None of all else."""
    if not isinstance(value, (tuple, list)) or len(value) != 2 or not all(
            isinstance(each, Tensor) and each.is_floating_point() and each.dim() > 1 for each in value):
        return None
    width: int = value[0].shape[-1]
    return width if value[0].shape == value[1].shape else None
