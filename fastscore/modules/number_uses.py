"""What the code of a model does with a number besides making sizes of it, in branches that no example runs, too.

It is read off the source, and follows names, arguments and attributes that the number is put under. What cannot be
followed is a use of another kind.
"""

import ast
import inspect
from collections.abc import Callable, Collection, Iterator
from types import FunctionType, ModuleType
from typing import Any, TypeAlias

from torch import nn

from fastscore.modules import config_numbers, number_tables, written_numbers
from fastscore.modules.changed_source import places_of
from fastscore.modules.lines_run import Line, Parents, are_among, has_run, is_chosen, outwards
from fastscore.modules.reachable_code import ReachableCode, argument_of, content, functions_called
from fastscore.modules.settled_branches import is_ruled_out
from fastscore.modules.view_sizes import THROUGH, dims_of, is_open, is_state, name_of, sizes_in

Seed: TypeAlias = tuple[str, Any]  # "attribute", "number" or "argument", and which

_SIZES = {"view", "reshape", "unflatten", "zeros", "new_zeros", "empty", "new_empty", "layer_norm", "rms_norm",
          "rearrange"}  # that a wrong number makes an error of, but for some of _VIEWS
_VIEWS = {"view", "reshape", "unflatten"}  # of which those with a size of -1 take any number that divides
_ZEROS = {"zeros", "new_zeros", "empty", "new_empty"}  # which may be of another dimension than channels
_SEEN = {"split", "split_with_sizes", "narrow", "expand", "ones", "new_ones", "rand", "randn"}
_SIZES_FIRST = {"zeros", "empty", "ones", "rand", "randn"}  # functions that have their sizes in the place of a tensor
_HARMLESS = {"isinstance", "len", "print", "str", "repr", "hasattr", "format", "type"}
_CHECKS = {"_assert", "_check"}
_ARITHMETIC = (ast.Add, ast.Sub, ast.Mult, ast.FloorDiv)
_COMPUTES = {"mul", "multiply", "div", "divide", "true_divide", "add", "sub", "subtract", "pow", "sqrt", "rsqrt", "log",
             "log2", "exp", "float", "tensor", "as_tensor", "full", "arange", "linspace"}  # of numbers, other numbers


