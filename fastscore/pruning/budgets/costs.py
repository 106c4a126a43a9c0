"""What a network costs as a function of its widths: multiply-accumulates (MACs) and parameters.

A dense layer's share grows with inputs x outputs, a depthwise or normalisation layer's with its channels. What runs
outside of the groups' layers and yet follows their widths, products of activations above all, is found by trial cuts.
The dense figures are counted (see fastscore.modules.macs.counting).
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from fastscore.batches.calls import Forward, call_model
from fastscore.batches.parts import Batch
from fastscore.graph.groups import READS, ChannelGroup, Member
from fastscore.graph.trials.plain_layers import plain_kind
from fastscore.modules.inspection import device_of, submodule
from fastscore.modules.macs.counting import count
from fastscore.modules.weights.parameter_layers import ParameterLinear
from fastscore.pruning.budgets.layer_costs import LayerCost, Places, Side, heads_cost, layer_cost, tensor_cost
from fastscore.recovery.compensation import gets_bias

Resource = Literal["channels", "params", "macs"]
MacsWithout: TypeAlias = Callable[[Mapping[str, Tensor]], int]  # group -> int64 [R] that are gone -> MACs that run then
_Part: TypeAlias = tuple[str, Member, tuple[int, ...], LayerCost]  # (group, member, positions of each channel, layer)
# numbers; what is measured, and goes elsewhere
_UNCOUNTED = ("width", "expert", "head_dims", "rotary", "query", "handed")
# Bytes along the channels that one instruction of a matrix product takes: the depth of a tensor core's multiply (CUDA),
# a vector register elsewhere.
_CPU_BYTES = {"AVX512": 64}
_OTHER_BYTES = 32


def total_macs(model: nn.Module, example_inputs: Batch, forward: Forward = call_model) -> int:
    """MACs of one sample: those that run for the example inputs (see modules.macs.counting), over their number."""
    return count(model, example_inputs, forward).macs


class Costs:
    """The costs of a model whose groups lose channels one after another.

    model must be in evaluation mode (a copy will do). Widths start whole; `remove` and `restore` keep the totals.
    compensate: count the biases that consumers without one get once channels are gone (see
    fastscore.recovery.compensation), but for `kept_biases`, those of the graph. batch_dim: the dimension of the example
    inputs that counts samples.
    returned: what the model returned when its MACs were counted. uncounted: what no formula knew then.
    sums_hold: whether learn_products found nothing that the sums over the groups' layers did not tell.
    complete: whether nothing multiplies but layers of PyTorch's own code, by their weights, each as its sum says: rows
    of what they read follow no width, or the surgery that groups are tried by would have told (see
    fastscore.graph.trials.surgery_trial).
    """

    def __init__(self, model: nn.Module, groups: Iterable[ChannelGroup], example_inputs: Batch,
                 forward: Forward = call_model, compensate: bool = False, batch_dim: int = 0,
                 kept_biases: Container[str] = ()) -> None:
        self.groups = {group.name: group for group in groups}
        counted = count(model, example_inputs, forward, batch_dim)
        per_layer, self.returned, self.uncounted = counted.layers, counted.returned, counted.uncounted
        self.layers: dict[str, LayerCost] = {}
        counted_parameters = set[int]()  # a head that is tied to an embedding has no weight of its own
        # group -> positions of each channel in a layer -> [(layer, what goes of it)]
        self._losses: dict[str, dict[tuple[int, ...], list[tuple[LayerCost, Side]]]] = {
            name: defaultdict(list) for name in self.groups}
        at: dict[tuple[str, Side, int], list[_Part]] = {}  # (layer, side, dimension) -> what goes there
        heads = Counter(member.layer for group in self.groups.values() for member in group.role("heads")
                        for _ in member.index)
        for group in self.groups.values():
            for member in () if any(group.role("block")) else group.members:
                if member.role in _UNCOUNTED:
                    continue
                held = submodule(model, member.module)._modules.get(member.layer.rpartition(".")[2])
                copied = member.role == "tensor" and isinstance(held, ParameterLinear) and \
                    held.at(member.dim) == held.weight.dim() - 3
                layer, own = submodule(model, member.module), per_layer.get(member.layer, 0.0)
                if member.layer not in self.layers:
                    self.layers[member.layer] = heads_cost(member, layer, per_layer, heads) if member.role == "heads" \
                        else tensor_cost(member, layer) if member.role == "tensor" and not copied \
                        else layer_cost(held if copied and held is not None else layer, own, counted_parameters)
                cost = self.layers[member.layer]
                if compensate and member.role == "consumer" and gets_bias(model, member.layer, kept_biases):
                    cost.bias_below = cost.inputs
                positions = np.bincount(member.channel.numpy(), minlength=group.channels).tolist()
                side: Side = "copies" if copied else "inputs" if member.role in READS else "outputs"
                owner = f"{member.layer} {group.name}" if member.role == "heads" else member.layer  # each its own
                at.setdefault((owner, side, member.dim), []).append((group.name, member, tuple(positions), cost))
        self._places = self._split(at)
        # group of a branch -> the layers that go with it
        self._blocks: dict[str, dict[str, LayerCost]] = defaultdict(dict)
        for name, group in self.groups.items():
            for block in group.role("block"):
                self._blocks[name] |= self._layers_inside(model, block.layer, per_layer)
        self._left = {name: group.channels for name, group in self.groups.items()}
        self._makers = {name: () if any(group.role("block")) else tuple(
            self.layers[member.layer] for member in group.members
            if member.layer in self.layers and member.role not in READS) for name, group in self.groups.items()}
        inside = {name: set(map(id, layers.values())) for name, layers in self._blocks.items()}
        takers = {name: {id(places.takers) for places in each} for name, each in self._places.items()}
        self._beside = {name: [other for other, its in takers.items() if other != name and not own.isdisjoint(its)]
                        for name, own in takers.items()}  # group -> those that take some of the same positions
        self._held = {block: [name for name, makers in self._makers.items() if not layers.isdisjoint(map(id, makers))]
                      for block, layers in inside.items()}  # group of a branch -> groups with layers in it
        self.totals: dict[Resource, float] = {
            "channels": sum(group.channels for group in self.groups.values()),
            "params": sum(parameter.numel() for parameter in model.parameters()),
            "macs": counted.macs,
        }
        self.dense: Mapping[Resource, float] = dict(self.totals)
        self.sums_hold = False
        self.complete = not (counted.uncounted or self._blocks or self._places) and \
            self.tells(sum(counted.weights.values()), counted.macs) and all(
                name in layers and plain_kind(layers[name]) is not None
                and (name not in self.layers or self.tells(self.layers[name].macs, macs))
                for layers in [dict(model.named_modules())] for name, macs in counted.weights.items())

    def _split(self, at: Mapping[tuple[str, Side, int], Sequence[_Part]]) -> dict[str, list[Places]]:
        """Group -> where it takes what others may take, too, as heads do that go beside their dimensions: each position
        goes once. All else is in `_losses`."""
        shared: dict[str, list[Places]] = defaultdict(list)
        for (_, side, _), parts in at.items():
            seen: dict[str, set[int]] = defaultdict(set)
            for group, member, _, _ in parts:
                seen[group].update(member.index.tolist())
            if sum(map(len, seen.values())) == len(set().union(*seen.values())):
                for group, _, positions, cost in parts:
                    self._losses[group][positions].append((cost, side))
                continue
            takers = np.zeros(1 + max(map(max, seen.values())), dtype=np.int64)
            for group, member, _, cost in parts:
                shared[group].append(Places(cost, side, member.index.numpy(), member.channel.numpy(), takers))
        return dict(shared)

    def _layers_inside(self, model: nn.Module, block: str, macs: Mapping[str, float]) -> dict[str, LayerCost]:
        """The layers of a block that lose channels, and what all else in it costs as one more, under the block's name
        (with an addition where that is a layer already: an attention that loses heads)."""
        inside = {name: cost for name, cost in self.layers.items() if f"{name}.".startswith(f"{block}.")}
        params = sum(parameter.numel() for parameter in submodule(model, block).parameters())
        rest = LayerCost(1, 1, True, macs.get(block, 0.0) - sum(cost.macs for cost in inside.values()), 0.0,
                         params - sum(cost.params for cost in inside.values()))
        name = f"{block} (all else)" if block in self.layers else block
        self.layers[name] = rest
        return {**inside, name: rest}

    def layers_of(self, group: str) -> Iterable[str]:
        """The layers whose costs change where channels of a group go: of a branch, all that it holds."""
        return self._blocks.get(group) or {member.layer for member in self.groups[group].members
                                             if member.layer in self.layers}

    def remove(self, group: str, channels: Iterable[int]) -> None:
        """Take channels of a group away."""
        self._change(group, channels, -1)

    def restore(self, group: str, channels: Iterable[int]) -> None:
        """Give channels of a group back."""
        self._change(group, channels, 1)

    def learn_products(self, macs_without: MacsWithout) -> None:
        """Find what a channel costs beside the groups' layers, by what is counted in trial cuts; nothing is gone yet.

        All groups lose a unit at once; where other MACs remain than were foreseen, halves do, down to single groups.
        None is cut where the sums are complete.
        """
        if groups := [group for group in self.groups.values() if int(group.unit.max()) > 0]:
            self.sums_hold = True
            if not self.complete:
                self._learn(groups, macs_without)

    def tells(self, foreseen: float, counted: float) -> bool:
        """Whether so many MACs that were foreseen are those that were counted, but for the rounding of sums."""
        return abs(counted - foreseen) <= max(0.5, 1e-9 * self.dense["macs"])

    def _learn(self, groups: Sequence[ChannelGroup], macs_without: MacsWithout) -> None:
        # no function within learn_products: one that calls itself would keep the model alive until it is collected
        gone = {group.name: group.first_step() for group in groups}
        for name, channels in gone.items():
            self.remove(name, channels.tolist())
        foreseen = self.totals["macs"]
        for name, channels in gone.items():
            self.restore(name, channels.tolist())
        self.totals.update(self.dense)
        try:
            more = foreseen - macs_without(gone)
        except RuntimeError:  # of a group that goes, the trial of the selection tells it
            more = math.nan
        self.sums_hold = self.sums_hold and abs(more) < 0.5
        if len(groups) > 1 and not abs(more) < 0.5:  # or it does not run
            self._learn(groups[:len(groups) // 2], macs_without)
            self._learn(groups[len(groups) // 2:], macs_without)
        elif abs(more) >= 0.5:
            group, each = groups[0], more / len(gone[groups[0].name])
            self._losses[group.name][(1,) * group.channels].append(
                (LayerCost(group.channels, group.channels, True, each, 0.0, 0.0), "outputs"))

    def alike(self, group: str, channel: int) -> object:
        """Equal for channels of a group that cost the same."""
        if self._blocks or self._places:
            return channel
        return tuple(positions[channel] for positions in self._losses[group])

    def channels_left(self, group: str) -> int:
        """How many of a group's channels there are: none where all that makes them went with a branch; without those
        that went with another group's."""
        makers = self._makers[group]
        if makers and not any(layer.present for layer in makers):
            return 0
        return self.groups[group].channels - len(self._gone(group)) if group in self._places else self._left[group]

    def with_others(self, removed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is gone, group -> int64 [R], ascending: `removed`, and what went with that: dimensions with their head,
        and a head's channels with their dimensions."""
        return {**removed, **{group: gone for group in self._places if len(gone := self._gone(group))}}

    def _gone(self, group: str) -> Tensor:
        """Channels that no layer reads; of those that none ever read, that none makes."""
        read, made = (np.zeros((2, self.groups[group].channels), dtype=bool) for _ in range(2))  # ever, and now
        for places in self._places[group]:
            rows = read if places.side == "inputs" else made
            rows[0, places.channel] = True
            rows[1, places.channel[places.takers[places.index] == 0]] = True
        return torch.from_numpy(~np.where(read[0], read[1], made[1])).nonzero()[:, 0]

    def by_group(self) -> list[tuple[float, float]]:
        """(MACs, parameters) of each group's own layers as they are; one of several groups counts with the first."""
        counted: set[str] = set()
        rows = []
        for group in self.groups.values():
            layers = {member.layer: self.layers[member.layer] for member in group.members
                      if member.layer in self.layers and member.role not in READS and member.layer not in counted}
            counted.update(layers)
            own = self._blocks.get(group.name) or layers
            rows.append((sum(layer.macs for layer in own.values()), sum(layer.params for layer in own.values())))
        return rows

    def _change(self, group: str, channels: Iterable[int], sign: int) -> None:
        channels = tuple(channels)
        macs = params = 0.0
        apart = not self._blocks and not self._places  # from other groups
        changed = () if apart else (group, *self._held.get(group, ()), *self._beside.get(group, ()))
        before = sum(map(self.channels_left, changed))
        for cost in self._blocks.get(group, {}).values() if channels else ():
            cost.present = True
            macs += sign * cost.macs
            params += sign * cost.params
            cost.present = sign > 0
        for positions, losses in self._losses[group].items():
            more = sign * (positions[channels[0]] if len(channels) == 1 else sum([positions[i] for i in channels]))
            if more:
                for cost, side in losses:
                    more_macs, more_params = cost.grow(more, side)
                    macs += more_macs
                    params += more_params
        for places in self._places.get(group, ()):
            more_macs, more_params = places.take(channels, -sign)
            macs += more_macs
            params += more_params
        self._left[group] += sign * len(channels)
        self.totals["channels"] += sign * len(channels) if apart else sum(map(self.channels_left, changed)) - before
        self.totals["macs"] += macs
        self.totals["params"] += params


def channel_multiple(model: nn.Module) -> int:
    """Channels that the widths of `model` should be multiples of: 8, 16 or 32, by its device and floating-point dtype.

    On CUDA 8 in float32 (TF32) and 16 in half precision; on a CPU with AVX-512 16 and 32; on others 8 and 16.
    """
    device = device_of(model)
    itemsize = next((p.dtype.itemsize for p in model.parameters() if p.is_floating_point()), 4)
    capability = torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else ""
    return max(8, _CPU_BYTES.get(capability, _OTHER_BYTES) // itemsize)
