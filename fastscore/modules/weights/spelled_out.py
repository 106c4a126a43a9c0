"""Convolutions whose settings code has changed since they were made: `conv.padding = 2`, as encoders whose strides are
replaced by dilation do. PyTorch computes by what is set there, and leaves what it derived from the old numbers."""

from typing import Any

from torch import nn

from fastscore.modules.inspection import runs_own_code


def spell_out(model: nn.Module) -> nn.Module:
    """Have each convolution of a copy hold one number for each dimension, and the padding that follows from those, as
    one has that was made with them; returns the copy. Those of classes with code of their own, which may read such a
    number, stay as they are."""
    for layer in model.modules():
        if isinstance(layer, nn.modules.conv._ConvNd) and not runs_own_code(layer):
            _spell_out(layer)
    return model


def _spell_out(conv: Any) -> None:
    for name in ("stride", "padding", "dilation", "output_padding"):
        if not isinstance(value := getattr(conv, name), str):
            given = tuple(value) if isinstance(value, (tuple, list)) else (value,)
            setattr(conv, name, given * len(conv.kernel_size) if len(given) == 1 else given)
    if conv.padding_mode == "zeros" and not isinstance(conv.padding, str):
        conv._reversed_padding_repeated_twice = tuple(size for size in reversed(conv.padding) for _ in range(2))
