"""Lines that a run comes to, and parts of code that stand in them."""

import sys
from types import FrameType
from typing import Any

from fastscore.modules.lines_run import lines_run


def halves(x: int) -> int:
    if x % 2:
        raise ValueError("odd")
    return x // 2


def test_lines_of_a_run_as_far_as_it_comes() -> None:
    begin = halves.__code__.co_firstlineno
    for x, lines in ((4, {1, 3}), (3, {1, 2})):
        found = lines_run(lambda x=x: halves(x), {__file__})
        assert {(__file__, begin + line) for line in lines} == {each for each in found if each[1] <= begin + 3}
    assert lines_run(lambda: halves(4), {"elsewhere.py"}) == set()


def test_a_debugger_goes_on_afterwards() -> None:
    def debugger(frame: FrameType, event: str, value: Any) -> Any:
        return None

    before = sys.gettrace()
    sys.settrace(debugger)
    try:
        lines_run(lambda: halves(3), {__file__})
        assert sys.gettrace() is debugger
    finally:
        sys.settrace(before)
