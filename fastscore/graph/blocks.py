"""Residual branches that can go whole: modules whose output is only added to a stream that their input comes from.

Each is a group of one channel, which goes with all that the module makes: a gate on its output. Where it goes,
fastscore.modules.zero_branch stands for it.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from fastscore.graph.groups import ChannelGraph, ChannelGroup, Member
from fastscore.graph.nodes import LAYERS
from fastscore.graph.trials.differences import close
from fastscore.modules.hooks import OwnHook
from fastscore.modules.inspection import parameter_owners
from fastscore.modules.zero_branch import first_floating, put, put_zeros

# what may stand between a branch and the sum: linear in the branch, and nothing where that is nothing
_SCALING = ("Mul", "Div", "NativeDropout", "ToCopy", "Clone", "Permute", "Transpose", "View", "UnsafeView", "Alias",
            "NegBackward")


@dataclass
class _Call:
    """The autograd nodes of what a module returned and of what zeros take their shape from, and how many things it
    returned: see ZeroBranch."""

    node: Any
    source: Any
    returns: int
    shape: torch.Size


def find(model: nn.Module, run: Callable[[nn.Module], Tensor]) -> tuple[ChannelGroup, ...]:
    """The branches of a model that can go.

    Args:
        model: an evaluation copy, whose parameters require gradients.
        run: (model) -> its output, on an example.

    Returns:
        A group for each, in the order of the modules; of branches within branches, the innermost. The model computes
        the same without each, and without all of them, as where they add zeros.
    """
    candidates = {name: module for name, module in model.named_modules() if name and _holds_layers(module)}
    calls: dict[str, list[_Call | None]] = {name: [] for name in candidates}
    handles = [module.register_forward_hook(_note(calls[name]), with_kwargs=True)
               for name, module in candidates.items()]
    try:
        with torch.enable_grad():
            output = run(model)
    finally:
        for handle in handles:
            handle.remove()
    readers = _readers(output.grad_fn)
    owners = parameter_owners(model)
    found: dict[str, _Call] = {}
    nodes = set[Any]()
    for name, module in candidates.items():  # outer modules come before inner ones that return the same
        call = calls[name][0] if len(calls[name]) == 1 else None
        if call is None or call.node in nodes or not _is_added(call, readers) or not _alone(module, owners):
            continue
        nodes.add(call.node)
        found[name] = call
    found = {name: call for name, call in found.items()
             if not any(other.startswith(f"{name}.") for other in found)}
    groups = [_group(name, candidates[name], call) for name, call in found.items()]
    if groups and not _same_without(model, run, groups):
        groups = [group for group in groups if _same_without(model, run, [group])]
        if groups and not _same_without(model, run, groups):
            return ()
    return tuple(groups)


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


def _holds_layers(module: nn.Module) -> bool:
    """Whether it holds layers, and is none itself."""
    return any(tp.ops.module2type(inner) in LAYERS for inner in module.modules() if inner is not module) \
        and getattr(module, "layer_idx", None) != 0  # whose keys tell the cache of a decoder how long it is


def _note(calls: list[_Call | None]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) and output else output
        x = first_floating(args, kwargs)
        if not (isinstance(first, Tensor) and first.grad_fn is not None and first.dim() > 1 and x is not None
                and x.grad_fn is not None and x.shape == first.shape and x.dtype == first.dtype):
            calls.append(None)
            return output
        if first._is_view():  # of which autograd would lose sight where it is written to
            first = first.clone()
            output = (first, *output[1:]) if isinstance(output, tuple) else first
        calls.append(_Call(first.grad_fn, x.grad_fn, len(output) if isinstance(output, tuple) else 0, first.shape))
        return output

    return hook


def _readers(root: Any) -> Mapping[Any, list[Any]]:
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


def _is_added(call: _Call, readers: Mapping[Any, list[Any]]) -> bool:
    """Whether what a module returned is only added to something that its input is, or is computed from.

    It is its first input that says how long and wide the stream is: of a memory that is as long today it does not.
    """
    node = call.node
    while len(after := list(readers.get(node, ()))) == 1:
        reader = after[0]
        name = reader.name() if hasattr(reader, "name") else ""
        if name.startswith("Add") and not name.startswith(("Addmm", "Addbmm", "Addcmul", "Addcdiv")):
            others = [source for source, _ in reader.next_functions if source is not node]
            return len(others) == 1 and others[0] is not None and _leads_to(call.source, others[0])
        if not name.startswith(_SCALING):
            return False
        node = reader
    return False


def _leads_to(node: Any, source: Any) -> bool:
    """Whether `node` makes what `source` makes, or is computed from it."""
    if node is source:
        return True
    seen, work = {node}, [node]
    while work:
        for before, _ in work.pop().next_functions:
            if before is source:
                return True
            if before is not None and before not in seen:
                seen.add(before)
                work.append(before)
    return False


def _alone(module: nn.Module, owners: Mapping[int, int]) -> bool:
    """Whether no module outside of it holds one of its parameters, which would stay."""
    inside = parameter_owners(module)
    return all(owners[key] == count for key, count in inside.items() if key != id(None))


def _group(name: str, module: nn.Module, call: _Call) -> ChannelGroup:
    last = any(isinstance(inner, nn.Linear) and inner.out_features == call.shape[-1] for inner in module.modules())
    dim = -1 if last else 1
    channels = torch.arange(call.shape[dim])
    returns = torch.tensor([call.returns])
    nought = torch.zeros(1, dtype=torch.int64)
    return ChannelGroup(name, 1, nought, (Member(name, "branch", channels, torch.zeros_like(channels), dim),
                                          Member(name, "block", returns, nought)))


def _same_without(model: nn.Module, run: Callable[[nn.Module], Tensor], groups: "list[ChannelGroup]") -> bool:
    """Whether the model runs without the branches, and computes what it does where they add zeros."""
    handles = list(zero_outputs(model, groups))
    replaced = {member.layer: model.get_submodule(member.layer) for group in groups for member in group.role("block")}
    try:
        with torch.no_grad():
            torch.manual_seed(0)
            want = run(model)
            for group in groups:
                put_zeros(model, group.name, int(next(group.role("block")).index))
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
