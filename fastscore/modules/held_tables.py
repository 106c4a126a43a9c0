"""Tensors that modules keep in attributes, and which are neither parameters nor buffers, as tables of positions that
they make once: they are cut with the channels that they meet.
"""

import dis
from collections.abc import Iterator
from types import CodeType

import torch
from torch import Tensor, nn

from fastscore.modules.reachable_code import ReachableCode
from fastscore.modules.returned_part import Table

HELD = "held "  # before the dimension, and the name, in what surgery takes out of a module
_SETTERS = ("setattr", "__setattr__", "register_buffer")


def of(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """(module, name, tensor) of each, and of buffers as long as they are parameters."""
    for module in model.modules():
        for name, value in (*vars(module).items(), *module._parameters.items()):
            if ((type(value) is Tensor and not value.requires_grad) or isinstance(value, Table)) and \
                    value.is_floating_point() and value.layout is torch.strided and value.numel() > 1:
                yield module, name, value


def attribute(name: str, dim: int) -> str:
    """What a member is called that is such a tensor along a dimension."""
    return f"{HELD}{dim} {name}"


def place(attribute: str) -> tuple[str, int]:
    """(name, dimension) of what `attribute` made."""
    dim, name = attribute.removeprefix(HELD).split()
    return name, int(dim)


def is_made_anew(name: str, code: ReachableCode) -> bool:
    """Whether code that a model may run puts something else in an attribute of that name, of any module."""
    return any(_stores(function.__code__, name) or not code.functions[function].isdisjoint(_SETTERS)
               for function in code.mention(name) if function.__name__ != "__init__")


def _stores(code: CodeType, name: str) -> bool:
    inner = (part for part in code.co_consts if isinstance(part, CodeType))
    return any(step.opname == "STORE_ATTR" and step.argval == name for step in dis.get_instructions(code)) or \
        any(_stores(part, name) for part in inner)
