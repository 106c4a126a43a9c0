"""Attention heads as the code of a module shows them, whatever its layers are called.

Code that multiplies activations runs alone, on a copy with random weights, and gradients say which rows of which
layers, and which entries of other tensors, show in which inputs of the layer that reads the products: those that show
in the inputs of one head alone are that head's. How many heads there may be is read off the products' shapes and the
numbers that modules keep; that they go is tried afterwards, as every other guess is (see
fastscore.graph.heads.attention).
"""

import itertools
from collections.abc import Collection, Iterable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastscore.graph.cutting import heads
from fastscore.graph.following.nodes import CHANNELWISE, PRODUCERS
from fastscore.graph.groups import ChannelGroup, Member
from fastscore.graph.heads.attention_calls import Call
from fastscore.graph.heads.head_numbers import numbers, units_of
from fastscore.graph.heads.head_run import Run, RunAlone, gradients
from fastscore.graph.layer_types import OPTYPE, groups_of, type_of
from fastscore.modules.norms import channel_norms, gated_norms
from fastscore.modules.weights.own_linear import OwnLinear

_MOST_HEADS = 256


def find(module: nn.Module, call: Call, sizes: Collection[int], but: Iterable[str] = ()
         ) -> list[ChannelGroup | list[str]]:
    """What the heads of a module may be, of layers named from there, in the order of its code: the heads of each
    attention whose code is the module's own; or, in the place of heads that read each other, the layers that make what
    is multiplied. Nothing behind which nothing looks like heads.

    module: of an evaluation copy, whose code multiplies activations, of these `sizes`. but: modules in it whose heads
    are known.
    """
    found, known = list[ChannelGroup | list[str]](), set[str]()
    try:
        alone = RunAlone(module, call, but=but)
    except Exception:  # of code that does not run by itself
        return []
    while (run := alone.last(but=known)) is not None:
        likely = _likely(module, call, run, sizes)
        made = likely if isinstance(likely, list) else [] if likely is None else \
            [member.layer for member in likely.role("producer")]
        if likely is None or known.issuperset(made):
            break
        found.insert(0, likely)
        known |= {*made}
    return found


