"""Channel groups: which channels live and die together, and which layers read them.

Data without a reference to the model: layer names and index tensors, so that a group found on one copy of a model holds
on every other. Groups are found in fastscore.graph.tracing.
"""

import difflib
import fnmatch
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from fastscore.modules.sample_axis import SampleAxes
from fastscore.modules.weights import own_products
from fastscore.modules.weights.parameter_layers import ParameterLayer

Role = Literal["producer", "consumer", "channelwise", "norm", "heads", "gate", "tensor", "branch", "block",
               "reader", "width", "expert", "router", "query", "head_dims", "rotary", "handed"]
READS: tuple[Role, ...] = ("consumer", "reader")  # whose inputs the channels are
Ignore = Iterable[str | type | nn.Module]
TIED = "its channels go with those of "  # and the name of a group, or what it would be called


class LayerNames(frozenset[str]):
    """What `ignore` stands for in one model, by matching_layers: in copies of it the same, be there such layers or not.
    """


@dataclass(frozen=True)
class Member:
    """Where a group's channels lie in one layer.

    layer: qualified module name. role: `producer` (a Conv, Linear or Embedding that makes the channels), `consumer` (a
    Conv or Linear that reads them), `reader` (one of which nothing comes: see fastscore.graph.kept.unread),
    `channelwise` (a BatchNorm, PReLU or depthwise convolution between them), `norm` (a normalisation over them, whose
    statistics read them: see fastscore.modules.norms.channel_norms), `heads` (an attention, for what it has once for
    each head), `gate` (a BatchNorm whose output is the channels: see norm_gates), `branch` (a residual branch, all
    whose output is one channel) or `block` (the same module, or one that runs for it alone, which goes with it, and
    returns `index[0]` things: see fastscore.graph.blocks), `expert` (the last layer of a mixture's experts: after its
    inputs, what each expert makes of them counts as one) or `router` (of the weight of their router, a row for each),
    `width` (a module that keeps in `attribute` how many of the channels there are: see
    fastscore.graph.cutting.cut_widths), `query` (a layer whose outputs are queries, which end in products with keys),
    `head_dims` (an attention module, for the width of a head that it keeps), `rotary` (one that is called with tables
    by which pairs of queries and keys are turned: see fastscore.graph.heads.head_dims), `handed` (an attention module,
    for arguments, those in `attribute`, that hold something for each head, which it is to read of its own alone: see
    fastscore.modules.attention.handed), or `tensor` (a parameter that the
    code of a module reads itself, such as a layer scale or an embedding of positions: `layer` is its qualified name,
    and its dimension `dim` holds the channels). index, channel: int64 [M]; position `index[m]` of the layer's output
    (its input, for a consumer or reader) carries the group's channel `channel[m]`; in the projections of queries and
    keys, the rows that go with it. holds: of a producer or consumer that is a parameter which a module's code
    multiplies by, its qualified name, of which `dim` is cut; "" where another layer holds it (see
    fastscore.modules.weights.own_products). For `heads`, head `index[m]` begins at channel `channel[m]`.
    """

    layer: str
    role: Role
    index: Tensor
    channel: Tensor
    dim: int = 0
    attribute: str = ""
    holds: str | None = None

    @property
    def module(self) -> str:
        """Qualified name of the module that holds it."""
        return self.layer.rpartition(".")[0] if self.role == "tensor" else self.layer

    @property
    def tap(self) -> str:
        """What its tap is called: as the layer, at whose input it stands; that at the output of a branch, or of what
        makes queries, otherwise."""
        kinds = {"branch": " (whole)", "query": " (queries)"}
        return self.layer + kinds.get(self.role, "")


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that go together.

    name: the first layer that produces them; channels are numbered in its order. unit: int64 [C]; channels with the
    same unit can only be removed together (the same place in every group of a grouped convolution, or channels that
    are added to each other). least: how many of them stay, whatever goes; a branch may go whole. section: int64 [C],
    numbered from 0, where as many channels have to stay in each section, whichever they are (the dimensions of each
    head); None where all are in one.
    """

    name: str
    channels: int
    unit: Tensor
    members: tuple[Member, ...]
    least: int = 1
    section: Tensor | None = None

    def first_step(self) -> Tensor:
        """Channels that can go without any others, int64 [R]: the first unit, of each section as many."""
        if self.section is None:
            return (self.unit == self.unit[0]).nonzero()[:, 0]
        size = int(torch.bincount(self.unit).max())
        return torch.cat([self._first_of(number, size) for number in range(int(self.section.max()) + 1)])

    def _first_of(self, section: int, size: int) -> Tensor:
        units = self.unit[self.section == section].unique()
        sizes = torch.bincount(self.unit)[units].cumsum(0)
        return torch.isin(self.unit, units[sizes <= size]).nonzero()[:, 0]

    def role(self, *roles: Role) -> Iterator[Member]:
        """The members that play one of `roles`."""
        return (member for member in self.members if member.role in roles)

    def removed_at(self, channels: Tensor) -> Iterator[tuple[Member, Tensor]]:
        """Each member, with the positions of it that go with `channels` (int64 [R]): int64, a part of its index."""
        gone = torch.zeros(self.channels, dtype=torch.bool)
        gone[channels] = True
        return ((member, member.index[gone[member.channel]]) for member in self.members)

    @property
    def edges(self) -> Iterator[Member]:
        """The members where the channels end, and where activation meets gradient."""
        return self.role("consumer", "norm", "gate", "branch", "expert", "query")


@dataclass(frozen=True)
class ChannelGraph:
    """The prunable groups of a model.

    skipped: layer -> why its channels are kept. normalized_by: Conv or Linear -> the BatchNorm that alone reads
    its output. samples: where the samples lie in what layers read. macs: layer, or parameter that the code of its
    module reads -> MACs of the products with it, of one sample. uncounted: operation that no formula knows -> where it
    ran. blocks: residual branches that can go whole, a group of one channel each, which are no part of `groups` (see
    fastscore.graph.blocks.with_blocks). experts: whole experts of mixtures, likewise (see
    fastscore.graph.whole_experts). kept_whole: of "blocks" and "experts", branch or mixture -> why it, or its
    experts, stay. head_dims: dimensions of heads, which can go in the place of whole heads, likewise (see
    fastscore.graph.heads.head_dims.with_head_dims). whole_heads: group -> why its heads go whole or not at all.
    not_both: group of head dimensions -> why none go beside whole heads. searched: which of `blocks`, `experts` and
    `head_dims` were looked for; "norms" where samples are told apart behind BatchNorms, too. training_only: layers that
    run in training alone. chosen: layers of experts that code chooses among, some of which may not run: where no
    batch chooses one, nothing is missed there (see fastscore.graph.trials.idle_siblings).
    kept_biases: Linear or convolution -> what is done with its bias but adding it, so that no mean goes into it (see
    fastscore.graph.trials.bias_trial). drawing: modules that draw random numbers in evaluation mode (see
    fastscore.graph.trials.draws).
    """

    groups: tuple[ChannelGroup, ...]
    skipped: Mapping[str, str]
    normalized_by: Mapping[str, str]
    samples: SampleAxes = field(default_factory=SampleAxes)
    macs: Mapping[str, float] = field(default_factory=dict)
    uncounted: Mapping[str, str] = field(default_factory=dict)
    blocks: tuple[ChannelGroup, ...] = ()
    experts: tuple[ChannelGroup, ...] = ()
    kept_whole: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    head_dims: tuple[ChannelGroup, ...] = ()
    whole_heads: Mapping[str, str] = field(default_factory=dict)
    not_both: Mapping[str, str] = field(default_factory=dict)
    searched: frozenset[str] = frozenset()
    training_only: frozenset[str] = frozenset()
    chosen: frozenset[str] = frozenset()
    kept_biases: Mapping[str, str] = field(default_factory=dict)
    drawing: tuple[str, ...] = ()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of names, widths and index maps: equal for models with the same channels in the same places."""
        digest = hashlib.sha256()
        for group in self.groups:
            for member in group.members:
                role = f"dim{member.dim}" if member.role == "tensor" else member.role + member.attribute
                digest.update(f"{group.name}\0{group.channels}\0{member.layer}\0{role}\0".encode())
                digest.update(member.index.numpy().tobytes() + member.channel.numpy().tobytes())
        return digest.hexdigest()

    def without(self, model: nn.Module, ignore: Ignore) -> "ChannelGraph":
        """This graph less the groups that a layer matched by `ignore` makes, passes or reads, which are `skipped`.

        model: that was traced, or a copy of it. ignore: qualified names (a name stands for all below it; `*` and `?`
        are wildcards), module types, modules; or LayerNames, where matching_layers has looked them up before. Raises
        ValueError where an entry matches no layer.
        """
        ignored = matching_layers(model, ignore)
        reasons = dict[str, str]()
        for group in self.groups:
            hits = [name for member in group.members for name in (member.layer, member.module) if name in ignored]
            hits += [layer for member in group.role("block") for layer in sorted(ignored)
                     if layer.startswith(f"{member.layer}.")]
            if hits:
                reasons[group.name] = "ignored" if group.name in hits else f"ignored with {hits[0]}"
        return self.less(reasons)

    def told_apart(self) -> "ChannelGraph":
        """This graph less the groups whose samples cannot be told apart in a batch of several."""
        untold = {group.name: reason for group in self.groups for edge in group.edges
                  if (reason := self.samples.reason(edge.tap)) is not None}
        return self.less(untold)

    def less(self, reasons: Mapping[str, str]) -> "ChannelGraph":
        """This graph without some groups, whose layers are kept. reasons: name of a group -> why."""
        groups = tuple(group for group in self.groups if group.name not in reasons)
        made = {member.layer for group in groups for member in group.role("producer")}
        tied = {member.layer: f"{TIED}{group.name}" for group in self.groups
                if group.name in reasons for member in group.role("producer") if member.layer not in made}
        return replace(self, groups=groups, skipped={**self.skipped, **tied, **reasons})


