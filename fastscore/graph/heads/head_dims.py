"""Head dimensions as channels: pairs of a query's and a key's dimension, and the values' dimensions, of each head.

The code of an attention shapes what its layers make into heads of one width, so every head loses as many dimensions,
each its own: of the products of queries and keys as many as of the values. What rotary tables turn goes in pairs, the
same of all heads of a layer, with the entries of the tables. Products are scaled as before, by the dense width. As with
whole heads (see fastscore.graph.heads.attention), every guess is tried on the module.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastscore.graph.cutting import heads, surgery
from fastscore.graph.groups import ChannelGraph, ChannelGroup, Member
from fastscore.graph.heads import head_norms, head_numbers
from fastscore.graph.heads.attention_calls import Call, close
from fastscore.modules.attention import handed
from fastscore.modules.evaluation_copy import evaluation_copy
from fastscore.modules.hooks import OwnHook, put_on
from fastscore.wording import said

# keys and values that an attention module adds to those that it makes, [1, 1, heads · width]: 1 keys, 2 values
_TENSORS: Mapping[str, int] = {"bias_k": 1, "bias_v": 2}
_BIASES = ("q_bias", "k_bias", "v_bias", "in_proj_bias")  # which a module's code adds to what its layers make
# what queries are multiplied by -> what it means where nothing comes of it, and a trial would show nothing
_QUERIES: Mapping[float, str] = {0.0: "what {} makes of the example inputs does not depend on its queries",
                                 2.0: "{} normalises its queries, over all dimensions of a head"}
_WHOLE = " (whole heads)"  # behind the name of heads beside whose dimensions they go
HEAD_DIMENSIONS = " (head dimensions)"  # behind the name of an attention's group, in what is kept
_MOST_TRIALS = 8  # of as many numbers at once
_EPS = 1e-3  # of a channel's length
_SHARE = 0.05  # of what queries change, where that is less: nearly even weights hide what becomes of them


@dataclass(frozen=True)
class Projections:
    """Where queries, keys and values of an attention module are made.

    layers: their names. heads: how many heads there are; shared: of keys and values; width: of each. by_head: whether
    one layer makes query, key and value of a head one after another. outputs: the layers that read the heads.
    """

    layers: tuple[str, str, str]
    heads: int
    shared: int
    width: int
    outputs: tuple[str, ...]
    by_head: bool = False

    def rows(self) -> Iterator[tuple[str, Tensor]]:
        """(layer, its outputs [heads, width]) of queries, keys and values."""
        counts = (self.heads, self.shared, self.shared)
        if self.by_head:
            every = torch.arange(3 * self.heads * self.width).reshape(self.heads, 3, self.width)
            yield from ((layer, every[:, part]) for part, layer in enumerate(self.layers))
            return
        begin: dict[str, int] = {}
        for layer, count in zip(self.layers, counts, strict=True):
            first = begin.get(layer, 0)
            begin[layer] = first + count * self.width
            yield layer, torch.arange(first, begin[layer]).reshape(count, self.width)


def find(name: str, module: nn.Module, projections: Projections, call: Call,
         randomized: Callable[[nn.Module], nn.Module]) -> ChannelGroup | str:
    """The head dimensions of an attention module of an evaluation copy: the first guess that the module bears out, of
    layers named from there; or why it bears out none.

    call: that the model makes of it. randomized: gives a copy of it random weights, in place.
    """
    if projections.width < 2:
        return "its heads have one dimension each"
    if any(isinstance(module._parameters.get(bias, vars(module).get(bias)), Tensor) for bias in _BIASES):
        return "its code adds the biases of queries, keys and values to what its layers make"
    dense = randomized(evaluation_copy(module))
    reason = ""
    for guess in itertools.chain.from_iterable(_with_widths(module, each, projections) for each in
                                               _guesses(name, module, projections, call)):
        try:
            failed = _difference(dense, guess, projections.outputs, call)
        except Exception as error:  # of the module's code, with random weights or other queries
            failed = f"{type(module).__name__} does not run by itself ({said(error)})"
        if failed is None:
            return guess
        reason = reason or failed
    return reason


def beside(module: nn.Module, dims: ChannelGroup, whole: ChannelGroup, call: Call,
           randomized: Callable[[nn.Module], nn.Module]) -> str:
    """Why dimensions of heads, `dims`, do not go beside whole heads of an attention module, `whole`, both of layers
    named from there; empty where they do. module, call, randomized: as in `find`."""
    if any(dims.role("tensor")):
        return f"{type(module).__name__} adds keys and values of its own"
    dense, whole = randomized(evaluation_copy(module)), replace(whole, name=dims.name + _WHOLE)
    outputs = [edge.layer for edge in dims.role("consumer")]
    each = next(whole.role("heads"))
    for part, gone in enumerate(_parts(dims)):
        heads_gone = (whole.unit % 2 == part).nonzero()[:, 0]
        kept = each.index[~torch.isin(each.channel, heads_gone)]
        try:
            with put_on(dense.get_submodule(member.layer).register_forward_hook(partial(_times, index, 0.0))
                        for member, index in dims.removed_at(gone) if member.role == "query"):
                want = call.inputs_of(outputs, dense, head_norms.uncounted(dense, whole, heads_gone))
            small = surgery.remove_channels(evaluation_copy(dense), [dims, whole],
                                            {dims.name: gone, whole.name: heads_gone})
            after = call.of_heads(kept).inputs_of(outputs, small)
        except Exception as error:  # whatever the module's code does with widths that it does not expect
            return f"{type(module).__name__} does not run with fewer heads that are narrower, too ({said(error)})"
        at = {edge.layer: edge.index[torch.isin(edge.channel, heads_gone)] for edge in whole.role("consumer")}
        for edge in dims.role("consumer"):
            stays = edge.index[~torch.isin(edge.channel, gone) & ~torch.isin(edge.index, at[edge.layer])]
            x = want[edge.layer]
            if x is None or not _close(after[edge.layer], x[..., stays.to(x.device)]):
                return f"{type(module).__name__} computes something else with fewer heads that are narrower, too"
    return ""


def with_head_dims(graph: ChannelGraph, both: bool = False) -> ChannelGraph:
    """The graph's groups, where head dimensions stand for whole heads as far as they can go; or, of those that can go
    with `both`, beside them."""
    def made(group: ChannelGroup) -> set[str]:
        return {member.layer for member in group.role("producer")}

    def read(group: ChannelGroup) -> set[str]:
        through = any(group.role("heads"))  # which may read each other through layers that read a number of each
        return {member.layer for member in group.role("consumer")
                if not through or len(member.index) == group.channels}

    found = [group for group in graph.head_dims if not (both and group.name in graph.not_both)]
    dims = {layer for group in found for layer in read(group)}
    whole = [group for group in graph.groups if (any(group.role("heads")) and read(group) <= dims) or any(
        made(group) <= made(each) and read(group) <= read(each) for each in found)]  # values of one head, say
    staying = [group for group in graph.groups if not any(group is each for each in whole)]
    taken = {layer for group in staying for layer in made(group)}
    used = [group for group in found if taken.isdisjoint(made(group))]
    covered = {layer for group in used for layer in (group.name, *made(group))}
    skipped = {layer: reason for layer, reason in graph.skipped.items() if layer not in covered}
    reasons = {**graph.whole_heads, **(graph.not_both if both else {})}
    skipped |= {name + HEAD_DIMENSIONS: reason for name, reason in reasons.items()}
    skipped |= {group.name + HEAD_DIMENSIONS: "channels of its layers go with those of others"
                for group in found if not taken.isdisjoint(made(group))}
    order = {group.name: place for place, group in enumerate(graph.groups)}
    narrower = {layer for group in used for layer in read(group)}
    alone = [group for group in whole if not read(group) <= narrower]  # whose dimensions stay
    groups = sorted([*staying, *alone, *used], key=lambda group: order.get(group.name, len(order)))
    if both:
        groups += [replace(group, name=group.name + _WHOLE) for group in whole
                   if any(group.role("heads")) and read(group) <= narrower]
    return replace(graph, groups=tuple(groups), skipped=skipped)


def with_heads_and_dims(graph: ChannelGraph) -> ChannelGraph:
    """The graph's groups, and head dimensions beside whole heads, where both can go."""
    return with_head_dims(graph, both=True)


