"""Whose code runs, or has raised an exception, as Python's stack shows it."""

import sys
from collections.abc import Iterable, Iterator, Mapping
from types import FrameType, TracebackType
from typing import Any

from torch import nn


def outwards() -> Iterator[FrameType]:
    """From who has called a function that asks, outwards."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back


def owner(frame: FrameType) -> Any:
    """What the first argument of the code of a frame is: of a method, its object."""
    code = frame.f_code
    return frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None


def variables(frame: FrameType) -> dict[str, Any]:
    """What the variables of code hold; `self` is the object of a method, whatever that calls it."""
    return {"self": owner(frame), **frame.f_locals}


def called(frame: FrameType) -> nn.Module | None:
    """The module that is called by a frame of PyTorch's; None of any other."""
    return frame.f_locals["self"] if frame.f_code is nn.Module._call_impl.__code__ else None


def innermost(stack: Iterable[FrameType]) -> nn.Module | None:
    """The innermost module that is called, of frames from within outwards."""
    return next(filter(None, map(called, stack)), None)


def where(model: nn.Module, traceback: TracebackType | None) -> str:
    """The innermost module of `model` whose code an exception came through."""
    names: Mapping[int, str] = {id(module): name for name, module in model.named_modules()}
    found: nn.Module = model
    while traceback is not None:
        running = owner(traceback.tb_frame)
        if isinstance(running, nn.Module) and id(running) in names:
            found = running
        traceback = traceback.tb_next
    name = names[id(found)]
    return f"{name} ({type(found).__name__})" if name else type(found).__name__
