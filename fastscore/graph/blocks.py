"""Residual branches that can go whole: what is only added to a stream that it is computed from.

Each is a group of one channel, a gate on the output of the branch's last module. Where it goes, zeros stand for that
module, and for what the branch alone has run before it what hands on its input: see fastscore.modules.zero_branch.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
import torch_pruning as tp
from torch import Tensor, nn

from fastscore.batches import tensors_of
from fastscore.graph import surgery
from fastscore.graph.differences import close
from fastscore.graph.groups import ChannelGraph, ChannelGroup, Member
from fastscore.graph.nodes import LAYERS
from fastscore.graph.surgery_trial import some_channels
from fastscore.modules.evaluation_copy import evaluation_copy
from fastscore.modules.hooks import OwnHook
from fastscore.modules.inspection import channel_dim, parameter_owners
from fastscore.modules.zero_branch import put, put_bypass, put_zeros

# what may stand between a branch and the sum: linear in the branch, and nothing where that is nothing
_SCALING = ("Mul", "Div", "NativeDropout", "ToCopy", "Clone", "Permute", "Transpose", "View", "UnsafeView", "Alias",
            "NegBackward", "Roll", "Slice", "ConstantPad", "Squeeze", "Unsqueeze", "ReshapeAlias")
_ADDS = ("Add", "Sub")
_NO_SUMS = ("Addmm", "Addbmm", "Addcmul", "Addcdiv")


@dataclass(frozen=True)
class _Call:
    """One call of a module: the autograd nodes of what it returned and of the first thing that it was given; the shapes
    of both; how many things it returned (see ZeroBranch); whether it was given one thing that is computed, or more."""

    node: Any
    source: Any
    shape: torch.Size
    read: torch.Size
    returns: int
    alone: bool


_Calls: TypeAlias = Mapping[str, Sequence[_Call | None]]
_Readers: TypeAlias = Mapping[Any, Sequence[Any]]


@dataclass(frozen=True)
class Branch:
    """A residual branch.

    name: of its last module. call: of that. passed: what it alone runs before, and how many things each of it returns.
    """

    name: str
    call: _Call
    passed: tuple[tuple[str, int], ...]

    @property
    def modules(self) -> tuple[str, ...]:
        """All that goes."""
        return (self.name, *(name for name, _ in self.passed))

    def holds(self, other: "Branch") -> bool:
        """Whether all that goes with the other goes with it."""
        return all(any(_within(inner, outer) for outer in self.modules) for inner in other.modules)

    def meets(self, other: "Branch") -> bool:
        """Whether a module of one is, or holds, one of the other."""
        return any(_within(one, two) or _within(two, one) for one in self.modules for two in other.modules)


def find(model: nn.Module, run: Callable[[nn.Module], Tensor]) -> list[Branch]:
    """The branches of a model, to be tried: see that_go.

    Args:
        model: an evaluation copy, whose parameters require gradients.
        run: (model) -> its output, on an example.

    Returns:
        Them, in the order of the modules; of branches within branches, the innermost.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    calls: dict[str, list[_Call | None]] = {name: [] for name in modules}
    handles = [module.register_forward_hook(_note(calls[name]), with_kwargs=True) for name, module in modules.items()]
    try:
        with torch.enable_grad():
            output = run(model)
    finally:
        for handle in handles:
            handle.remove()
    readers, owners = _readers(output.grad_fn), parameter_owners(model)
    found: dict[Any, Branch] = {}  # by where they are added
    for name in modules:  # outer modules come before inner ones that return the same
        call = calls[name][0] if len(calls[name]) == 1 else None
        added = None if call is None else _added_at(call, readers)
        if call is None or added is None or added[0] in found or call.node is call.source:
            continue
        passed = _passed(name, call, added[1], modules, calls, readers)
        ways = [] if passed is None else [Branch(name, call, passed)]
        for branch in [*ways, *_last_alone(modules, Branch(name, call, ()))]:
            if added[0] not in found and _with_weights(modules, branch) and _alone(modules, branch.modules, owners):
                found[added[0]] = branch
    return _innermost(modules, [*found.values()])