def norm_gates(model: nn.Module, graph: ChannelGraph) -> ChannelGraph:
    """One group for each BatchNorm of `model`, whose channels end at its output: the units of arXiv 2310.20203; nothing
    is kept.

    The convolution that a BatchNorm alone reads is the producer of its group. Such channels can be scored and masked;
    surgery needs the groups of `graph`, of this model, or of one that it is a copy of.
    """
    producers = {norm: layer for layer, norm in graph.normalized_by.items()}
    groups = []
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            every = torch.arange(module.num_features)
            members = [Member(name, "gate", every, every)]
            if name in producers:
                members.append(Member(producers[name], "producer", every, every))
            groups.append(ChannelGroup(name, module.num_features, every, tuple(members)))
    return replace(graph, groups=tuple(groups), skipped={})


def check_numbers(model: nn.Module, groups: Sequence[ChannelGroup]) -> None:
    """Raise FloatingPointError, naming it, where NaN is in a layer that a group has channels of."""
    layers = {member.layer for group in groups for member in group.members}
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        path = name.split(".")
        layer = next((layer for end in range(len(path), 0, -1) if (layer := ".".join(path[:end])) in layers), None)
        if layer is not None and tensor.is_floating_point() and not tensor.is_meta and bool(tensor.isnan().any()):
            raise FloatingPointError(f"{layer}: NaN in its {name[len(layer) + 1:] or 'numbers'}: load the model "
                                     "again, or train and score it anew; channels that do not meet this layer go with "
                                     f"ignore={layer!r}")


