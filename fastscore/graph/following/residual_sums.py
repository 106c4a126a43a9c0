"""Calls of modules whose output is only added to a stream that their input comes from, in autograd's own graph."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fastscore.batches.parts import tensors_of
from fastscore.graph.autograd_nodes import Readers, sources

# what may stand between a branch and the sum: linear in the branch, and nothing where that is nothing
_SCALING = ("Mul", "Div", "NativeDropout", "ToCopy", "Clone", "Permute", "Transpose", "View", "UnsafeView", "Alias",
            "NegBackward", "Roll", "Slice", "ConstantPad", "Squeeze", "Unsqueeze", "ReshapeAlias")
_ADDS = ("Add", "Sub", "IndexAdd", "ScatterAdd")
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
Makers: TypeAlias = Mapping[Any, Sequence[tuple[int, str]]]


def note(calls: list[Call | None], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
         ) -> Any:
    """A forward hook that keeps each call of a module; None where its output, or what it reads, is not computed."""
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
        for stream in terms(others, readers):
            if call.source is stream or call.source in _between(call.node, stream):
                return first, stream
    return None


def terms(nodes: Sequence[Any], readers: Readers) -> Iterator[Any]:
    """Nodes; and what comes to them where they scale, or are sums that nothing reads but the next, as of
    `0.9 * x + one(x) + two(x)`; each once, and no parameters."""
    work, seen = [*reversed(nodes)], set[Any]()
    while work:
        node = work.pop()
        if node in seen or not node.next_functions:
            continue
        seen.add(node)
        yield node
        if scales(node) or (len(readers.get(node, ())) == 1 and addends(node, readers)):
            work += reversed(sources(node))


def addends(node: Any, readers: Readers) -> list[list[Any]]:
    """What a sum adds up, each linear in any node of it; nothing of what is none. Of a stack, what is added up behind
    it; of `lerp`, both ends."""
    name, taken = node.name(), [source for source, _ in node.next_functions]
    if name.startswith(("Addcmul", "Baddbmm")):
        parts = [taken[:1], taken[1:]]
    elif name.startswith("Lerp"):
        parts = [taken[:1], taken[1:2]]
    elif (name.startswith(_ADDS) and not name.startswith(_NO_SUMS)) or _is_stacked_sum(node, readers):
        parts = [[source] for source in taken]
    else:
        return []
    return [[source for source in part if source is not None] for part in parts]


def _is_stacked_sum(node: Any, readers: Readers) -> bool:
    """Whether a node stacks, or concatenates, what is added up, or averaged, by the only one that reads it."""
    after = readers.get(node, ())
    if not node.name().startswith(("Stack", "Cat")) or len(after) != 1 or \
            not after[0].name().startswith(("Sum", "Mean")):
        return False
    over, dims = getattr(after[0], "_saved_dim", None), len(getattr(after[0], "_saved_self_sym_sizes", ()))
    return over is not None and dims > 0 and [_signed(dim) % dims for dim in over] == [_signed(node._saved_dim) % dims]


def _signed(dim: int) -> int:
    """A dimension, counted from the end where autograd has its number without a sign."""
    return dim - (1 << 64) if dim >= 1 << 63 else dim


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
        parts = addends(reader, readers)
        if any(node in part for part in parts):
            first = first or (reader, node)
            yield first, [source for part in parts if node not in part for source in part]
        elif parts or not (scales(reader) or _is_stacked_sum(node, readers)):
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
        for source in sources(work.pop()):
            if source not in own:
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
        before = [] if node is stream else [through[node]] if node in through else \
            sources(node)
        work += [source for source in before if source not in read]
        read.update(before)
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
