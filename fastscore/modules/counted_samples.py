"""Whether a model's code goes another way by how many samples there are: `if len(x) > 4:`, `if x.shape[0] == 1:`."""

import ast
import operator
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from types import CodeType, FrameType, FunctionType
from typing import Any

from torch import nn

from fastscore.modules.lines_run import traced
from fastscore.modules.reachable_code import functions_in, is_torchs, names_in
from fastscore.modules.source import tree_of
from fastscore.modules.tensor_expressions import value_of


@dataclass(frozen=True)
class _Comparison:
    """`size` with `other`; `holds` of their values, None where that is not known. line: of the function's source, where
    it stands; None in code that is written in the function's. pairs: whether samples may meet in pairs there, so that a
    size grows as the square of their number."""

    size: ast.expr
    other: ast.expr
    holds: Callable[[int, int], bool] | None
    line: int | None
    pairs: bool

    def may_differ(self, size: Any, other: Any, times: int) -> bool:
        """Whether it comes out otherwise for some size from this one to what it is with so many times the samples."""
        if self.holds is None or type(size) is not int or type(other) is not int:
            return True
        most = size * (times * times if self.pairs else times)
        between = {other} if size <= other <= most else set()
        return len({self.holds(each, other) for each in {size, most} | between}) > 1


class Ways:
    """Comparisons of the first size of a tensor, of len(x), or of what is computed of such, with a number of their own,
    by which methods of a model's modules do one thing or another; whether there is anything, and checks that raise, are
    no such comparisons.
    """

    def __init__(self, model: nn.Module) -> None:
        # file and name of a function, as copies of models have its code changed -> by line
        self._found = defaultdict[tuple[str, str], dict[int | None, list[_Comparison]]](dict)
        self._values = set[tuple[_Comparison, Any, Any]]()  # as they were come to
        self._has_run = False
        named = defaultdict[str, set[FunctionType]](set)
        for cls in {cls for module in model.modules() for cls in type(module).__mro__ if not is_torchs(cls)}:
            for name, value in vars(cls).items():
                named[name].update(functions_in(value))
        work, seen = ["forward"], {"forward"}
        while work:  # what forwards come to, by name
            for function in named.get(work.pop(), ()):
                names = set(names_in(function.__code__))
                if not names.isdisjoint({"shape", "size", "len"}):
                    self._note(function)
                work += names - seen
                seen |= names

    def _note(self, function: FunctionType) -> None:
        code, lines = function.__code__, defaultdict[int | None, list[_Comparison]](list)
        for each in _comparisons(function):
            lines[None if each.line is None else code.co_firstlineno + each.line - 1].append(each)
        if lines:
            self._found[_place(code)].update(lines)

    @contextmanager
    def watched(self, around: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
        """A block, in a block of `around`, in which the model runs on one sample: what is compared is noted."""
        with around(), traced(lambda code: _place(code) in self._found, self._note_values) if self._found else \
                nullcontext():
            yield
        self._has_run = True

    def _note_values(self, frame: FrameType, event: str) -> None:
        for each in self._found[_place(frame.f_code)].get(frame.f_lineno, ()) if event == "line" else ():
            size, other = (value if type(value := value_of(side, frame.f_locals, frame.f_globals)) is int else None
                           for side in (each.size, each.other))
            self._values.add((each, size, other))

    def may_differ(self, samples: int) -> bool:
        """Whether one of so many samples may go another way than one alone: a size is then, at most, as many times what
        it was. True where no run on one was watched, or it cannot be seen what is compared."""
        return bool(self._found) and (not self._has_run or any(None in lines for lines in self._found.values()) or any(
            each.may_differ(size, other, samples) for each, size, other in self._values))


def _place(code: CodeType) -> tuple[str, str]:
    return code.co_filename, code.co_name


@cache
def _comparisons(function: FunctionType) -> Sequence[_Comparison]:
    if (tree := tree_of(function)) is None:
        return ()
    more = {node.arg for at in ast.walk(tree) if isinstance(at, ast.arguments)
            for node in (at.vararg, at.kwarg) if node}
    made = _made(tree)
    names, inner = _counts(tree, made), {
        part for scope in ast.walk(tree) if isinstance(scope, _SCOPES) and scope not in tree.body
        for part in ast.walk(scope)}
    found = list[_Comparison]()
    for node in [node for test in _tests(tree) for node in ast.walk(test) if isinstance(node, ast.Compare)]:
        sides = node.left, node.comparators[0]
        ways = _OPERATORS.get(type(node.ops[0])) if len(node.ops) == 1 else None
        size = next((at for at in (0, 1) if _counted(sides[at], names, more) and
                     _own(sides[1 - at], isinstance(sides[at], ast.BinOp))), None)
        if size is not None:
            power = _power(sides[size], names, made)
            found.append(_Comparison(sides[size], sides[1 - size], ways[size] if ways and power else None,
                                     None if node in inner else node.lineno, power == 2))
    return found


_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp,
           ast.GeneratorExp)
