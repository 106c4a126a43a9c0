"""The functions that a model may run, by the names that its code mentions."""

import ast
import dis
import inspect
import itertools
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

from fastscore.modules.copying import ATOMS
from fastscore.modules.source import tree_of

_CONSTRUCTORS = {"__new__", "__init__", "__post_init__"}
_BY_NAME = {"setattr", "delattr", "__setattr__", "__dict__", "vars"}  # by which code sets attributes, too
_WITHOUT_CODE = ATOMS | {tuple, list, set, dict, OrderedDict, Tensor, nn.Parameter}


class ReachableCode:
    """Every function that the forwards of a model's modules may come to, whether an example does or not: more than can
    run, by names alone; PyTorch's own are left out.

    model: any. more: code that has run, of functions that nothing names.
    """

    def __init__(self, model: nn.Module, more: Iterable[CodeType] = ()) -> None:
        self.model = model
        self.modules = [module for module in model.modules() if not is_torchs(type(module))]
        self.functions: dict[FunctionType, set[str]] = {}  # -> the names that its code mentions
        self._named = defaultdict[str, set[FunctionType]](set)  # name -> methods of that name, of any module
        above = defaultdict[str, set[FunctionType]](set)  # the same, of those in whose place classes have another
        self._sources: dict[FunctionType, tuple[ast.AST, Mapping[ast.AST, ast.AST]] | None] = {}
        self._kinds = defaultdict[FunctionType, set[type]](set)  # method -> the classes that have it
        self._changed: dict[str, bool] = {}
        more_kinds = [type(value) for module in self.modules for value in vars(module).values()]
        for kind in dict.fromkeys((*map(type, self.modules), *more_kinds)):  # diffusers' processors are no modules
            taken = set[str]()
            for cls in kind.__mro__:
                for name, value in () if is_torchs(cls) else vars(cls).items():
                    for function in functions_in(value):
                        (above if name in taken else self._named)[name].add(function)
                        self._kinds[function].add(kind)
                taken |= vars(cls).keys()
        work = self._named["forward"] | self._named["__call__"]
        for module in model.modules():
            hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
            work.update(each for value in (*vars(module).values(), *hooks) for each in functions_in(value))
        codes = set(more)
        work |= {each for each in self._kinds if each.__code__ in codes}
        while work:
            function = work.pop()
            if function in self.functions or is_torchs(function):
                continue
            names = self.functions[function] = set(names_in(function.__code__))
            calls_above = "super" in names or any(cls.__name__ in names for kind in self._kinds[function]
                                                  for cls in kind.__mro__)
            for name in names:
                work |= self._named.get(name, set()) | (above.get(name, set()) if calls_above else set())
                work.update(functions_in(function.__globals__.get(name)))
                for held in map(function.__globals__.get, _files(function)):
                    work.update(functions_in(vars(held).get(name)))
            work.update(each for cell in function.__closure__ or () for each in functions_in(content(cell)))

    def changes(self, name: str) -> bool:
        """Whether other code than constructors may set an attribute of that name, of whatever it is."""
        if name not in self._changed:
            self._changed[name] = any(sets(function.__code__, name) for function in self._after_constructors)
        return self._changed[name]

    @cached_property
    def _after_constructors(self) -> list[FunctionType]:
        """Functions and methods, but for constructors and what is mentioned by these alone."""
        built = {name for function in self._kinds if function.__name__ in _CONSTRUCTORS
                 for name in names_in(function.__code__)}
        return [function for function in {*self.functions, *itertools.chain.from_iterable(self._named.values())}
                if function.__name__ not in _CONSTRUCTORS
                and (function in self.functions or function.__name__ not in built)]

    def mention(self, name: str) -> list[FunctionType]:
        """Functions whose code mentions an attribute or string of that name."""
        return [function for function, names in self.functions.items() if name in names]

    def owners(self, function: FunctionType) -> list[nn.Module]:
        """The modules that a function is a method of."""
        return [module for module in self.modules if type(module) in self._kinds.get(function, ())]

    def kind(self, function: FunctionType) -> type | None:
        """A class that a function is a method of, if there is one."""
        return next(iter(self._kinds.get(function, ())), None)

    def source(self, function: FunctionType) -> tuple[ast.AST, Mapping[ast.AST, ast.AST]] | None:
        """What a function says, and each part of that -> what it is a part of; None where nothing says that."""
        if function not in self._sources:
            tree = tree_of(function)
            self._sources[function] = None if tree is None else (
                tree, {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)})
        return self._sources[function]


