"""Attention heads as the code of a module shows them, whatever its layers are called.

Code that multiplies activations runs alone, on a copy with random weights, and gradients say which rows of which
layers, and which entries of other tensors, show in which inputs of the layer that reads the products: those that show
in the inputs of one head alone are that head's. How many heads there may be is read off the products' shapes and the
numbers that modules keep; that they go is tried afterwards, as every other guess is (see fastscore.graph.attention).
"""

import copy
import itertools
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fastscore.batches import tensors_of
from fastscore.graph.attention_calls import Call, randomized
from fastscore.graph.cutting import heads, own_tensors
from fastscore.graph.groups import ChannelGroup, Member
from fastscore.graph.nodes import CHANNELWISE, LAYERS, PRODUCERS
from fastscore.graph.noted_calls import PRODUCTS
from fastscore.modules.evaluation_copy import evaluation_copy
from fastscore.modules.hooks import input_of
from fastscore.modules.inspection import channel_dim, parametrized
from fastscore.modules.norms import channel_norms

_MOST_HEADS = 256
_MOST_TRIALS = 24  # sets of numbers that are tried


@dataclass
class _Run:
    """The copy, what its parameters are called, and the layers that read the last product, with what each reads."""

    module: nn.Module
    parameters: dict[str, Tensor]
    read: dict[str, Tensor] = field(default_factory=dict)  # channels last
    makers: list[str] = field(default_factory=list)  # layers that make what is multiplied, and what gates it
    norms: dict[str, Tensor] = field(default_factory=dict)  # normalisation over channels -> ones that multiply it


