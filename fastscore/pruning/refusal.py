"""Where a smaller model does not run, or returns something else: which layers to ignore, so that it does."""

from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

from torch import Tensor, nn

Removed = Mapping[str, Tensor]  # group -> the channels that go, int64 [R]
_Result = TypeVar("_Result")


class _HasModel(Protocol):
    @property
    def model(self) -> nn.Module: ...


_Pruned = TypeVar("_Pruned", bound=_HasModel)


class OtherShape(RuntimeError):
    """What a smaller model returns in place of what the dense one does."""


class DoesNotRun(RuntimeError):
    """Where a smaller model stops, and what was said there."""


def does(error: Exception) -> str:
    """What a smaller model does in place of running, in words."""
    if isinstance(error, OtherShape):
        return f"returns {error}"
    return f"does not run ({error if isinstance(error, DoesNotRun) else f'{type(error).__name__}: {error}'})"


def checked(attempt: Callable[[Removed], _Result], removed: Removed) -> _Result:
    """attempt(removed), which makes a smaller model and runs it.

    Raises RuntimeError where it raises anything: what that was, and the groups without which it runs, as `ignore` takes
    them.
    """
    try:
        return attempt(removed)
    except Exception as error:  # whatever the model's code does with a width that it does not expect
        if _fails(attempt, {}):
            raise RuntimeError(f"the model {does(error)} by itself, with all its channels, too: give it, and "
                               "example_inputs, a dtype and a forward= that its code takes") from error
        names = _culprits(attempt, removed)
        advice = f"keep the channels that it depends on: ignore={names}" if names else "tried again, it did not fail"
        raise RuntimeError(f"the pruned model {does(error)}: its forward depends on a width that changed; {advice}"
                           ) from error


def repaired(result: _Pruned, run: Callable[[nn.Module], object]) -> _Pruned:
    """A result whose model ran before it was repaired, and does so now. Raises RuntimeError where it does not."""
    try:
        run(result.model)
    except Exception as error:  # likewise
        raise RuntimeError(f"the pruned model {does(error)} once it is repaired, and did before: leave calibration= out"
                           ) from error
    return result


def _fails(attempt: Callable[[Removed], object], removed: Removed) -> bool:
    try:
        attempt(removed)
    except Exception:  # likewise
        return True
    return False


def _culprits(attempt: Callable[[Removed], object], removed: Removed) -> list[str]:
    """Groups without which the attempt succeeds, found one after another by halving."""
    def fails(names: list[str]) -> bool:
        return _fails(attempt, {name: removed[name] for name in names})

    left, culprits = list(removed), list[str]()
    while left and fails(left):
        good, bad = 0, len(left)  # so many of the first groups go well, or fail
        while bad - good > 1:
            middle = (good + bad) // 2
            good, bad = (good, middle) if fails(left[:middle]) else (middle, bad)
        culprits.append(left.pop(bad - 1))
    return list(dict.fromkeys(name.partition(" (")[0] for name in culprits))  # of a branch, or heads, the layer
