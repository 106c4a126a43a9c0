"""Calls of modules whose output is only added to a stream that their input comes from, in autograd's own graph."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fastscore.batches import tensors_of

# what may stand between a branch and the sum: linear in the branch, and nothing where that is nothing
_SCALING = ("Mul", "Div", "NativeDropout", "ToCopy", "Clone", "Permute", "Transpose", "View", "UnsafeView", "Alias",
            "NegBackward", "Roll", "Slice", "ConstantPad", "Squeeze", "Unsqueeze", "ReshapeAlias")
_ADDS = ("Add", "Sub")
_NO_SUMS = ("Addmm", "Addbmm", "Addcmul", "Addcdiv")


@dataclass(frozen=True)
class Call:
    """One call of a module: the autograd nodes of what it returned and of the first thing that it was given; the shapes
    of both; how many things it returned (see ZeroBranch); whether it was given one thing that is computed, or more."""

    node: Any
    source: Any
    shape: torch.Size
    read: torch.Size
    returns: int
    alone: bool


Calls: TypeAlias = Mapping[str, Sequence[Call | None]]
Readers: TypeAlias = Mapping[Any, Sequence[Any]]
Makers: TypeAlias = Mapping[Any, Sequence[tuple[int, str]]]


def note(calls: list[Call | None]) -> Callable[..., Any]:
    """A forward hook that keeps each call of a module; None where its output, or what it reads, is not computed."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) and output else output
        given = [tensor for tensor in tensors_of((args, kwargs)) if tensor.is_floating_point()]
        if not (isinstance(first, Tensor) and first.grad_fn is not None and first.dim() > 1 and given
                and given[0].grad_fn is not None and given[0].dtype == first.dtype):
            calls.append(None)
            return output
        if first._is_view():  # of which autograd would lose sight where it is written to
            first = first.clone()
            output = (first, *output[1:]) if isinstance(output, tuple) else first
        calls.append(Call(first.grad_fn, given[0].grad_fn, first.shape, given[0].shape,
                          len(output) if isinstance(output, tuple) else 0,
                          sum(tensor.grad_fn is not None for tensor in given) == 1))
        return output

    return hook


def readers_of(root: Any) -> Readers:
    """Autograd node behind an output -> those that read what it makes, one for each time."""
    readers: dict[Any, list[Any]] = {root: []}
    work = [root]
    while work:
        node = work.pop()
        for source, _ in node.next_functions if node is not None else ():
            if source is not None:
                if source not in readers:
                    readers[source] = []
                    work.append(source)
                readers[source].append(node)
    return readers


def makers_of(calls: Calls) -> Makers:
    """Autograd node -> the modules that return what it makes, and which of all modules each is."""
    makers: dict[Any, list[tuple[int, str]]] = {}
    for number, (name, made) in enumerate(calls.items()):
        for each in made:
            if each is not None:
                makers.setdefault(each.node, []).append((number, name))
    return makers


def added_at(call: Call, readers: Readers) -> tuple[Any, Any] | None:
    """(the sum that what a module returned comes to first, the stream) where it is only added, maybe with others, to
    something that its input is, or is computed from; None where it is not.

    It is its first input that says how long and wide the stream is: of a memory that is as long today it does not.
    """
    for first, others in _sums(call.node, readers):
        for stream in _terms(others[0], readers) if len(others) == 1 else ():
            if call.source is stream or call.source in _between(call.node, stream):
                return first, stream
    return None


def _terms(node: Any, readers: Readers) -> Iterator[Any]:
    """A node; and what comes to it where it is a sum that nothing reads but the next, as of `x + one(x) + two(x)`."""
    yield node
    if adds(node) and len(readers.get(node, ())) == 1:
        for source, _ in node.next_functions:
            if source is not None:
                yield from _terms(source, readers)


def adds(node: Any) -> bool:
    """Whether a node is a sum."""
    return node.name().startswith(_ADDS) and not node.name().startswith(_NO_SUMS)


def scales(node: Any) -> bool:
    """Whether a node makes nothing of nothing, and is linear."""
    return bool(node.name().startswith(_SCALING))


def beside_shortcut(call: Call, siblings: Mapping[str, Sequence[Call | None]], readers: Readers
                    ) -> tuple[Any, Any, str] | None:
    """(the sum that what a module returned comes to, what a shortcut beside it reads, the shortcut) where it is added
    to what another module of its owner makes of what it is computed from; None where it is not.

    siblings: name within the owner -> its calls.
    """
    for first, others in _sums(call.node, readers):
        for sibling, calls in siblings.items():
            made = calls[0] if len(calls) == 1 else None
            if made is not None and others == [made.node] and made.shape == call.shape and \
                    call.source in {made.source, *_between(call.node, made.source)}:
                return first, made.source, sibling
        break
    return None