class Uses:
    """The uses of one number.

    code: of the model. module, name: whose it is, and its name, as marked_numbers has it. seen: lines that have
    cut something at numbers that are marked, or made something of such a size. lines: those that have run, where runs
    have shown what becomes of the number there: then only what is decided by it counts, a comparison or a slice, which
    they may have shown one side of, and what is computed with it elsewhere. dims: along which it was seen to count
    channels, and of how many.
    """

    def __init__(self, code: ReachableCode, module: nn.Module, name: str, seen: Collection[Line],
                 lines: Callable[[], Collection[Line]] | None = None, dims: Collection[tuple[int, int]] = ()) -> None:
        self._code, self._seen, self._lines, self._dims = code, seen, lines, {*dims}
        self._node: ast.AST = ast.Module([], [])  # where the number stands that is followed
        self._module, attribute = config_numbers.holder(module, name)
        attribute, _, self._key = attribute.partition(".")  # the name that it has in a table, as number_tables has it
        self._work: list[tuple[FunctionType, Seed]] = []
        self._done = set[tuple[int, Seed]]()
        self._times = 0  # at how many places the number stands in the code; none of an attribute
        if written_numbers.MARK in name:
            method = getattr(type(module), name.partition(written_numbers.MARK)[0])
            self._times = written_numbers.times(module, name)
            self._add(method, ("number", written_numbers.in_source(module, name)))
        else:
            self._add_attribute(attribute)

    def other(self) -> str | None:
        """What else than a size it is, in words; None where it is nothing else."""
        while self._work:
            function, seed = self._work.pop()
            where = f"the code of {function.__qualname__}"
            if (source := self._code.source(function)) is None:
                return f"{where}, which cannot be read (it stands in no file)"
            tree, parents = source
            found = list(places_of(tree, seed[1]) if seed[0] == "number" else
                         self._found(function, tree, parents, seed))
            if seed[0] == "number" and len(found) != self._times:
                return where
            nodes: list[tuple[ast.AST, bool]] = [(node, False) for node in found]
            names = set[tuple[str, bool]]()
            while nodes:
                node, unshown = nodes.pop()  # unshown: computed with the number where nothing has run
                self._node = node
                for use in self._uses(function, node, parents):
                    here = unshown or (self._lines is not None and _computed(node, use, parents)
                                       and not has_run(function, node, parents, self._lines()))
                    if isinstance(use, str):
                        if (use, here) not in names:
                            names.add((use, here))
                            nodes += [(other, here) for other in ast.walk(tree) if isinstance(other, ast.Name)
                                      and other.id == use and isinstance(other.ctx, ast.Load)]
                    elif use is not None and (self._lines is None or _decides(use) or (
                            here and not self._is_as_sized(function, use))):
                        return f"{where} ({_words(use, parents)})"
        return None

    def _is_as_sized(self, function: FunctionType, use: ast.AST) -> bool:
        """Whether something else than a layer is called with a number, as repeat() is: of other sizes with another
        one. Of a comparison, `_decides` says all."""
        return isinstance(use, ast.Compare) or (isinstance(use, ast.Call) and name_of(use) not in _COMPUTES and not any(
            isinstance(each, nn.Module) for each in self._objects(function, use.func) or ()))

    def _add(self, function: FunctionType, seed: Seed) -> None:
        if (id(function), seed) not in self._done:
            self._done.add((id(function), seed))
            self._work.append((function, seed))

    def _add_attribute(self, name: str) -> None:
        for function in self._code.mention(name):
            self._add(function, ("attribute", name))

    def _found(self, function: FunctionType, tree: ast.AST, parents: Parents, seed: Seed
               ) -> Iterator[ast.AST]:
        """Where the number comes into a function."""
        kind, which = seed
        for node in ast.walk(tree):
            if kind == "argument":
                if isinstance(node, ast.Name) and node.id == which and isinstance(node.ctx, ast.Load):
                    yield node
            elif isinstance(node, ast.Attribute) and node.attr == which and isinstance(node.ctx, ast.Load):
                held = self._objects(function, node.value)
                called = isinstance(parent := parents[node], ast.Call) and parent.func is node
                if (held is None and not called) or (held is not None and any(x is self._module for x in held)
                                                     and not is_ruled_out(node, parents, function, self._module,
                                                                          self._code.changes)):
                    yield node
            elif isinstance(node, ast.Constant) and node.value == which and _is_name(parents[node]):
                yield parents[node]

    def _objects(self, function: FunctionType, node: ast.AST) -> list[Any] | None:
        """What an expression may be; None where nobody knows."""
        if isinstance(node, ast.Attribute):
            held = self._objects(function, node.value)
            found = None if held is None else [_attribute(each, node.attr) for each in held]
            return None if found is None or any(each is _UNKNOWN for each in found) else found
        if not isinstance(node, ast.Name):
            return None
        code = function.__code__
        if code.co_argcount and node.id == code.co_varnames[0] and (owners := self._code.owners(function)):
            return list(owners)
        if node.id in code.co_freevars:
            held = content((function.__closure__ or ())[code.co_freevars.index(node.id)])
            return None if held is None else [held]
        known = node.id in function.__globals__ and node.id not in code.co_varnames + code.co_cellvars
        return [function.__globals__[node.id]] if known else None

    def _uses(self, function: FunctionType, node: ast.AST, parents: Parents
              ) -> Iterator[str | ast.AST | None]:
        """What becomes of a value: names that it gets, or an expression that makes something else of it."""
        parent = parents[node]
        if self._in_no_branch(function, node, parents):
            return
        if _in_vain(node, parents) or (isinstance(parent, ast.If | ast.While | ast.IfExp) and node is parent.test):
            return  # it is not zero
        if (taken := number_tables.taken_of(node, parents)) is not None:
            if taken[1] in (None, self._key):
                yield from self._uses(function, taken[0], parents)
        elif (isinstance(parent, ast.BinOp) and isinstance(parent.op, _ARITHMETIC)) or isinstance(
                parent, ast.Tuple | ast.List | ast.Starred | ast.BoolOp | ast.keyword) or (
                isinstance(parent, ast.IfExp) and node is not parent.test) or (
                isinstance(parent, ast.ListComp | ast.GeneratorExp) and node is parent.elt) or (
                isinstance(parent, ast.UnaryOp) and isinstance(parent.op, ast.USub)):
            yield from self._uses(function, parent, parents)
        elif isinstance(parent, ast.Slice):
            subscript = next(each for each in outwards(parent, parents) if isinstance(each, ast.Subscript))
            yield None if self._was_seen(function, subscript, parents) else subscript
        elif isinstance(parent, ast.Call) and node is not parent.func:
            yield from self._of_call(function, node, parent, parents)
        elif isinstance(parent, ast.Assign | ast.AnnAssign | ast.AugAssign | ast.NamedExpr):
            for target in parent.targets if isinstance(parent, ast.Assign) else [parent.target]:
                yield from self._of_target(function, target, parent)
            if isinstance(parent, ast.NamedExpr):
                yield from self._uses(function, parent, parents)
        elif isinstance(parent, ast.For | ast.comprehension) and node is parent.iter:
            yield from self._of_target(function, parent.target, parent)
        elif not isinstance(parent, ast.Expr):
            yield parent

    def _in_no_branch(self, function: FunctionType, node: ast.AST, parents: Parents) -> bool:
        """Whether something stands in a branch for modules that hold a layer, or lack one, unlike those there are."""
        before = node
        for each in outwards(node, parents):
            if isinstance(each, ast.If) and before is not each.test and (
                    taken := self._decided(function, each.test)) is not None and taken != (before in each.body):
                return True
            before = each
        return False

    def _decided(self, function: FunctionType, test: ast.AST) -> bool | None:
        """Whether modules hold layers, as a branch asks; None where nobody knows, or it depends."""
        if isinstance(test, ast.BoolOp):
            parts, whole = [self._decided(function, each) for each in test.values], isinstance(test.op, ast.Or)
            return whole if whole in parts else None if None in parts else not whole
        if not isinstance(test, ast.Compare) or not isinstance(test.ops[0], ast.Is | ast.IsNot) or not (
                isinstance(none := test.comparators[0], ast.Constant) and none.value is None):
            return None
        held = {(value is None) == isinstance(test.ops[0], ast.Is)
                for value in self._objects(function, test.left) or ()}
        return held.pop() if len(held) == 1 else None

    def _of_target(self, function: FunctionType, target: ast.AST, whole: ast.AST) -> Iterator[str | ast.AST | None]:
        if isinstance(target, ast.Name):
            yield target.id
        elif isinstance(target, ast.Tuple | ast.List):
            for each in target.elts:
                yield from self._of_target(function, each, whole)
        elif isinstance(target, ast.Attribute) and (held := self._objects(function, target.value)) is not None and any(
                each is self._module for each in held):
            self._add_attribute(target.attr)
        else:
            yield whole

    def _of_call(self, function: FunctionType, node: ast.AST, call: ast.Call, parents: Parents
                 ) -> Iterator[str | ast.AST | None]:
        name = name_of(call)
        of_size = name not in _SIZES | _SEEN or not call.args or node is not call.args[0] or \
            name in _SIZES_FIRST or not self._is_function(function, call.func)
        if name in THROUGH:
            yield from self._uses(function, call, parents)
        elif of_size and (name in _SEEN or (self._lines is None and self._seen
                                            and self._may_be_of_others(function, node, call, parents))):
            yield None if self._was_seen(function, call, parents) else call
        elif name not in _SIZES | _HARMLESS or not of_size:
            called = self._objects(function, call.func)
            functions = [each for thing in called or () for each in functions_called(thing)]
            arguments = {(each, argument_of(each, call, node, bound)) for each, bound in functions}
            if not functions or any(argument is None for _, argument in arguments):
                yield call
            for each, argument in arguments:
                self._add(each, ("argument", argument))

    def _may_be_of_others(self, function: FunctionType, node: ast.AST, call: ast.Call, parents: Parents) -> bool:
        """Whether a view or zeros with a number may be of something else than channels, and no error says so."""
        name, sizes = name_of(call), sizes_in(call, self._is_function(function, call.func) and name_of(call) in _VIEWS)
        tree = [node, *outwards(node, parents)][-1]
        if name in _ZEROS:
            return not any(map(self._counts, dims_of(self._node, sizes, tree))) or not is_state(
                call, tree, parents, lambda called: self._is_models(function, called))
        return name == "rearrange" or (name in _VIEWS and is_open(
            sizes, self._node, tree, lambda size: self._objects(function, size) or ()))

    def _is_models(self, function: FunctionType, called: ast.expr) -> bool:
        """Whether a layer is called, or a function of the model's."""
        return isinstance(called, ast.Subscript) or any(isinstance(each, nn.Module) or any(functions_called(each))
                                                        for each in self._objects(function, called) or ())

    def _counts(self, dim: tuple[int, int]) -> bool:
        """Whether it was seen to count channels along such a dimension: the same from the first where modules convolve,
        from the last where they do not; either of two at most."""
        number, count = dim
        whole = self._module if any(True for _ in self._module.parameters()) else self._code.model
        convolves = any(isinstance(each, nn.modules.conv._ConvNd) for each in whole.modules())
        return any((number == other and (convolves or count <= 2)) or (
            number - count == other - others and (not convolves or count <= 2)) for other, others in self._dims)

    def _was_seen(self, function: FunctionType, node: Any, parents: Parents) -> bool:
        """Whether a cut, or a call that makes something of a size, is one of those that were seen: of what may be
        passed by in its line, where no other one stands in that."""
        others = (each for each in ast.walk([*outwards(node, parents)][-1]) if each is not node and (
            (isinstance(each, ast.Subscript) and any(isinstance(part, ast.Slice) for part in ast.walk(each.slice)))
            or (isinstance(each, ast.Call) and name_of(each) in _SIZES | _SEEN)))
        return are_among(self._seen, function, node) and not (is_chosen(node, parents) and any(
            each.lineno <= node.end_lineno and node.lineno <= (each.end_lineno or 0) for each in others))

    def _is_function(self, function: FunctionType, called: ast.AST) -> bool:
        """Whether no method is called, but a function, which has the tensor as its first argument."""
        held = self._objects(function, called.value) if isinstance(called, ast.Attribute) else None
        return isinstance(called, ast.Name) or any(isinstance(each, ModuleType) for each in held or ())


