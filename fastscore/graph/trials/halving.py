"""Which of several things a trial fails with: found by halving, in few trials."""

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
Found = TypeVar("Found")


def first_failing(things: Sequence[T], found: Found, fails: Callable[[Sequence[T]], Found]) -> tuple[int, Found]:
    """(the place of the one with which `things`, tried in their order, begin to fail; what is found of those up to it).

    found: of all of them. fails: what is found of some; nothing, where these go well.
    """
    good, bad = 0, len(things)  # so many of the first go well, or fail
    while bad - good > 1:
        middle = (good + bad) // 2
        if part := fails(things[:middle]):
            bad, found = middle, part
        else:
            good = middle
    return bad - 1, found