def find(module: nn.Module, call: Call, sizes: Collection[int]) -> ChannelGroup | list[str] | None:
    """What the heads of a module may be, of layers named from there.

    Args:
        module: of an evaluation copy, whose code multiplies activations.
        call: that the model makes of it.
        sizes: of the dimensions of what it multiplies.

    Returns:
        The heads; or the layers that make what is multiplied, where that has heads that read each other; or None where
        nothing looks like heads.
    """
    try:
        run = _run(module, call)
    except Exception:  # of code that does not run by itself
        return None
    if run is None:
        return None
    width = next(iter(run.read.values())).shape[-1]
    total, numbers = heads.count(module), {value for _, _, value in _numbers(module)}
    likely = {total} if total else {*sizes, *numbers, *(width // number for number in numbers if number > 0)}
    counts = [n for n in likely if 1 < n <= width and width % n == 0 and n <= _MOST_HEADS]
    found: dict[int, ChannelGroup] = {}
    columns = torch.arange(width)
    for across in (False, True):
        more = {n: group for n in counts if n < width and (
            group := _group(run, columns % n if across else columns // (width // n), n)) is not None}
        found |= {n: group for n, group in more.items() if n not in found or _units(group) > _units(found[n])}
        if any(_units(group) == n for n, group in found.items()):
            break  # each head can go without any other
    if found:  # of those of which most can go apart, the most of which a query is of one
        return found[max(found, key=lambda n: (_units(found[n]), _is_whole(run, found[n], columns, n), n in sizes, n))]
    return run.makers if any(count in sizes for count in counts) and width not in counts else None


def built(module: nn.Module) -> tuple[Any, ...]:
    """Alike for modules that are built alike."""
    tensors = (*module.named_parameters(), *module.named_buffers())
    return (type(module), *((name, tensor.shape) for name, tensor in tensors), *_numbers(module))


def _units(group: ChannelGroup) -> int:
    return int(group.unit.max()) + 1


def with_numbers(module: nn.Module, group: ChannelGroup, fails: Callable[[ChannelGroup], str | None]
                 ) -> ChannelGroup | str:
    """The group, with as few of the numbers that a module keeps as let it go; or why it does not go with any.

    fails: why a group does not go, or None.
    """
    every, held = list(_counts(module, group)), {member.module for member in group.role("tensor")}
    of_norms = [each for each in every if each.layer in held
                and isinstance(module.get_submodule(each.layer), nn.GroupNorm)]
    group = replace(group, members=(*group.members, *of_norms))  # it says what it has lost, whether it is asked or not
    every = [each for each in every if all(each is not other for other in of_norms)]
    first = fails(group)
    if first is None:
        return group
    tried = 0
    for size in range(1, len(every) + 1):
        for chosen in itertools.combinations(every, size):
            tried += 1
            if tried > _MOST_TRIALS:
                return first
            more = replace(group, members=(*group.members, *chosen))
            if fails(more) is None:
                return more
    return first


def _run(module: nn.Module, call: Call) -> _Run | None:
    """One run of a copy; None where no layer reads what others made and code multiplied."""
    dense = randomized(evaluation_copy(module))
    if any(map(parametrized, dense.modules())):
        return None  # weights that are computed lose no rows
    with own_tensors.buffers_as_parameters(dense), torch.enable_grad(), ExitStack() as hooks:
        layers = {name: layer for name, layer in dense.named_modules() if tp.ops.module2type(layer) in LAYERS
                  and isinstance(layer._parameters.get("weight"), nn.Parameter)}
        run = _Run(dense, {name: parameter.requires_grad_() for name, parameter in dense.named_parameters()
                           if parameter.is_floating_point()})
        read: list[tuple[str, Tensor]] = []

        def see(name: str) -> Any:
            def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                x = input_of(args, kwargs)
                if x.dim() >= -channel_dim(layer) and x.grad_fn is not None:
                    read.append((name, x.movedim(channel_dim(layer), -1)))

            return hook

        def apart(name: str) -> Any:
            def hook(norm: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
                x = args[0] if args else None
                if not isinstance(x, Tensor) or not isinstance(output, Tensor) or output.shape != x.shape:
                    return None
                ones = run.norms.setdefault(name, output.new_ones(output.shape[-1]).requires_grad_())
                return (x + (output - x).detach()) * ones  # without its statistics, which read all heads

            return hook

        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_pre_hook(see(name), with_kwargs=True))
        for name, part in dense.named_modules():
            found = channel_norms.norm_of(part)
            if found is not None and found.dim == -1:
                hooks.enter_context(part.register_forward_hook(apart(name)))
        args, kwargs = copy.deepcopy((call.args, call.kwargs))
        x = next((x for x in tensors_of((args, tuple(kwargs.values()))) if x.is_floating_point()), None)
        if x is not None and not x.any():  # weights that read zeros show nowhere
            x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(0)))
        products = hooks.enter_context(_Products())
        dense(*args, **kwargs)
    weights = [layer.weight for layer in layers.values()]
    while products.made and all(g is None for g in _gradients(products.made[-1], weights)):
        products.made.pop()
    if not products.made:
        return None
    after = {name for name, x in read if any(g is not None for g in _gradients(x, products.made))}
    for name, x in read:
        of_product = _gradients(x, [products.made[-1]])[0] is not None
        known = next(iter(run.read.items()), None)
        if of_product and (known is None or (x.shape[-1] == known[1].shape[-1] and name not in run.read
                                             and _gradients(x, [layers[known[0]].weight])[0] is None)):
            run.read[name] = x
    if not run.read:
        return None
    shown = _gradients(next(iter(run.read.values())), weights)
    run.makers = [name for name, g in zip(layers, shown, strict=True) if g is not None and name not in after]
    return run


class _Products(TorchFunctionMode):
    """What products of activations made in the block."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in PRODUCTS and len([x for x in tensors_of(args) if x.grad_fn is not None]) > 1:
            self.made.append(output)
        return output


def _gradients(x: Tensor, tensors: list[Tensor]) -> tuple[Tensor | None, ...]:
    """Those of a sum of x, at random weights; None where there are none, or zeros alone."""
    if not tensors:
        return ()
    weights = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)).to(x) + 0.5
    found = torch.autograd.grad(x, tensors, weights, retain_graph=True, allow_unused=True)
    return tuple(g if g is not None and bool(g.any()) else None for g in found)


def _group(run: _Run, of_column: Tensor, count: int) -> ChannelGroup | None:
    """The heads, if the inputs of the layer that reads them belong to `count` heads as `of_column` says, int64; None
    where no two can go apart."""
    tensors = dict(run.parameters) | {f"{name}.": ones for name, ones in run.norms.items()}
    shows = {name: [torch.zeros(size, count, dtype=torch.bool) for size in tensor.shape]
             for name, tensor in tensors.items()}  # by dimension: whether an entry shows in a head
    for head, x in itertools.product(range(count), run.read.values()):
        of_head = x.index_select(-1, (of_column == head).nonzero()[:, 0].to(x.device))
        found = zip(tensors, _gradients(of_head, list(tensors.values())), strict=True)
        for name, g in ((name, g) for name, g in found if g is not None):
            for dim, of_dim in enumerate(shows[name]):
                of_dim[:, head] |= g.ne(0).movedim(dim, 0).reshape(len(of_dim), -1).any(1).cpu()
    unit_of_head = torch.arange(count)
    along: dict[str, dict[int, Tensor]] = {}  # tensor -> dimension -> [size, heads], where some show in one head alone
    for name, entries in shows.items():
        for dim, slices in enumerate(entries):
            number = slices.sum(1)
            if len(slices) > 1 and bool(((number > 0) & (number < count)).any()):
                along.setdefault(name, {})[dim] = slices
    for name, dims in along.items():
        for slices in [dims[0]] if 0 in dims and _is_layer(run.module, name) else ():
            for row in slices[(slices.sum(1) > 1) & (slices.sum(1) < count)]:
                joined = unit_of_head[row]
                unit_of_head[torch.isin(unit_of_head, joined)] = joined.min()
    unit_of_head = torch.unique(unit_of_head, return_inverse=True)[1]
    if int(unit_of_head.max()) == 0:
        return None
    group_of = unit_of_head[of_column]
    first = torch.stack([(of_column == head).nonzero()[0, 0] for head in range(count)])
    members = [member for name, dims in along.items() for dim, slices in dims.items()
               if (member := _member(run.module, name, dim, slices, unit_of_head, first)) is not None]
    producers = sorted((member for member in members if member.role == "producer"),
                       key=lambda member: len(member.index) < len(of_column))  # those of queries, say, before gates
    members = [*producers, *(member for member in members if member.role != "producer")]
    if not producers or any(len(group_of[member.channel].unique()) == 1 for member in producers):
        return None  # whole layers, as where each head has its own
    if not any(_summed(run, member, int(first[0])) for member in producers):
        return None  # no more than channels side by side
    every = torch.arange(count)
    columns = torch.arange(len(of_column))
    members += [Member("", "heads", every, first[every])]
    members += [Member(name, "consumer", columns, columns) for name in run.read]
    return ChannelGroup(producers[0].layer, len(columns), group_of, tuple(members))


def _summed(run: _Run, member: Member, column: int) -> bool:
    """Whether one input of the layer that reads heads has several rows of a layer in it, as it has queries."""
    weight = run.parameters[f"{member.layer}.weight"]
    (found,) = _gradients(next(iter(run.read.values()))[..., column], [weight])
    by_column = tp.ops.module2type(run.module.get_submodule(member.layer)) == tp.ops.OPTYPE.EMBED
    return found is not None and int(found.movedim(int(by_column), 0).flatten(1).any(1).sum()) > 1


def _is_whole(run: _Run, group: ChannelGroup, columns: Tensor, count: int) -> bool:
    """Whether a row that shows summed up, as a query, shows in the first of `count` heads and in no other."""
    x, first = next(iter(run.read.values())), next(group.role("heads")).channel
    size = len(columns) // count
    one = columns[:size] if int(first[1]) == size else columns[::count]
    member = next(member for member in group.role("producer") if _summed(run, member, int(first[0])))
    weight = run.parameters[f"{member.layer}.weight"]
    dim = int(tp.ops.module2type(run.module.get_submodule(member.layer)) == tp.ops.OPTYPE.EMBED)
    shown = [None if g is None else g.movedim(dim, 0).flatten(1).any(1) for part in (
        one, columns[~torch.isin(columns, one)]) for g in _gradients(x[..., part.to(x.device)], [weight])]
    if shown[0] is None or shown[1] is None:
        return True
    rows = member.index.to(shown[0].device)
    return not bool((shown[0] & shown[1])[rows].any())


def _is_layer(module: nn.Module, name: str) -> bool:
    owner, _, key = name.rpartition(".")
    return key == "weight" and tp.ops.module2type(module.get_submodule(owner)) in PRODUCERS


def _member(module: nn.Module, name: str, dim: int, slices: Tensor, unit_of_head: Tensor, first: Tensor
            ) -> Member | None:
    """A tensor's part in a group, along a dimension of which each slice shows in the heads `slices` says; None where it
    has none there."""
    number = slices.sum(1)
    units = [unit_of_head[row].unique() for row in slices]
    index = torch.tensor([at for at, unit in enumerate(units) if len(unit) == 1], dtype=torch.int64)
    if not len(index) or bool(((number > 0) & (number < slices.shape[1]) & torch.tensor([len(unit) > 1
                                                                                        for unit in units])).any()):
        return None
    channel = torch.stack([first[row.nonzero()[0, 0]] for row in slices[index]])
    owner, _, key = name.rpartition(".")
    held = module.get_submodule(owner)
    kind = tp.ops.module2type(held)
    if not key:
        return Member(owner, "norm", index, channel) if len(index) == len(slices) else None
    if channel_norms.norm_of(held) is not None:
        return None  # which is one of all heads, or holds the same for each
    if kind in PRODUCERS:
        by_column = kind == tp.ops.OPTYPE.EMBED
        return Member(owner, "producer", index, channel) if key == "weight" and dim == int(by_column) else None
    if kind in CHANNELWISE and not isinstance(held, nn.GroupNorm):
        return Member(owner, "channelwise", index, channel) if key == "weight" and dim == 0 else None
    if not owner and key in heads.tensors(module) and heads.count(module) is not None:
        return None  # which goes with the count
    return Member(name, "tensor", index, channel, dim)


def _numbers(module: nn.Module) -> Iterator[tuple[str, str, int]]:
    """(name of a module, attribute, number) of all that a module and what it holds keep, but for its layers."""
    for name, part in module.named_modules():
        layer = tp.ops.module2type(part) in PRODUCERS | CHANNELWISE and not isinstance(part, nn.GroupNorm)
        for attribute, value in () if layer or channel_norms.norm_of(part) is not None else vars(part).items():
            if type(value) is int and not attribute.startswith("_"):
                yield name, attribute, value


def _counts(module: nn.Module, group: ChannelGroup) -> Iterator[Member]:
    """Members for numbers that may count heads, those of keys and values, or all their channels; likeliest first."""
    units = _units(group)
    firsts = torch.stack([(group.unit == unit).nonzero()[0, 0] for unit in range(units)])
    likely = {units, len(next(group.role("heads")).index), group.channels,
              *(len(member.index) for member in group.role("producer"))}
    known = heads.counted(module)
    found = [each for each in _numbers(module) if each[:2] not in known and each[2] > 0 and each[2] % units == 0]
    for name, attribute, value in sorted(found, key=lambda each: each[2] not in likely):
        yield Member(name, "width", torch.arange(value), firsts.repeat_interleave(value // units), attribute=attribute)