_UNKNOWN = object()


def _attribute(held: Any, name: str) -> Any:
    """What an object has of that name, without running code."""
    own = getattr(held, "__dict__", {})
    if name in own:
        return own[name]
    found = inspect.getattr_static(held, name, _UNKNOWN)
    if isinstance(found, FunctionType):
        return found.__get__(held)
    if found is _UNKNOWN and isinstance(held, nn.Module):
        return (held._modules | held._parameters | held._buffers).get(name, _UNKNOWN)
    return _UNKNOWN if hasattr(found, "__get__") else found


def _in_vain(node: ast.AST, parents: Parents) -> bool:
    """Whether a value only says whether something is raised, or what, or is put into words."""
    before = node
    if isinstance(asks := parents[node], ast.Compare) and all(isinstance(op, ast.Is | ast.IsNot) for op in asks.ops):
        return True
    for each in outwards(node, parents):
        if isinstance(each, ast.Raise | ast.Assert | ast.FormattedValue | ast.JoinedStr):
            return True
        if isinstance(each, ast.If):
            return before is each.test and isinstance(each.body[-1], ast.Raise) and not each.orelse
        if isinstance(each, ast.Call):
            return name_of(each) in _CHECKS
        if not isinstance(each, ast.Compare | ast.BoolOp | ast.UnaryOp | ast.BinOp):
            return False
        before = each
    return False