def that_go(model: nn.Module, run: Callable[[nn.Module], Tensor], branches: Sequence[Branch],
            groups: Sequence[ChannelGroup]) -> tuple[ChannelGroup, ...]:
    """The groups of `branches` that can go.

    Args:
        model, run: as in `find`.
        branches: found in it.
        groups: channels that can go from it.

    Returns:
        A group for each, in the order of the modules, without each of which, and without all, the model computes what
        it does where they add zeros; so does what is left of it where channels of `groups` are gone as well.
    """
    models = [model]
    if branches and groups:
        with suppress(Exception):  # of a model's code, which prune() tries again
            gone = surgery.removed_indices(groups, some_channels(groups, 0))
            small = surgery.remove_indices(evaluation_copy(model), gone)
            with torch.no_grad():
                run(small)
            models.append(small)

    def go(branches: Sequence[Branch]) -> bool:
        return all(_same_without(each, run, branches) for each in models)

    left = list(branches)
    if left and not go(left):
        modules = dict(model.named_modules())
        ways = (next((way for way in (branch, *_last_alone(modules, branch)) if go([way])), None) for branch in left)
        left = [way for way in ways if way is not None]
        if left and not go(left):
            left = []
    return tuple(_groups(model, left))


def with_blocks(graph: ChannelGraph) -> ChannelGraph:
    """The graph's groups, and its residual branches as groups beside them; one that is called as a group of heads is
    gets a name of its own."""
    names = {group.name for group in graph.groups}
    branches = (replace(branch, name=f"{branch.name} (whole)") if branch.name in names else branch
                for branch in graph.blocks)
    return replace(graph, groups=(*graph.groups, *branches))


def zero_outputs(model: nn.Module, groups: "list[ChannelGroup]") -> Iterator[Any]:
    """Hooks by which the branches of `groups` add zeros."""
    for group in groups:
        for member in group.role("branch"):
            yield model.get_submodule(member.layer).register_forward_hook(OwnHook(_zeroed))


def _zeroed(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)


def _within(name: str, outer: str) -> bool:
    return f"{name}.".startswith(f"{outer}.")


def _with_weights(modules: Mapping[str, nn.Module], branch: Branch) -> list[str]:
    """The modules of a branch that hold weights, and not the numbers of a normalisation alone."""
    return [name for name in branch.modules if any(parameter.dim() > 1 for parameter in modules[name].parameters())]


def _note(calls: list[_Call | None]) -> Callable[..., Any]:
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
        calls.append(_Call(first.grad_fn, given[0].grad_fn, first.shape, given[0].shape,
                           len(output) if isinstance(output, tuple) else 0,
                           sum(tensor.grad_fn is not None for tensor in given) == 1))
        return output

    return hook


def _readers(root: Any) -> _Readers:
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


def _added_at(call: _Call, readers: _Readers) -> tuple[Any, Any] | None:
    """(the sum that what a module returned comes to first, the stream) where it is only added, maybe with others, to
    something that its input is, or is computed from; None where it is not.

    It is its first input that says how long and wide the stream is: of a memory that is as long today it does not.
    """
    node, first = call.node, None
    while len(after := list(readers.get(node, ()))) == 1:
        reader = after[0]
        name = reader.name() if hasattr(reader, "name") else ""
        if name.startswith(_ADDS) and not name.startswith(_NO_SUMS):
            first = first or (reader, node)
            others = [source for source, _ in reader.next_functions if source is not node and source is not None]
            if len(others) == 1 and call.source in {others[0], *_between(call.node, others[0])}:
                return first, others[0]
        elif not name.startswith(_SCALING):
            return None
        node = reader
    return None


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


def _last_alone(modules: Mapping[str, nn.Module], branch: Branch) -> Iterator[Branch]:
    """The branch whose last module alone goes, where that is more than one layer."""
    module, call = modules[branch.name], branch.call
    if list(module.children()) and call.read == call.shape and any(
            tp.ops.module2type(inner) in LAYERS for inner in module.modules()):
        yield replace(branch, passed=())


