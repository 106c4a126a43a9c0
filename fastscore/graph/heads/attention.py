"""Attention heads as channel groups.

The channels of a group are what the output projection reads; a head is a unit of them, or, where several heads share
keys and values, all heads that do. Rows of the query, key and value projections go with their heads. Where these layers
are is known by name (others are found in fastscore.graph.heads.unnamed_attention); every guess is tried: the module,
with random weights, must read the same without some heads.
"""

from collections import Counter
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from fastscore.graph.cutting import heads, surgery
from fastscore.graph.groups import ChannelGroup, Member
from fastscore.graph.heads import attention_calls, given_biases, head_dims, head_norms, head_numbers
from fastscore.graph.heads.attention_calls import Call, close, randomized
from fastscore.graph.heads.found_heads import Found
from fastscore.graph.heads.head_dims import Projections
from fastscore.graph.trials.recording import Recording
from fastscore.modules.attention import multihead_attention
from fastscore.modules.evaluation_copy import evaluation_copy
from fastscore.modules.inspection import parameter_owners, parametrized, shared_parameters
from fastscore.modules.narrower import staying
from fastscore.wording import said

# layers that make a bias for each head, of places of tokens
_POSITIONS = ("cpb_mlp.2", "self.continuous_position_bias_mlp.2", "relative_attention_bias",
              "global_relative_attention_bias")
_TABLES = {"relative_position_bias_table": 1, "logit_scale": 0}  # parameters of a child -> where heads lie in them
# queries, keys and values of other tokens, which are attended to together with the first, and what reads their heads
_ADDED = (("add_q_proj", "add_k_proj", "add_v_proj"), ("self.query_global", "self.key_global", "self.value_global"))
_ADDED_OUTPUTS = ("to_add_out",)
_BASE = "base_layer"  # a child of PEFT's adapters, and what they have beside it
_BESIDE: Mapping[str, str] = {"producer": "lora_B", "consumer": "lora_A"}
_OUTPUT_ALONE = "out_proj"  # of a module that holds the other projections itself, as nn.MultiheadAttention does


@dataclass(frozen=True)
class _Guess:
    """module: qualified name of the attention module. group: with layers named from there, as if it were a model.
    projections: the layers, likewise; None where a module holds them in a way of its own."""

    module: str
    group: ChannelGroup
    projections: Projections | None

    def whole(self, group: ChannelGroup | None = None) -> ChannelGroup:
        """The group, or another one of the module, with the qualified names that the model has."""
        return within(self.module, group or self.group)


def within(module: str, group: ChannelGroup) -> ChannelGroup:
    """A group of layers named from a module of that name, with the qualified names that the model has."""
    def qualified(name: str) -> str:
        return ".".join(filter(None, (module, name)))

    members = tuple(replace(member, layer=qualified(member.layer)) for member in group.members)
    return replace(group, name=qualified(group.name), members=members)


def find(recording: Recording, unused: Container[str] = (), dims: bool = False) -> Found:
    """The groups of heads in a recorded model. unused: layers that the output does not depend on. dims: look for the
    dimensions of heads, too, which takes most of the time."""
    every, model = Found(), recording.model
    guesses = {name: found for name, module in model.named_modules()
               if (found := [_adapted(module, guess) for guess in _guesses(name, module)])}
    if not guesses:
        return every
    calls = attention_calls.record(model, {name: _heads_of(found[0].group) for name, found in guesses.items()},
                                   recording.run_again)
    owners = parameter_owners(model)
    groups, skipped = every.groups, every.skipped
    biases = {name: maker for given in calls.given for name in given
              if (maker := given_biases.maker(model, given, _heads_of(guesses[name][0].group))) is not None}
    for given in calls.given:
        if not biases.keys().isdisjoint(given):
            calls.take(given)
    known = Counter(first for found in guesses.values() for first in {guess.whole().name for guess in found})
    kind_of = head_numbers.kinds({name: model.get_submodule(name) for name in calls.of})
    borne_out = dict[Any, int | str]()  # kind of module, and of call -> which guess, or why none
    # an attention before the block that it stands in
    for names in sorted(calls.together, key=lambda names: len(names[0].split(".")) if names[0] else 0, reverse=True):
        firsts = [guesses[name][0].whole().name for name in names]
        if not {group.name for group in groups}.isdisjoint(firsts):
            continue
        if all(edge.layer in unused for name in names for edge in guesses[name][0].whole().edges):
            skipped |= dict.fromkeys(firsts, "the output does not depend on it")
            continue
        likely = {name: [*guesses[name], *_handed(model.get_submodule(name), guesses[name], calls.of[name], known)]
                  for name in names}
        tried = [_tried(model.get_submodule(name), likely[name], calls.of[name], owners, borne_out, kind_of[name])
                 for name in names]
        for name, guess in zip(names, tried, strict=True) if dims else ():
            _find_dims(every, model.get_submodule(name), guesses[name], guess, calls.of[name], owners)
        fitting = [guess.whole() for guess in tried if isinstance(guess, _Guess)]
        if len(fitting) == len(tried) and all(torch.equal(group.unit, fitting[0].unit) for group in fitting):
            group: ChannelGroup | None = replace(
                fitting[0], members=tuple(member for group in fitting for member in group.members))
            if names[0] in biases and group is not None:
                group = given_biases.with_embedding(recording, group, biases[names[0]])
            if group is not None:
                groups.append(group)
                for first in firsts:
                    skipped.pop(first, None)
                continue
        for first, guess, name in zip(firsts, tried, names, strict=True):
            every.tie(member.layer for member in guesses[name][0].whole().role("producer"))
            skipped.setdefault(first, guess if isinstance(guess, str) else
                               "its heads go with those of other layers, which keep them")
    return every