def _guesses(name: str, module: nn.Module, projections: Projections, call: Call) -> Iterator[ChannelGroup]:
    """What may go together, likeliest first."""
    table, width = handed.table_width(module, call.args, call.kwargs), projections.width
    if width == heads.width(module) and table == handed.turned(module, width) and table % 2 == width % 2 == 0:
        every, rest = torch.arange(table), torch.arange(width - table)
        for pairs in (every % (table // 2), every // 2):  # halves of what is turned go together, or neighbours
            yield _group(name, module, projections, torch.cat([pairs, (table + rest) // 2]), table)
    yield _group(name, module, projections)
    yield _group(name, module, projections, values_alone=True)


def _with_widths(module: nn.Module, guess: ChannelGroup, projections: Projections) -> Iterator[ChannelGroup]:
    """The guess; and with as few of the numbers that a module keeps as may be widths of a head, or of all, under names
    that nobody knows."""
    yield guess
    read = next(guess.role("consumer")).channel
    places = {size: read[:size] for size in (projections.width, projections.heads * projections.width)}
    widths = [Member(name, "width", torch.arange(value), places[value], attribute=attribute)
              for name, attribute, value in head_numbers.numbers(module)
              if value in places and not heads.is_known(attribute)] if any(guess.role("head_dims")) else []
    for size in range(1, len(widths) + 1):
        for more in itertools.islice(itertools.combinations(widths, size), _MOST_TRIALS):
            yield replace(guess, members=(*guess.members, *more))


def _group(name: str, module: nn.Module, projections: Projections, turned: Tensor | None = None,
           table: int = 0, values_alone: bool = False) -> ChannelGroup:
    """turned: the pair of each dimension, int64 [width], where tables turn pairs. table: how many of them, the first,
    are turned; the others go by twos as well, so that as many go of every part."""
    count, shared, width = projections.heads, projections.shared, projections.width
    each = torch.arange(shared * width).reshape(shared, width)
    pairs = each if turned is None else torch.arange(width).expand(shared, width)
    if values_alone:
        pairs = each[:0]
    values = each + (int(pairs.max()) + 1 if pairs.numel() else 0)
    of_heads = torch.arange(count) // (count // shared)  # the keys and values that a head reads
    # of queries, keys and values: the channel of each dimension of each head
    channels = (pairs[of_heads], pairs, values) if pairs.numel() else (None, None, values)
    rows = dict[str, list[tuple[Tensor, Tensor]]]()
    tensors, queries = list[Member](), list[Member]()
    for part, ((layer, index), channel) in enumerate(zip(projections.rows(), channels, strict=True)):
        if channel is None:
            continue
        rows.setdefault(layer, []).append((index.flatten(), channel.flatten()))
        if part == 0:
            queries.append(Member(layer, "query", index.flatten(), channel.flatten()))
        tensors += [Member(key, "tensor", torch.arange(channel.numel()), channel.flatten(), 2)
                    for key, of in _TENSORS.items() if of == part and module._parameters.get(key) is not None]
    members = []
    for layer, parts in rows.items():
        index, channel = (torch.cat(list(each)) for each in zip(*parts, strict=True))
        order = index.argsort()
        members.append(Member(layer, "producer", index[order], channel[order]))
    first = values[0]
    if not values_alone:
        members.append(Member("", "head_dims", torch.arange(width), first))
    if turned is not None:
        members.append(Member("", "rotary", torch.arange(table), pairs[0][:table]))
        if handed.TURNED in vars(module):
            members.append(Member("", "width", torch.arange(table), pairs[0][:table], attribute=handed.TURNED))
    read = values[of_heads].flatten()
    members += [*tensors, *queries, *(Member(layer, "consumer", torch.arange(count * width), read)
                                      for layer in projections.outputs)]
    total = int(values.max()) + 1
    unit = torch.arange(total)
    if turned is not None:
        unit = torch.cat([turned, torch.arange(values.numel()) + width // 2])
    return ChannelGroup(name, total, unit, tuple(members), section=torch.arange(total) // width)


def _difference(dense: nn.Module, group: ChannelGroup, outputs: Sequence[str], call: Call) -> str | None:
    """How what the outputs read differs, where some dimensions are gone, from what it is where their queries are zero;
    None where it does not."""
    kind = type(dense).__name__
    queries = [(member, member.index) for member in group.role("query")]

    def inputs(*scaled: tuple[Iterable[tuple[Member, Tensor]], float]) -> dict[str, Tensor | None]:
        """What the outputs read with queries, at the positions of each part of `scaled`, times a number."""
        with put_on(dense.get_submodule(member.layer).register_forward_hook(partial(_times, index, factor))
                    for part, factor in scaled for member, index in part):
            return call.inputs_of(outputs, dense)

    def differ(found: Mapping[str, Tensor | None], whole: Mapping[str, Tensor | None], gone: Tensor) -> bool:
        for edge in group.role("consumer"):
            stays, x = edge.index[~torch.isin(edge.channel, gone)], whole[edge.layer]
            if x is None or not _close(found[edge.layer], x[..., stays.to(x.device)], share):
                return True
        return False

    plain, share = inputs(), 1.0
    if unread := [layer for layer, x in plain.items() if x is None]:
        return f"{kind} does not call {unread[0]}: it reads its weights elsewhere"
    for factor, reason in _QUERIES.items() if queries else ():
        scaled = inputs((queries, factor))
        if all(_close(x, plain[layer]) for layer, x in scaled.items()):
            return reason.format(kind)
        share = min(share, max(_apart(x, plain[layer]) for layer, x in scaled.items()))
    for gone in _parts(group):
        zero = [(member, index) for member, index in group.removed_at(gone) if member.role == "query"]
        try:
            small = surgery.remove_channels(evaluation_copy(dense), [group], {group.name: gone})
            after = call.inputs_of(outputs, small)
        except Exception as error:  # whatever the module's code does with a width that it does not expect
            return f"{kind} does not run with narrower heads ({said(error)})"
        if differ(after, inputs((zero, 0.0)), gone):
            left = 1 - len(gone) / group.channels
            by_width = not differ(after, inputs((zero, 0.0), (queries, left ** -0.5)), gone)
            return f"{kind} scales the products of queries and keys by the width that it finds" if by_width else \
                f"{kind} computes something else with narrower heads"
    return None


def _parts(group: ChannelGroup) -> Iterator[Tensor]:
    """Channels to go, int64: about half of each section, at random; and the others."""
    assert group.section is not None
    generator = torch.Generator().manual_seed(0)
    sizes = torch.bincount(group.unit)
    steps = int((group.section == 0).sum()) // int(sizes.max())
    halves: tuple[list[Tensor], list[Tensor]] = ([], [])
    for section in range(int(group.section.max()) + 1):
        units = group.unit[group.section == section].unique()
        count = steps // 2 * int(sizes.max()) // int(sizes[units[0]])
        order = units[torch.randperm(len(units), generator=generator)]
        halves[0].append(order[:count])
        halves[1].append(order[count:2 * count])
    for half in halves:
        yield torch.isin(group.unit, torch.cat(half)).nonzero()[:, 0]


def zero_queries(model: nn.Module, groups: Sequence[ChannelGroup], removed: Mapping[str, Tensor]) -> Iterator[Any]:
    """Hooks by which layers make zeros in the place of the queries that go with `removed` (group -> int64 [R])."""
    for group in groups:
        for member, index in group.removed_at(removed[group.name]) if group.name in removed else ():
            if member.role == "query":
                yield model.get_submodule(member.layer).register_forward_hook(OwnHook(partial(_times, index, 0.0)))


def _times(index: Tensor, factor: float, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    index_there = index.to(output.device)
    return output.index_copy(-1, index_there, output.index_select(-1, index_there) * factor)


def _close(x: Tensor | None, expected: Tensor | None, share: float = 1.0) -> bool:
    """Channel by channel, to rounding: a wrong scale differs by a share of a channel's length, or of the `share` of it
    that queries change."""
    if x is None or expected is None:
        return False
    bound = max(min(_EPS, _SHARE * share), 8 * torch.finfo(expected.dtype).eps)
    return close(x, expected, bound)


def _apart(x: Tensor | None, expected: Tensor | None) -> float:
    """By which share of its length a channel differs, of the one that differs most."""
    if x is None or expected is None:
        return 1.0
    found, whole = (each.flatten(0, -2).double().norm(dim=0) for each in (x - expected, expected))
    return float((found / whole.clamp_min(torch.finfo(torch.float64).tiny)).nan_to_num(0).max())