def listed(ignore: Ignore) -> Ignore:
    """What `ignore` holds, to be looked up as often as need be. Raises TypeError."""
    if isinstance(ignore, (str, type, nn.Module, LayerNames)):
        return ignore
    if not isinstance(ignore, Iterable):
        raise TypeError(f"ignore: {ignore!r:.80}, where names of layers, module types or modules are meant")
    return tuple(ignore)


def matching_layers(model: nn.Module, ignore: Ignore) -> LayerNames:
    """The names of all layers that `ignore` stands for: see ChannelGraph.without. Layers that products with parameters
    are followed as have theirs once the model has been traced."""
    ignore = listed(ignore)
    if isinstance(ignore, LayerNames):
        return ignore
    names: dict[str, object] = {name: module for name, module in model.named_modules() if name}
    kinds = {name: type(module) for name, module in model.named_modules(remove_duplicate=False)}
    names |= {name: parameter for name, parameter in model.named_parameters()  # those that a module's own code reads
              if not name.endswith((".weight", ".bias"))
              or not kinds[name.rpartition(".")[0]].__module__.startswith("torch.")}
    names |= {f"{name.rpartition('.')[0]}.{held}".lstrip("."): layer for name, layer in model.named_modules()
              if isinstance(layer, ParameterLayer) for held in layer.held}  # as the user has them
    names |= own_products.names(model)
    matched: set[str] = set()
    for entry in (ignore,) if isinstance(ignore, (str, type, nn.Module)) else ignore:
        if isinstance(entry, str):
            hits = {name for name in names if fnmatch.fnmatchcase(name, entry)}
        elif isinstance(entry, type):
            hits = {name for name, module in names.items() if isinstance(module, entry)}
        else:
            hits = {name for name, module in names.items() if module is entry}
        if not hits:
            close = difflib.get_close_matches(str(entry), names, n=3)
            raise ValueError(f"ignore: {entry!r} matches no layer of {type(model).__name__}"
                             + (f"; did you mean {', '.join(map(repr, close))}?" if close else ""))
        matched |= {name for name in names if any(name == hit or name.startswith(f"{hit}.") for hit in hits)}
    return LayerNames(matched)
