"""Which lines of Python a run comes to, and which parts of the code have run, as these say."""

import ast
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from types import FrameType, FunctionType
from typing import Any, TypeAlias

Line: TypeAlias = tuple[str, int]  # file, number
Parents: TypeAlias = Mapping[ast.AST, ast.AST]


def lines_run(run: Callable[[], object], files: Collection[str]) -> set[Line]:
    """The lines of some files that `run` comes to in this thread, as far as it comes."""
    found = set[Line]()

    def called(frame: FrameType, event: str, value: Any) -> Any:
        return noted if frame.f_code.co_filename in files else None

    def noted(frame: FrameType, event: str, value: Any) -> Any:
        if event == "line":
            found.add((frame.f_code.co_filename, frame.f_lineno))
        return noted

    before = sys.gettrace()  # a debugger's
    sys.settrace(called)
    try:
        with suppress(Exception):
            run()
    finally:
        sys.settrace(before)
    return found


def are_among(lines: Collection[Line], function: FunctionType, node: Any) -> bool:
    """Whether one of the lines of a part of a function, as its source says it, is among some."""
    code, before = function.__code__, function.__code__.co_firstlineno - 1
    return any((code.co_filename, before + line) in lines for line in range(node.lineno, node.end_lineno + 1))


def has_run(function: FunctionType, node: ast.AST, parents: Parents, lines: Collection[Line]) -> bool:
    """Whether an expression in a function is known to have run, where these lines have: of what stands in the line of
    the condition that it depends on, nobody knows."""
    part: Any = node
    for above in outwards(node, parents):
        if isinstance(above, ast.Lambda):
            return False
        if isinstance(above, ast.IfExp | ast.If | ast.While) and part is not above.test and (
                part.lineno in _lines_beside(part, above)):
            return False
        if hasattr(above, "body") and (isinstance(part, ast.stmt) or isinstance(above, ast.stmt | ast.IfExp)):
            return are_among(lines, function, part)
        part = above if isinstance(above, ast.expr | ast.stmt) else part
    return False


def _lines_beside(part: ast.AST, choice: Any) -> set[int]:
    """The lines where a condition stands, or the other side of a choice between expressions."""
    others = [choice.test, *((choice.body, choice.orelse) if isinstance(choice, ast.IfExp) else ())]
    return {line for each in others if each is not part for line in (each.lineno, each.end_lineno)}


def outwards(node: ast.AST, parents: Parents) -> Iterator[ast.AST]:
    """What a part of the code is a part of, the innermost first."""
    while node in parents:
        node = parents[node]
        yield node