def functions_in(value: Any) -> Iterator[FunctionType]:
    """The functions, written in Python, that run where a method, property or decorated function is taken."""
    if type(value) in _WITHOUT_CODE:  # as most of what modules hold
        return
    value = inspect.unwrap(value) if callable(value) and not isinstance(value, type) else value
    if isinstance(value, FunctionType):
        yield value
        for cell in value.__closure__ or ():
            if isinstance(inner := content(cell), FunctionType):
                yield inner
    elif isinstance(value, MethodType | staticmethod | classmethod):
        yield from functions_in(value.__func__)
    else:
        for inside in (getattr(value, name, None) for name in ("fget", "func") if hasattr(type(value), name)):
            yield from functions_in(inside)


def functions_called(called: Any) -> Iterator[tuple[FunctionType, bool]]:
    """(function, whether its first argument is given already) of what is called."""
    if isinstance(called, nn.Module):
        called = called.forward
    for function in functions_in(called) if not isinstance(called, type) else ():
        if is_torchs(function):
            return
        yield function, inspect.ismethod(called)


def argument_of(function: FunctionType, call: ast.Call, node: ast.AST, bound: bool) -> str | None:
    """The name that a function has for what it is called with; None where nobody knows."""
    code = function.__code__
    names = code.co_varnames[:code.co_argcount + code.co_kwonlyargcount]
    for keyword in call.keywords:
        if keyword is node or keyword.value is node:
            return keyword.arg if keyword.arg in names else None
    if node not in call.args or any(isinstance(each, ast.Starred) for each in call.args):
        return None
    at = call.args.index(node) + bound
    return names[at] if at < code.co_argcount else None


def is_torchs(thing: Any) -> bool:
    """Whether a class or function is PyTorch's own, Python's, or stands in for such."""
    return str(thing.__module__).partition(".")[0] in ("torch", "builtins", "collections", __name__.partition(".")[0])


def _files(function: FunctionType) -> set[str]:
    """The names of files of code that a function's code mentions."""
    held = {name: function.__globals__.get(name) for name in function.__code__.co_names}
    return {name for name, value in held.items() if isinstance(value, ModuleType)
            and value.__name__.partition(".")[0] != "torch"}


def names_in(code: CodeType) -> Iterator[str]:
    """What code mentions, that of functions written in it, too: attributes, global names and strings."""
    yield from code.co_names
    for value in code.co_consts:
        if isinstance(value, str):
            yield value
        elif isinstance(value, CodeType):
            yield from names_in(value)


def sets(code: CodeType, name: str) -> bool:
    """Whether code, or a function written in it, sets an attribute of that name, or may do so by the name."""
    if any(sets(each, name) for each in code.co_consts if isinstance(each, CodeType)):
        return True
    if not _BY_NAME.isdisjoint(code.co_names) and any(
            name == each or (isinstance(each, tuple) and name in each) for each in code.co_consts):
        return True
    return name in code.co_names and any(each.opname in ("STORE_ATTR", "DELETE_ATTR") and each.argval == name
                                         for each in dis.get_instructions(code))


def content(cell: CellType) -> Any:
    """What a variable holds that functions share; None before it holds anything."""
    try:
        return cell.cell_contents
    except ValueError:
        return None
