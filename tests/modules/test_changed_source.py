"""Source with other numbers, for those who read it."""

import inspect
import traceback
from types import FunctionType

import pytest

from fastscore.modules.changed_source import with_source


def one(x: int) -> str:
    return "é" * 2 + str(x + 16 * 5 *
                         5) if x else "é" + "ü" * (3 * 7) + str(x // (x + 0))


def twice(x: int) -> int:
    return x + 3 + x * 3


class Holder:
    """With a method, whose lines begin anywhere within brackets."""

    def method(self, x: int) -> str:
        return "é".join((str(x),
  "second", str(30)))


def changed(function: FunctionType, numbers: dict[int, int]) -> FunctionType:
    """A function with the source of `function` with other numbers, and its code as it is."""
    return FunctionType(with_source(function, function.__code__, numbers), function.__globals__)


def test_numbers_are_replaced_where_they_stand() -> None:
    made = changed(one, {21: 20, 2: 1})
    assert inspect.getsource(made) == inspect.getsource(one).replace("(3 * 7)", "(20)").replace("* 2 +", "* 1 +")
    with pytest.raises(ZeroDivisionError) as raised:
        made(0)
    assert '"ü" * (20) + str(x // (x + 0))' in "".join(traceback.format_exception(raised.value))


def test_lines_may_begin_before_the_first() -> None:
    made = changed(Holder.method, {30: 29})
    assert inspect.getsource(made).strip() == inspect.getsource(Holder.method).strip().replace("30", "29")


def test_code_stays_whose_source_is_not_sure() -> None:
    for function, numbers in ((one, {400: 399}), (twice, {3: 2}), (one, {5: 4}), (eval("lambda x: x + 4"), {4: 3})):
        assert changed(function, numbers).__code__ == function.__code__
