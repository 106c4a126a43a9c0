"""What runs each time, and what with FASTSCORE_NIGHTLY=1 alone."""

import os
from collections.abc import Hashable, Iterable
from itertools import product
from typing import Any

NIGHTLY = "FASTSCORE_NIGHTLY" in os.environ

_met: set[tuple[str, Hashable]] = set()


def first_of_its_file(what: Hashable = None) -> bool:
    """Whether the tests of the file that runs meet this for the first time; with FASTSCORE_NIGHTLY=1, always: for what
    takes long, and goes the same way for each."""
    key = os.environ["PYTEST_CURRENT_TEST"].partition("::")[0], what
    met = key in _met
    _met.add(key)
    return NIGHTLY or not met


def thinned(*axes: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Each combination of the values of all axes but the last, with one of the last, which take turns: so each meets
    each value of the others, where there are enough. With FASTSCORE_NIGHTLY=1 all combinations."""
    lists = [list(axis) for axis in axes]
    numbered = product(*(enumerate(values) for values in lists))
    return [tuple(value for _, value in values) for values in numbered
            if NIGHTLY or sum(number for number, _ in values) % len(lists[-1]) == 0]