def _find_dims(every: Found, module: nn.Module, guesses: Sequence[_Guess], tried: _Guess | str, call: Call,
               owners: Mapping[int, int]) -> None:
    """Note the head dimensions of a module, or why it has none. tried: what its heads are, or why they are kept."""
    reason = computed(module, guesses[0].group, owners)
    for guess in () if reason is not None else [tried] if isinstance(tried, _Guess) else guesses:
        dims: ChannelGroup | str = "layers of adapters stand beside its projections, or it holds them itself"
        if guess.projections is not None and not any(_BASE in layer._modules for layer in module.modules()):
            dims = head_dims.find(guess.group.name, module, guess.projections, call, randomized)
        if isinstance(dims, ChannelGroup):
            every.head_dims.append(found := guess.whole(dims))
            why = head_dims.beside(module, dims, guess.group, call, randomized) if isinstance(tried, _Guess) else ""
            if why:
                every.not_both[found.name] = why
            return
        reason = reason or dims  # the likeliest one's
    every.whole_heads[guesses[0].whole().name] = str(reason)


def _tried(module: nn.Module, guesses: Sequence[_Guess], call: Call, owners: Mapping[int, int],
           borne_out: dict[Any, int | str], kind: Any) -> _Guess | str:
    """The first guess that the module bears out; or why it does not the likeliest. Modules that are built alike, and
    called alike, have the same random weights, and are tried once: see `find`."""
    why = computed(module, guesses[0].group, owners)
    if why is not None:
        return why
    key = kind, call.kind, *(tuple((member.role, member.layer, member.attribute) for member in guess.group.members)
                             for guess in guesses)
    if key not in borne_out:
        reasons = []
        for guess in guesses:
            reason = difference(module, guess.group, call)
            if reason is None:
                break
            reasons.append(reason)
        borne_out[key] = len(reasons) if len(reasons) < len(guesses) else reasons[0]
    found = borne_out[key]
    return found if isinstance(found, str) else guesses[found]


def _handed(module: nn.Module, guesses: Sequence[_Guess], call: Call, known: Mapping[str, int]) -> Iterator[_Guess]:
    """The guesses, where what the model hands to the module holds something for each head, of which it reads a part;
    none that is `known` of a block around it, too, with the tables which that is made of."""
    for guess in (guess for guess in guesses if known[guess.whole().name] == 1):
        if (group := given_biases.with_arguments(module, guess.group, call)) is not None:
            yield replace(guess, group=group)


def _heads_of(group: ChannelGroup) -> int:
    return len(next(group.role("heads")).index)


def _adapted(module: nn.Module, guess: _Guess) -> _Guess:
    """The same, with normalisations that count all heads, and where PEFT's adapters stand for layers: what lies beside
    a layer makes, or reads, what that does."""
    def parts(member: Member) -> list[str]:
        layer = module.get_submodule(member.layer) if member.role in _BESIDE else module
        if _BASE not in layer._modules or member.role not in _BESIDE:
            return [member.layer]
        beside = getattr(layer, _BESIDE[member.role], nn.ModuleDict())
        return [f"{member.layer}.{_BASE}", *(f"{member.layer}.{_BESIDE[member.role]}.{name}" for name in beside)]

    group = head_norms.with_norms(module, guess.group, guess.projections.layers[:2] if guess.projections else ())
    members = tuple(replace(member, layer=part) for member in group.members for part in parts(member))
    return replace(guess, group=replace(group, members=members))


