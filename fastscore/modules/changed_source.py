"""Functions with other code: of a changed syntax tree, or with other numbers, which stand in its source, too, for those
who read it rather than run the code: torch.jit.script, inspect, tracebacks."""

import ast
import linecache
from collections.abc import Iterator, Mapping
from types import CellType, CodeType, FunctionType

from fastscore.modules.source import source_of


def with_source(function: FunctionType, code: CodeType, numbers: Mapping[int, int]) -> CodeType:
    """The code, as of a file of its own, where the source of `function` stands with these numbers; as it is where
    nobody knows that source, or a number does not stand in it, or not in one line.

    function: that `code` was made of. numbers: old -> new.
    """
    if (source := source_of(function)) is None:
        return code
    lines, places = list(source.lines), []
    for old, new in numbers.items():
        found = list(places_of(source.tree, old))
        if not found or any(place.lineno != place.end_lineno for place in found):
            return code
        places += [(place.lineno - 1, place.col_offset, place.end_col_offset, new) for place in found]
    for line, begin, end, new in sorted(places, reverse=True):
        text = lines[line].encode()  # in which ast counts
        lines[line] = (text[:begin] + str(new).encode() + text[end:]).decode()
    name = f"{code.co_filename}:{'.'.join(f'{old}-{new}' for old, new in numbers.items())}:{code.co_firstlineno}"
    linecache.cache[name] = 0, None, ["\n"] * (code.co_firstlineno - 1) + lines, name
    return code.replace(co_filename=name)


def code_of(tree: ast.Module, function: FunctionType) -> CodeType:
    """The code of a changed tree of `function`, which is defined first in it, less the annotations and defaults, whose
    names may mean nothing here: with_code() takes the defaults along."""
    body = tree.body[0]
    assert isinstance(body, ast.FunctionDef)
    body.returns = None
    for argument in ast.walk(body.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    body.args.defaults, body.args.kw_defaults = [], [None] * len(body.args.kwonlyargs)
    ast.fix_missing_locations(ast.increment_lineno(tree, function.__code__.co_firstlineno - 1))
    compiled = compile(tree, function.__code__.co_filename, "exec", dont_inherit=True)
    return next(const for const in compiled.co_consts if isinstance(const, CodeType))


def with_code(function: FunctionType, code: CodeType, closure: tuple[CellType, ...] | None) -> FunctionType:
    """A function, its defaults and attributes among it, with other code, and another closure."""
    made = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
    made.__kwdefaults__ = function.__kwdefaults__
    made.__dict__.update(vars(function))
    return made


def places_of(tree: ast.AST, number: int) -> Iterator[ast.expr]:
    """The expressions of numbers alone that are a number, but for those within others such."""
    work: list[ast.AST] = [tree]
    while work:
        node = work.pop()
        value = _value(node)
        if isinstance(node, ast.expr) and value is not None:
            if value == number:
                yield node
            continue
        work += ast.iter_child_nodes(node)


def _value(node: ast.AST) -> int | None:
    """The whole number that an expression of numbers is."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.BinOp) and (left := _value(node.left)) is not None and (
            right := _value(node.right)) is not None:
        how = {ast.Add: int.__add__, ast.Sub: int.__sub__, ast.Mult: int.__mul__}.get(type(node.op))
        if isinstance(node.op, ast.FloorDiv) and right:
            return left // right
        return how(left, right) if how else None
    return None