def _sums(node: Any, readers: Readers) -> Iterator[tuple[tuple[Any, Any], list[Any]]]:
    """The sums that what a node makes comes to, through nothing but scaling, one after the other: (the first of them
    and what comes to it, the others that are added in this one)."""
    first = None
    while len(after := list(readers.get(node, ()))) == 1:
        reader = after[0]
        if adds(reader):
            first = first or (reader, node)
            yield first, [source for source, _ in reader.next_functions if source is not node and source is not None]
        elif not scales(reader):
            return
        node = reader


def _between(node: Any, source: Any) -> Collection[Any]:
    """`node` and what it is computed from, as far as that is computed from what `source` makes; nothing where it is
    not."""
    before: dict[Any, list[Any]] = {}  # node -> those that read it
    work, seen = [node], {node}
    while work:
        reader = work.pop()
        for made, _ in reader.next_functions if reader is not source else ():
            if made is not None:
                before.setdefault(made, []).append(reader)
                if made not in seen:
                    seen.add(made)
                    work.append(made)
    found, work = set[Any](), [source]
    while work:
        for reader in before.get(work.pop(), ()):
            if reader not in found:
                found.add(reader)
                work.append(reader)
    return found


def runs_before(name: str, call: Call, stream: Any, modules: Mapping[str, nn.Module], calls: Calls,
                readers: Readers, makers: Makers) -> tuple[tuple[str, int], ...] | None:
    """The outermost modules, with weights or of another shape than they read, that run for the module `name` alone, and
    how many things each returns.

    None where what that module reads is computed from what another module makes of anything but the stream: whose
    lengths and widths it has cannot be told then.
    """
    between = _between(call.node, stream)
    own, work, left = {call.node}, [call.node], dict[Any, int]()
    while work:  # nodes all of whose readers are among them
        for source, _ in work.pop().next_functions:
            if source is not None and source not in own:
                left[source] = left.get(source, len(readers[source])) - 1
                if not left[source]:
                    own.add(source)
                    work.append(source)
    found: dict[str, int] = {}
    here = {other: number for node in own for number, other in makers.get(node, ())}
    for other in sorted(here, key=here.__getitem__):
        if within(other, name) or within(name, other) or any(within(other, outer) for outer in found):
            continue
        module = modules[other]
        made = [each for each in calls[other] if each is not None and each.node in own and each.node is not call.node]
        if made and len(made) == len(calls[other]) and all(
                each.alone or each.source in between for each in made) and (
                any(True for _ in module.parameters()) or any(each.shape != each.read for each in made)):
            below = (f"{other}.{path}" for path, _ in module.named_modules() if path)
            inner = [each for path in below for each in calls.get(path, ())]
            if all(each is None or each.node in own for each in inner):
                found[other] = made[0].returns
    through = {each.node: each.source for other in found for each in calls[other] if each is not None}
    read, work = {call.source}, [call.source]
    while work:
        node = work.pop()
        sources = [] if node is stream else [through[node]] if node in through else \
            [source for source, _ in node.next_functions if source is not None]
        work += [source for source in sources if source not in read]
        read.update(sources)
    if any(not within(other, name) for node in read if node not in between and node is not stream
           for _, other in makers.get(node, ())):
        return None
    return tuple(found.items())


def within(name: str, outer: str) -> bool:
    return f"{name}.".startswith(f"{outer}.")


def holders(name: str) -> list[str]:
    """A module and those that it stands in, but for the model."""
    parts = name.split(".")
    return [".".join(parts[:size]) for size in range(1, len(parts) + 1)]


class Places:
    """Modules, by name, of which others are asked whether one of either is, or holds, one of the other."""

    def __init__(self, modules: Iterable[str] = ()) -> None:
        self._modules, self._holders = set[str](), set[str]()
        self.add(modules)

    def add(self, modules: Iterable[str]) -> None:
        """So many more."""
        for name in modules:
            self._modules.add(name)
            self._holders.update(holders(name))

    def meet(self, modules: Iterable[str]) -> bool:
        """Whether one of these is, holds, or stands in one of them."""
        return any(name in self._holders or not self._modules.isdisjoint(holders(name)) for name in modules)
