"""Where a model's code draws random numbers in evaluation mode that show in what it returns."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastscore import rng
from fastscore.graph.trials.differences import all_close
from fastscore.modules.hooks import put_on
from fastscore.modules.inspection import device_of

_NAMED = 3  # of the modules, in a warning


def drawing(model: nn.Module, run: Callable[[nn.Module], Sequence[Tensor]]) -> tuple[str, ...]:
    """The innermost modules of an evaluation copy that draw, by name ("" is the model's own code); none where its
    output is the same whatever they draw, or it does not run."""
    device, drawn = device_of(model), dict[str, None]()
    try:
        with torch.no_grad():
            rng.start_over(device)
            with _noting(model, device, drawn):
                ones = run(model)
            rng.seed(1)
            others = run(model)
    except Exception:  # of the model's code, or forward=
        return ()
    return () if all(all_close(other, one) for one, other in zip(ones, others, strict=False)) else tuple(drawn)


def said(model: nn.Module, drawn: tuple[str, ...]) -> str:
    """What is said of a model that draws; empty of one that does not."""
    names = [f"{name} ({type(model.get_submodule(name)).__name__})" for name in drawn[:_NAMED] if name]
    names += [f"{len(drawn) - _NAMED} more"] if len(drawn) > _NAMED else []
    where = f", in {', '.join(names)}" if names else ""
    return f"{type(model).__name__} draws random numbers in evaluation mode{where} (dropout that stays on, or " \
           "noise): these are scores for the numbers that are drawn, others in every call. Where that is not meant, " \
           "have them drawn in training alone, as by F.dropout(x, p, self.training)" if drawn else ""


@contextmanager
def _noting(model: nn.Module, device: torch.device, drawn: dict[str, None]) -> Iterator[None]:
    """A block in which random numbers are drawn by the innermost module that runs."""
    inside, seen = list[str](), list(rng.states(device))

    def look() -> None:
        now = list(rng.states(device))
        if not all(map(torch.equal, now, seen)):
            seen[:] = now
            drawn.setdefault(inside[-1] if inside else "")

    def enter(name: str, *args: Any) -> None:
        look()
        inside.append(name)

    def leave(*args: Any) -> None:
        look()
        inside.pop()

    with put_on(handle for name, module in model.named_modules() for handle in (
            module.register_forward_pre_hook(partial(enter, name)), module.register_forward_hook(leave))):
        yield