def _likely(module: nn.Module, call: Call, run: Run, sizes: Collection[int]) -> ChannelGroup | list[str] | None:
    """The heads that the last product of a run is of; or the layers that make it, where they read each other; or None
    where nothing looks like heads."""
    if (met := _met(module, call, run, sizes)) is not None:
        return met
    width = next(iter(run.read.values())).shape[-1]
    total, held = heads.count(module), {value for _, _, value in numbers(module)}
    likely = {total} if total else {*sizes, *held, *(width // number for number in held if number > 0)}
    counts = [n for n in likely if 1 < n <= width and width % n == 0 and n <= _MOST_HEADS]
    for n in counts if run.between else ():
        if (group := _talking(module, call, run, n)) is not None:
            return group
    run.between.clear()
    found: dict[int, ChannelGroup] = {}
    columns = torch.arange(width)
    for of_groups, across in itertools.product((False, True), repeat=2):
        if of_groups and found:
            break
        more = {n: group for n in counts if (n < width or n == total) and (
            group := _group(run, columns % n if across else columns // (width // n), n, of_groups)) is not None}
        found |= {n: group for n, group in more.items() if n not in found or units_of(group) > units_of(found[n])}
        if any(units_of(group) == n for n, group in found.items()):
            break  # each head can go without any other
    if found:  # of those of which most can go apart, the most of which a query is of one
        return found[max(found, key=lambda n: (units_of(found[n]), _is_whole(run, found[n], columns, n), n in sizes,
                                               n))]
    return run.makers if any(count in sizes for count in counts) and width not in counts else None


def _met(module: nn.Module, call: Call, run: Run, sizes: Collection[int]) -> ChannelGroup | None:
    """Heads of which layers read some (as what gates them all is made of their values): these lose inputs with them,
    and as long as they stay, what they make does not depend on who goes. None where no layers are such."""
    ends = [*run.met]
    while ends:
        apart = RunAlone(module, call, ends).last()
        if apart is None or apart.read.keys() != run.read.keys() or not apart.met.keys() >= {*ends}:
            return None
        met, apart.met = {name: apart.met[name] for name in ends}, {}
        group = _likely(module, call, apart, sizes)
        if not isinstance(group, ChannelGroup):
            return None
        columns = {name: _columns(apart, group, x) for name, x in met.items()}
        if None in columns.values():
            return None
        readers = [Member(name, "consumer", torch.arange(len(of)), of) for name, of in columns.items()
                   if of is not None and len(of)]
        if len(readers) == len(ends):
            return replace(group, members=(*group.members, *readers))
        ends = [member.layer for member in readers]
    return None


def _columns(run: Run, group: ChannelGroup, x: Tensor) -> Tensor | None:
    """Of each column of what a layer reads, int64, the first channel of the heads that make it; empty where none of the
    layers that make heads do; None where they do, and it is not one's after the other's."""
    makers = [*group.role("producer")]
    weights = [run.parameters[f"{member.layer}.weight"] for member in makers]
    units, size = units_of(group), x.shape[-1]
    firsts = torch.stack([(group.unit == unit).nonzero()[0, 0] for unit in range(units)])

    def made(columns: Tensor) -> Tensor:
        """The units of the rows that some columns show."""
        shown = []
        for member, g in zip(makers, gradients(x[..., columns.to(x.device)], weights), strict=True):
            if g is not None:
                dim = int(type_of(run.module.get_submodule(member.layer)) == OPTYPE.EMBED)
                rows = g.movedim(dim, 0).flatten(1).any(1)[member.index.to(g.device)].cpu()
                shown.append(group.unit[member.channel[rows]])
        return torch.cat(shown).unique() if shown else torch.zeros(0, dtype=torch.int64)

    if not len(made(torch.arange(size))):
        return firsts[:0]
    for of_column in (torch.arange(size) * units // size, torch.arange(size) % units) if size % units == 0 else ():
        if all(made((of_column == unit).nonzero()[:, 0]).tolist() == [unit] for unit in range(units)):
            return firsts[of_column]
    return None


def _talking(module: nn.Module, call: Call, run: Run, count: int) -> ChannelGroup | None:
    """`count` heads that read each other through layers, which lose inputs with them: as long as these stay, what they
    make of the others does not depend on who goes. None where no such layers have an input for each head."""
    talks = [name for name, x in run.between.items() if x.shape[-1] == count]
    apart = RunAlone(module, call, talks).last() if talks else None
    if apart is None or apart.read.keys() != run.read.keys() or apart.between.keys() != set(talks):
        return None
    columns = next(iter(apart.read.values())).shape[-1]
    group = _group(apart, torch.arange(columns) // (columns // count), count)
    return group if group is not None and units_of(group) == count else None


def _group(run: Run, of_column: Tensor, count: int, of_groups: bool = False) -> ChannelGroup | None:
    """The heads, if the inputs of the layer that reads them belong to `count` heads as `of_column` says, int64; None
    where no two can go apart. of_groups: whether a group of a convolution may be a head, and nothing else of it."""
    tensors = dict(run.parameters) | {f"{name}.": ones for name, ones in run.norms.items()}
    shows = {name: [torch.zeros(size, count, dtype=torch.bool) for size in tensor.shape]
             for name, tensor in tensors.items()}  # by dimension: whether an entry shows in a head
    for head, x in itertools.product(range(count), (*run.read.values(), *run.between.values())):
        of_head = x[..., head] if any(x is each for each in run.between.values()) else \
            x.index_select(-1, (of_column == head).nonzero()[:, 0].to(x.device))
        found = zip(tensors, gradients(of_head, list(tensors.values())), strict=True)
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
            partly = slices.sum(1) < count  # not those that all heads share
            rows = [*slices[partly], *_in_step(run.module, name, slices & partly[:, None], of_groups)]
            for row in (row for row in rows if row.sum() > 1):
                joined = unit_of_head[row]
                unit_of_head[torch.isin(unit_of_head, joined)] = joined.min()
    for name in run.read:
        for row in _in_step(run.module, f"{name}.weight", F.one_hot(of_column, count).bool(), of_groups):
            joined = unit_of_head[row]
            unit_of_head[torch.isin(unit_of_head, joined)] = joined.min()
    unit_of_head = torch.unique(unit_of_head, return_inverse=True)[1]
    if int(unit_of_head.max()) == 0:
        return None
    group_of = unit_of_head[of_column]
    first = torch.stack([(of_column == head).nonzero()[0, 0] for head in range(count)])
    members = [member for name, dims in along.items() for dim, slices in dims.items()
               if (member := _member(run.module, name, dim, slices, unit_of_head, first)) is not None]
    if any(not name.rpartition(".")[2] and all(member.layer != name[:-1] for member in members) for name in along):
        return None  # a normalisation of groups of channels, of which some would be wider than others
    producers = sorted((member for member in members if member.role == "producer"),
                       key=lambda member: len(member.index) < len(of_column))  # those of queries, say, before gates
    members = [*producers, *(member for member in members if member.role != "producer")]
    if not producers or any(len(group_of[member.channel].unique()) == 1 for member in producers):
        return None  # whole layers, as where each head has its own
    rows = [_summed(run, member, int(first[0])) for member in producers]
    if not run.between and max(rows) < 2 and (count < len(of_column) or sum(rows) < 2):
        return None  # no more than channels side by side
    every = torch.arange(count)
    columns = torch.arange(len(of_column))
    members += [Member("", "heads", every, first[every])]
    members += [Member(name, "consumer", columns, columns) for name in run.read]
    members += [Member(name, "consumer", every, first[every]) for name in run.between]
    return ChannelGroup(producers[0].layer, len(columns), group_of, tuple(members))


def _summed(run: Run, member: Member, column: int) -> int:
    """How many rows of a member one input of the layer that reads heads has in it: several, as of queries, or one."""
    weight = run.parameters[f"{member.layer}.weight"]
    (found,) = gradients(next(iter(run.read.values()))[..., column], [weight])
    by_column = type_of(run.module.get_submodule(member.layer)) == OPTYPE.EMBED
    return 0 if found is None else int(found.movedim(int(by_column), 0)[member.index].flatten(1).any(1).sum())


def _is_whole(run: Run, group: ChannelGroup, columns: Tensor, count: int) -> bool:
    """Whether a row that shows summed up, as a query, shows in the first of `count` heads and in no other."""
    x, first = next(iter(run.read.values())), next(group.role("heads")).channel
    size = len(columns) // count
    one = columns[:size] if int(first[1]) == size else columns[::count]
    member = max(group.role("producer"), key=lambda member: _summed(run, member, int(first[0])) > 1)
    weight = run.parameters[f"{member.layer}.weight"]
    dim = int(type_of(run.module.get_submodule(member.layer)) == OPTYPE.EMBED)
    shown = [None if g is None else g.movedim(dim, 0).flatten(1).any(1) for part in (
        one, columns[~torch.isin(columns, one)]) for g in gradients(x[..., part.to(x.device)], [weight])]
    if shown[0] is None or shown[1] is None:
        return True
    rows = member.index.to(shown[0].device)
    return not bool((shown[0] & shown[1])[rows].any())


def _in_step(module: nn.Module, name: str, of_channel: Tensor, of_groups: bool) -> Tensor:
    """Of a grouped convolution the heads, bool, of channels at the same place of each group, of which as many go: its
    groups stay as wide as each other. None of any other layer; nor, where they may be `of_groups`, of one each."""
    groups = groups_of(module.get_submodule(name.rpartition(".")[0]))
    of_group = of_channel.unflatten(0, (groups, -1))
    in_step = groups > 1 and not (of_groups and bool((of_group.any(1).sum(1) <= 1).all()))
    return of_group.any(0) if in_step else of_channel[:0]


def _is_layer(module: nn.Module, name: str) -> bool:
    owner, _, key = name.rpartition(".")
    return key == "weight" and type_of(module.get_submodule(owner)) in PRODUCERS


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
    kind = type_of(held)
    gated = gated_norms.gated_norm_of(held)
    if not key:
        fits = len(index) == len(slices) and (gated is None or gated_norms.whole_groups(gated, torch.cat(units)))
        return Member(owner, "norm", index, channel) if fits else None
    if gated is not None or channel_norms.norm_of(held) is not None:
        return None  # which is one of all heads, or holds the same for each
    if isinstance(held, OwnLinear) and dim < held.weight.dim() - 2:  # heads that it has a copy of for each
        return Member(owner, "tensor", index, channel, held.dims[dim])
    if kind in PRODUCERS:
        by_column = kind == OPTYPE.EMBED
        return Member(owner, "producer", index, channel) if key == "weight" and dim == int(by_column) else None
    if kind in CHANNELWISE and not isinstance(held, nn.GroupNorm):
        return Member(owner, "channelwise", index, channel) if key == "weight" and dim == 0 else None
    if not owner and key in heads.tensors(module) and heads.total_of(module) is not None:
        return None  # which goes with the count
    return Member(name, "tensor", index, channel, dim)