def _passed(name: str, call: _Call, stream: Any, modules: Mapping[str, nn.Module], calls: _Calls, readers: _Readers
            ) -> tuple[tuple[str, int], ...] | None:
    """The outermost modules, with weights or of another shape than they read, that run for the module `name` alone, and
    how many things each returns. They are to hand on what they read first.

    None where what that module reads is computed from what another module makes of anything but the stream: whose
    lengths and widths it has cannot be told then.
    """
    between = _between(call.node, stream)
    read, work = {call.source}, [call.source]
    while work:
        node = work.pop()
        for source, _ in node.next_functions if node is not stream else ():
            if source is not None and source not in read:
                read.add(source)
                work.append(source)
    if any(each is not None and each.node in read and each.node not in between and each.node is not stream
           for other in modules if not _within(other, name) for each in calls[other]):
        return None
    own, work, left = {call.node}, [call.node], dict[Any, int]()
    while work:  # nodes all of whose readers are among them
        for source, _ in work.pop().next_functions:
            if source is not None and source not in own:
                left[source] = left.get(source, len(readers[source])) - 1
                if not left[source]:
                    own.add(source)
                    work.append(source)
    found: dict[str, int] = {}
    for other, module in modules.items():
        if _within(other, name) or _within(name, other) or any(_within(other, outer) for outer in found):
            continue
        made = [each for each in calls[other] if each is not None and each.node in own and each.node is not call.node]
        if made and len(made) == len(calls[other]) and all(
                each.alone or each.source in between for each in made) and (
                any(True for _ in module.parameters()) or any(each.shape != each.read for each in made)):
            inner = [each for below in modules if below != other and _within(below, other) for each in calls[below]]
            if all(each is None or each.node in own for each in inner):
                found[other] = made[0].returns
    return tuple(found.items())


def _alone(modules: Mapping[str, nn.Module], names: Sequence[str], owners: Mapping[int, int]) -> bool:
    """Whether no other module holds a parameter of these, which would stay, and none tells the cache of a decoder how
    long its keys are, as that of its first layer does."""
    inside = sum((parameter_owners(modules[name]) for name in names), Counter[int]())
    return all(owners[key] == count for key, count in inside.items() if key != id(None)) and \
        not any(getattr(modules[name], "layer_idx", None) == 0 for name in names)


def _innermost(modules: Mapping[str, nn.Module], branches: Sequence[Branch]) -> list[Branch]:
    """Those whose last module holds no other; of what stands before it others may go without it."""
    found: list[Branch] = []
    for branch in branches:
        inner = [other for other in branches if other is not branch and branch.holds(other)]
        for way in [branch] if not inner else _last_alone(modules, branch):
            if not any(_within(other.name, way.name) for other in inner) and not any(map(way.meets, found)):
                found.append(way)
    return found


def _groups(model: nn.Module, branches: Sequence[Branch]) -> Iterator[ChannelGroup]:
    """Each is called as the module that holds its weights is, if no other is; or else as its last module."""
    modules = dict(model.named_modules())
    owners = {branch: _holder(_with_weights(modules, branch)) or branch.name for branch in branches}
    taken = Counter([*owners.values()])
    nought = torch.zeros(1, dtype=torch.int64)
    for branch in branches:
        call, module = branch.call, modules[branch.name]
        name = owners[branch] if taken[owners[branch]] == 1 else branch.name
        if not list(module.children()):
            dim = channel_dim(module)
        else:
            last = any(isinstance(inner, nn.Linear) and inner.out_features == call.shape[-1]
                       for inner in module.modules())
            dim = -1 if last else 1
        channels = torch.arange(call.shape[dim])
        yield ChannelGroup(name, 1, nought, (
            Member(branch.name, "branch", channels, torch.zeros_like(channels), dim),
            Member(branch.name, "block", torch.tensor([call.returns]), nought),
            *(Member(other, "passed", torch.tensor([returns]), nought) for other, returns in branch.passed)))


def _holder(names: Sequence[str]) -> str:
    """The innermost module that is, or holds, all of these."""
    parts = (names[0] + ".").split(".")
    return next(outer for size in range(len(parts) - 1, -1, -1)
                if (outer := ".".join(parts[:size])) == "" or all(_within(name, outer) for name in names))


def _same_without(model: nn.Module, run: Callable[[nn.Module], Tensor], branches: Sequence[Branch]) -> bool:
    """Whether the model runs without the branches, and computes what it does where they add zeros."""
    handles = [model.get_submodule(branch.name).register_forward_hook(OwnHook(_zeroed)) for branch in branches]
    replaced = {name: model.get_submodule(name) for branch in branches for name in branch.modules}
    try:
        with torch.no_grad():
            torch.manual_seed(0)
            want = run(model)
            for branch in branches:
                put_zeros(model, branch.name, branch.call.returns)
                for name, returns in branch.passed:
                    put_bypass(model, name, returns)
            torch.manual_seed(0)
            got = run(model)
    except Exception:  # whatever the model's code does with a module that is not there
        return False
    finally:
        for handle in handles:
            handle.remove()
        for name, module in replaced.items():
            put(model, name, module)
    return got.shape == want.shape and bool(close(got, want).all())