def _guesses(name: str, module: nn.Module) -> Iterator[_Guess]:
    """What the names and widths of an attention module's layers suggest, likeliest first."""
    if not module._modules:
        return
    for query, key, value, output in heads.LAYERS:
        layers = [_linear(module, layer) for layer in (query, key, value, output)]
        if any(layer is None for layer in layers):
            continue
        q, k, v, out = (layer for layer in layers if layer is not None)
        total = heads.count(module)
        width = heads.width(module) or (out.in_features // total if total else 0)
        if not width or out.in_features % width:
            continue
        count = out.in_features // width
        if total not in (None, count):
            continue
        if q is k is v:
            shared, rest = divmod(q.out_features - out.in_features, 2 * width)
            if rest or shared < 1 or count % shared:
                continue
            rows = {query: _rows_of_blocks(count, shared, width), **_biases(module, count, width)}
            found = Projections((query, key, value), count, shared, width, (output,))
            yield _Guess(name, _group(query, rows, output, count, shared, width, _tables(module, count)), found)
            if shared == count:
                yield _Guess(name, _group(query, {query: _rows_of_heads(count, width)}, output, count, shared, width),
                             replace(found, by_head=True))
        elif k is v and q.out_features == out.in_features:
            shared, rest = divmod(k.out_features, 2 * width)
            if rest or shared < 1 or count % shared:
                continue
            once = _rows(shared, width, count // shared)
            yield _Guess(name, _group(query, {query: torch.arange(count * width), key: torch.cat([once, once])}, output,
                                      count, shared, width, _tables(module, count)),
                         Projections((query, key, value), count, shared, width, (output,)))
        elif q.out_features == out.in_features and k.out_features == v.out_features:
            shared, rest = divmod(k.out_features, width)
            if rest or shared < 1 or count % shared:
                continue
            once = _rows(shared, width, count // shared)
            rows = {query: torch.arange(count * width), key: once, value: once}
            added = [pair for three in _ADDED for pair in zip((query, key, value), three, strict=True)]
            rows |= {beside: rows[layer] for layer, beside in added if (
                more := _linear(module, beside)) is not None and more.out_features == len(rows[layer])}
            outputs = [layer for layer in _ADDED_OUTPUTS if (
                beside := _linear(module, layer)) and beside.in_features == count * width]
            yield _Guess(name, _group(query, rows | _biases(module, count, width), output, count, shared, width,
                                      _tables(module, count), outputs),
                         Projections((query, key, value), count, shared, width, (output, *outputs)))
    total, alone = heads.count(module), _linear(module, _OUTPUT_ALONE)
    held = [tensor for tensor in heads.tensors(module) if tensor in heads.PROJECTIONS]
    made = [layer for layer in multihead_attention.PROJECTIONS if layer in module._modules]
    if name and total and alone is not None and (held or made) and alone.in_features % total == 0:
        width = alone.in_features // total
        rows = {layer: _rows_of_blocks(total, total, width) if layer == made[0] == multihead_attention.PROJECTIONS[0]
                else torch.arange(total * width) for layer in made}
        by_layer = made * 3 if len(made) == 1 else made
        yield _Guess(name, _group("", rows, _OUTPUT_ALONE, total, total, width),
                     Projections((by_layer[0], by_layer[1], by_layer[2]), total, total, width, (_OUTPUT_ALONE,))
                     if len(by_layer) == 3 else None)


def _biases(module: nn.Module, count: int, width: int) -> dict[str, Tensor]:
    """The layers of a module that make a number for each head -> the channel that it stands for, int64 [count]."""
    named = dict(module.named_modules())
    layers = {name: named[name] for name in _POSITIONS if name in named}
    return {name: torch.arange(count) * width for name, layer in layers.items()
            if getattr(layer, "out_features", getattr(layer, "embedding_dim", None)) == count}


def _tables(module: nn.Module, count: int) -> dict[str, int]:
    """Names of parameters of a module's children that hold something for each head -> the dimension of heads."""
    return {f"{name}.{key}": dim for name, child in module.named_children() for key, dim in _TABLES.items()
            if (table := child._parameters.get(key)) is not None and table.dim() > dim and table.shape[dim] == count}


def _group(name: str, rows: dict[str, Tensor], output: str, count: int, shared: int, width: int,
           tables: Mapping[str, int] = MappingProxyType({}), outputs: Sequence[str] = ()) -> ChannelGroup:
    """rows: layer -> the channel of each of its outputs, int64. count: heads; shared: heads of keys and values.
    outputs: layers that read heads beside `output`."""
    channels = torch.arange(count * width)
    members = [Member(layer, "producer", torch.arange(len(channel)), channel) for layer, channel in rows.items()]
    every = torch.arange(count)
    members += [Member(table, "tensor", every, every * width, dim) for table, dim in tables.items()]
    members += [Member("", "heads", every, every * width)]
    members += [Member(layer, "consumer", channels, channels) for layer in (output, *outputs)]
    return ChannelGroup(name, count * width, channels // (width * (count // shared)), tuple(members))


def _rows(shared: int, width: int, repeats: int) -> Tensor:
    """The channel of each row of a key or value projection: that of the first head that reads it."""
    return (torch.arange(shared)[:, None] * repeats * width + torch.arange(width)).flatten()


def _rows_of_blocks(count: int, shared: int, width: int) -> Tensor:
    """The channel of each row of one projection that makes all queries, then all keys, then all values."""
    once = _rows(shared, width, count // shared)
    return torch.cat([torch.arange(count * width), once, once])


def _rows_of_heads(count: int, width: int) -> Tensor:
    """The same, where each head's query, key and value follow one another."""
    return torch.arange(count * width).reshape(count, 1, width).expand(-1, 3, -1).flatten()


def _linear(module: nn.Module, name: str) -> nn.Linear | None:
    for part in name.split("."):
        child = module._modules.get(part)
        if child is None:
            return None
        module = child
    module = module._modules.get(_BASE) or module
    return module if isinstance(module, nn.Linear) else None


def computed(module: nn.Module, group: ChannelGroup, owners: Mapping[int, int]) -> str | None:
    """Why the weights of an attention module cannot lose rows; None where they can."""
    for member in group.members:
        layer = module.get_submodule(member.module)
        shown = member.layer or type(module).__name__
        if parametrized(layer):
            return f"the weight of {shown} is computed (a parametrization): remove it first"
        if shared := shared_parameters(layer, owners):
            return f"{shown} shares its {shared} with another layer"
    return None


def difference(module: nn.Module, group: ChannelGroup, call: Call, known: dict[Any, Any] | None = None,
               beside: Collection[str] = ()) -> str | None:
    """How the input of the output projection differs where some heads are gone, at those that are not; None if not.

    known: what other guesses of this module, and of this call, have shown; more is added. beside: layers that read
    other heads, which are to read what they read where those that are gone are zeros."""
    outputs, each = [edge.layer for edge in group.role("consumer")], next(group.role("heads"))
    units = int(group.unit.max()) + 1
    if units == 1:
        return "it has one head, or one for all keys and values"
    known = {} if known is None else known
    if tuple(outputs) not in known:
        dense = known.setdefault("dense", randomized(evaluation_copy(module)))
        known[tuple(outputs)] = call.inputs_of(outputs, dense)
    dense, before, steps = known["dense"], known[tuple(outputs)], attention_calls.Steps()
    if unread := [layer for layer, x in before.items() if x is None]:
        return f"{type(module).__name__} does not call {unread[0]}: it reads its weights elsewhere"
    for bit in range((units - 1).bit_length()):  # any two heads part at some bit
        gone = (group.unit >> bit) % 2 == 1
        try:
            if hooks := [*head_norms.uncounted(dense, group, gone.nonzero()[:, 0], len(outputs) + len(beside) > 1)]:
                before = call.inputs_of([*outputs, *beside], dense, hooks)
            small = surgery.remove_channels(evaluation_copy(dense), [group], {group.name: gone.nonzero()[:, 0]})
            with steps:
                after = call.of_heads(each.index[~gone[each.channel]]).inputs_of([*outputs, *beside], small)
        except Exception as error:  # whatever the module's code does with a width that it does not expect
            return head_numbers.Stopped(f"{type(module).__name__} does not run with fewer heads ({said(error)})",
                                        steps.made)
        lost = {edge.layer: edge.index[gone[edge.channel]] for edge in group.role("consumer")}
        for layer in (*lost, *beside):
            x, whole = after[layer], before[layer]
            assert x is not None
            assert whole is not None
            if layer in lost:
                whole = whole[..., staying(whole.shape[-1], lost[layer]).to(whole.device)]
            if not close(x, whole):
                return f"{type(module).__name__} computes something else with fewer heads"
    return None
