"""Random numbers that a model draws in evaluation mode: where they show in what it returns; one in place of all."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastscore import rng
from fastscore.batches.parts import tensors_of
from fastscore.graph.following.operations import name_of
from fastscore.graph.trials.differences import all_close
from fastscore.modules.hooks import put_on
from fastscore.modules.inspection import device_of
from fastscore.modules.operations_run import OperationsRun

_NAMED = 3  # of the modules, in a warning
_DRAWN = 0.5  # of every distribution; of what is kept or not, all is kept
# operations whose results are drawn element by element, all alike; but not about means that layers make, by
# torch.normal, through which no gradient comes
_ALIKE = {"rand", "randn", "uniform", "normal", "exponential", "cauchy", "log_normal", "geometric"}


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


class SteadyDraws(OperationsRun):
    """In the block, what is drawn element by element is one number everywhere.

    A smaller model draws fewer, so that those that stay get other ones: dropout that runs in evaluation mode, noise
    that is added. Where every one is the same, what is left is what the channels do.
    """

    supports_higher_order_operators = True

    def operation(self, func: Any, args: Any, kwargs: Any) -> Any:
        out = func(*args, **kwargs)
        name = name_of(func).removesuffix("_")
        if name == "native_dropout" and isinstance(out, tuple):
            return args[0].clone(), torch.ones_like(out[1])
        if name == "bernoulli":
            out.fill_(1)
        elif name in ("rand_like", "randn_like") or (name in _ALIKE and all(x is out for x in tensors_of(args))):
            out.fill_(_DRAWN)
        return out
