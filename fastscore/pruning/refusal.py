"""Where a smaller model does not run, or returns something else: without which groups' loss it does."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

from torch import Tensor

from fastscore.graph.trials.halving import first_failing

Removed = Mapping[str, Tensor]  # group -> the channels that go, int64 [R]
_Result = TypeVar("_Result")


class OtherShape(RuntimeError):
    """What a smaller model returns in place of what the dense one does."""


class DoesNotRun(RuntimeError):
    """Where a smaller model stops, and what was said there."""


class FailsNarrowerError(RuntimeError):
    """A smaller model that does not run, of one that does.

    groups: that it runs without, one after the other. fails: tells of others than `removed`. what: what the model does
    in place of running.
    """

    def __init__(self, groups: Sequence[str], removed: Removed, fails: Callable[[Removed], bool], what: str) -> None:
        super().__init__(f"the pruned model {what}: its forward depends on the width of {', '.join(groups)}")
        self.groups, self.removed, self.fails, self.what = groups, removed, fails, what

    def __reduce__(self) -> tuple[type[RuntimeError], tuple[str]]:
        return RuntimeError, (str(self),)  # in another process there is no model to try


def does(error: Exception) -> str:
    """What a smaller model does in place of running, in words."""
    if isinstance(error, OtherShape):
        return f"returns {error}"
    return f"does not run ({error if isinstance(error, DoesNotRun) else f'{type(error).__name__}: {error}'})"


def checked(attempt: Callable[[Removed], _Result], removed: Removed) -> _Result:
    """attempt(removed), which makes a smaller model and runs it.

    Raises RuntimeError where it raises anything, with what that was; FailsNarrowerError, with the groups without which
    it runs, where it runs without any.
    """
    try:
        return attempt(removed)
    except Exception as error:  # whatever the model's code does with a width that it does not expect
        if _fails(attempt, {}):
            raise RuntimeError(f"the model {does(error)} by itself, with all its channels, too: give it, and "
                               "example_inputs, a dtype and a forward= that its code takes") from error
        if names := _culprits(attempt, removed):
            raise FailsNarrowerError(names, removed, partial(_fails, attempt), does(error)) from error
        raise RuntimeError(f"the pruned model {does(error)}; tried again, it did not fail") from error


def _fails(attempt: Callable[[Removed], object], removed: Removed) -> bool:
    try:
        attempt(removed)
    except Exception:  # likewise
        return True
    return False


def _culprits(attempt: Callable[[Removed], object], removed: Removed) -> list[str]:
    """Groups without which the attempt succeeds, found one after another by halving."""
    def fails(names: Sequence[str]) -> bool:
        return _fails(attempt, {name: removed[name] for name in names})

    left, culprits = list(removed), list[str]()
    while left and fails(left):
        culprits.append(left.pop(first_failing(left, True, fails)[0]))
    return culprits
