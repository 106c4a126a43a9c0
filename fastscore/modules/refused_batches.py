"""Batches that a model cannot run on: which argument gave them, which layer raised, and the way out."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from fastscore.batches.calls import Forward, way_out
from fastscore.batches.parts import Batch, first_tensor
from fastscore.modules.frames import where

# what PyTorch, and models that check what they are given, raise; classes of the user's own, as all else, come through
_RAISED = (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError, KeyError, AttributeError,
           AssertionError)


@contextmanager
def naming_argument(said: str, model: nn.Module, forward: Forward, batch: Batch) -> Iterator[None]:
    """In the block, which runs a model by `forward` on a batch, an error of its code is a ValueError that begins as
    `said`: with the argument."""
    try:
        yield
    except Exception as error:
        if type(error) not in _RAISED:
            raise
        tensor = first_tensor(batch)
        given = "" if tensor is None else f" of {tensor.dtype} {list(tensor.shape)}"
        advice = way_out(model, forward, batch, error) or "; give what the model takes, or forward="
        raise ValueError(f"{said}{given}: {raised_in(model, error)}{advice}") from error


def raised_in(model: nn.Module, error: BaseException) -> str:
    """An error that came through a model's code, after the innermost of its modules, if it came through one."""
    layer = where(model, error.__traceback__)
    return f"{'' if layer == type(model).__name__ else f'{layer}: '}{type(error).__name__}: {error}"
