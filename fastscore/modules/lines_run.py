"""Which lines of Python a run comes to, and which parts of the code have run, as these say."""

import ast
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import CodeType, FrameType, FunctionType
from typing import Any, TypeAlias

Line: TypeAlias = tuple[str, int]  # file, number
Parents: TypeAlias = Mapping[ast.AST, ast.AST]

_CHOICES = (ast.IfExp, ast.BoolOp, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def lines_run(run: Callable[[], object], files: Collection[str]) -> set[Line]:
    """The lines of some files that `run` comes to in this thread, as far as it comes."""
    found = set[Line]()

    def see(frame: FrameType, event: str) -> None:
        if event == "line":
            found.add((frame.f_code.co_filename, frame.f_lineno))

    with traced(lambda code: code.co_filename in files, see), suppress(Exception):
        run()
    return found


class _Watch:
    """Sees each line, or instruction, of some code before it runs. An object, as functions that return themselves would
    keep alive what they see."""

    def __init__(self, looks_at: Callable[[CodeType], object], see: Callable[[FrameType, str], None],
                 instructions: bool) -> None:
        self._looks_at, self._see, self._instructions = looks_at, see, instructions

    def called(self, frame: FrameType, event: str, value: Any) -> Any:
        if not self._looks_at(frame.f_code):
            return None
        frame.f_trace_opcodes = self._instructions
        return self._noted

    def _noted(self, frame: FrameType, event: str, value: Any) -> Any:
        with suppress(Exception):  # which would be the code's that runs
            self._see(frame, event)
        return self._noted


@contextmanager
def traced(looks_at: Callable[[CodeType], object], see: Callable[[FrameType, str], None], instructions: bool = False
           ) -> Iterator[None]:
    """A block in which each line, or instruction, of the code that is looked at is seen before it runs, in this thread.
    """
    before = sys.gettrace()  # a debugger's
    sys.settrace(_Watch(looks_at, see, instructions).called)
    try:
        yield
    finally:
        sys.settrace(before)


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


def is_chosen(node: Any, parents: Parents) -> bool:
    """Whether an expression may be passed by, where what else stands in its line runs."""
    return any(node not in ast.walk(_first(each)) for each in outwards(node, parents) if isinstance(each, _CHOICES) or (
        isinstance(each, ast.If | ast.While | ast.For) and each.lineno == node.lineno))


def _first(choice: Any) -> ast.AST:
    """What of a choice, or loop, runs whatever is chosen."""
    first: ast.AST = choice.generators[0].iter if hasattr(choice, "generators") else choice.values[0] if isinstance(
        choice, ast.BoolOp) else choice.iter if isinstance(choice, ast.For) else choice.args if isinstance(
        choice, ast.Lambda) else choice.test
    return first


def _lines_beside(part: ast.AST, choice: Any) -> set[int]:
    """The lines where a condition stands, or the other side of a choice between expressions."""
    others = [choice.test, *((choice.body, choice.orelse) if isinstance(choice, ast.IfExp) else ())]
    return {line for each in others if each is not part for line in (each.lineno, each.end_lineno)}


def outwards(node: ast.AST, parents: Parents) -> Iterator[ast.AST]:
    """What a part of the code is a part of, the innermost first."""
    while node in parents:
        node = parents[node]
        yield node