# what holds of (size, other) where the size stands to the left, or to the right
_OPERATORS: Mapping[type[ast.cmpop], tuple[Callable[[int, int], bool], Callable[[int, int], bool]]] = {
    ast.Eq: (operator.eq, operator.eq), ast.NotEq: (operator.ne, operator.ne), ast.Lt: (operator.lt, operator.gt),
    ast.LtE: (operator.le, operator.ge), ast.Gt: (operator.gt, operator.lt), ast.GtE: (operator.ge, operator.le)}


def _made(tree: ast.AST) -> Mapping[str, int]:
    """Of a function by whose code samples may meet in pairs, x[:, None] - x[None] or torch.cdist(x, x): variable -> the
    line of its first assignment; of another, nothing."""
    nodes = list(ast.walk(tree))
    ways = {_new_dim(node) for node in nodes} - {None}
    if not (ways >= {0, 1} or any(isinstance(node, ast.Attribute) and node.attr in _PAIRING for node in nodes)):
        return {}
    stored = [node for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    return {node.id: node.lineno for node in sorted(stored, key=lambda node: -node.lineno)}


_PAIRING = {"cdist", "pdist", "outer", "repeat_interleave", "meshgrid", "cartesian_prod", "combinations",
            "triu_indices", "tril_indices"}


def _new_dim(node: ast.AST) -> int | None:
    """Where code adds a dimension: x[None], x.unsqueeze(1)."""
    if isinstance(node, ast.Subscript):
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        return next((at for at, part in enumerate(parts) if isinstance(part, ast.Constant) and part.value is None),
                    None)
    given = node.args[-1] if isinstance(node, ast.Call) and node.args and isinstance(node.func, ast.Attribute) and \
        node.func.attr == "unsqueeze" else None
    return given.value if isinstance(given, ast.Constant) and isinstance(given.value, int) else None


def _own(node: ast.expr, zero: bool) -> bool:
    """A number, other than 0 where that is not `zero`, or what a module holds."""
    return (zero or bool(node.value)) and isinstance(node.value, int) if isinstance(node, ast.Constant) else \
        isinstance(node, ast.Attribute) and node.attr != "shape"


def _tests(tree: ast.AST) -> Iterator[ast.expr]:
    """By which the code does one thing or another."""
    for node in ast.walk(tree):
        taken = node.body.slice if isinstance(node, ast.IfExp) and isinstance(node.body, ast.Subscript) else None
        if isinstance(taken, ast.Constant):
            continue  # outputs[1] if len(outputs) > 1 else None: of a tuple
        if isinstance(node, ast.IfExp | ast.While) or (
                isinstance(node, ast.If) and not (isinstance(node.body[-1], ast.Raise) and not node.orelse)):
            yield node.test


def _counts(tree: ast.AST, made: Mapping[str, int]) -> Mapping[str, int]:
    """Variables that hold the first size of a tensor, n = x.shape[0]; n, c, h, w = x.shape, or what is computed of one:
    see _power."""
    found = dict[str, int]()
    for node in [node for node in ast.walk(tree) if isinstance(node, ast.Assign)]:
        for target in node.targets:
            first = target.elts[0] if isinstance(target, ast.Tuple) else target
            if isinstance(first, ast.Name) and (_counted(node.value, found, ()) if first is target else
                                                _of_all(node.value)):
                power = _power(node.value, found, made)
                found[first.id] = max(power, found.get(first.id, 1)) if power and found.get(first.id, 1) else 0
    return found


def _power(node: ast.expr, names: Mapping[str, int], made: Mapping[str, int]) -> int:
    """How an expression of counts grows with samples: 1 as their number, 2 as its square, as n * n does, 0 where that
    is not known, as of n % 4. names: of counts, their own. made: see _made."""
    parts = list(ast.walk(node))
    steps = [each.op for each in parts if isinstance(each, ast.BinOp)]
    read = [each.id for each in parts if isinstance(each, ast.Name)]
    if len(steps) > 1 or not all(isinstance(step, ast.Mult) for step in steps) or 0 in map(names.get, read):
        return 0
    return 2 if steps or 2 in map(names.get, read) or any(
        made.get(name, node.lineno) < node.lineno for name in read if name not in names) else 1


def _of_all(node: ast.AST) -> bool:
    """x.shape, or x.size()."""
    if isinstance(node, ast.Call):
        return not node.args and isinstance(node.func, ast.Attribute) and node.func.attr == "size"
    return isinstance(node, ast.Attribute) and node.attr == "shape"


def _counted(node: ast.expr, names: Collection[str], more: Collection[str]) -> bool:
    """Whether an expression is the first size of a tensor, or one of these variables, or computed of such. more: no
    tensors, but *args."""
    if isinstance(node, ast.Name):
        return node.id in names
    if isinstance(node, ast.BinOp):
        return _counted(node.left, names, more) or _counted(node.right, names, more)
    if isinstance(node, ast.Subscript):
        return _of_all(node.value) and isinstance(node.slice, ast.Constant) and node.slice.value == 0
    if not isinstance(node, ast.Call) or len(node.args) != 1:
        return False
    given = node.args[0]
    if isinstance(node.func, ast.Name):
        return node.func.id == "len" and isinstance(given, ast.Name) and given.id not in more
    return isinstance(node.func, ast.Attribute) and node.func.attr == "size" and \
        isinstance(given, ast.Constant) and given.value == 0