def _computed(node: ast.AST, use: str | ast.AST | None, parents: Parents) -> bool:
    """Whether something is computed of a value up to a use of it, or until it has a name, but for half of it."""
    for each in outwards(node, parents):
        whole = isinstance(each, ast.BinOp) and not (isinstance(each.op, ast.FloorDiv)
                                                     and isinstance(each.right, ast.Constant))
        if whole or isinstance(each, ast.AugAssign) or (
                isinstance(each, ast.Call) and name_of(each) in _COMPUTES):
            return True
        if each is use or isinstance(each, ast.stmt):
            return False
    return False


def _decides(use: ast.AST) -> bool:
    if isinstance(use, ast.Compare):
        return not _asks_whether_repeated(use)
    return isinstance(use, ast.Subscript) or (isinstance(use, ast.Call) and name_of(use) in ("min", "max"))


def _asks_whether_repeated(compare: ast.Compare) -> bool:
    """Whether a tensor's first size is compared with a product, as by diffusers, which asks so whether a mask of each
    sample has been repeated for each head yet: right for any number of heads, or an error."""
    sides = (compare.left, *compare.comparators)
    return len(sides) == 2 and any(
        isinstance(size, ast.Subscript) and isinstance(size.value, ast.Attribute) and size.value.attr == "shape"
        and isinstance(size.slice, ast.Constant) and size.slice.value == 0
        and isinstance(product, ast.BinOp) and isinstance(product.op, ast.Mult)
        and not any(isinstance(factor, ast.Constant) for factor in (product.left, product.right))
        for size, product in (sides, sides[::-1]))


def _is_name(node: ast.AST) -> bool:
    """Whether an expression takes an attribute by its name, getattr(x, "name") or vars(x)["name"]."""
    call = node.value if isinstance(node, ast.Subscript) else node
    if isinstance(call, ast.Attribute):
        return call.attr == "__dict__"
    return isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in ("getattr", "vars")


def _words(node: ast.AST, parents: Parents) -> str:
    while not isinstance(node, ast.expr | ast.stmt):
        node = parents[node]
    words = ast.unparse(node).partition("\n")[0]
    return words if len(words) <= 80 else f"{words[:77]}..."
