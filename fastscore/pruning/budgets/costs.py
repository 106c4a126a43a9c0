"""What a network costs as a function of its widths: multiply-accumulates (MACs) and parameters.

A dense layer's share grows with inputs x outputs, a depthwise or normalisation layer's with its channels. What runs
outside of the groups' layers and yet follows their widths, products of activations above all, is found by trial cuts.
The dense figures are counted (see fastscore.modules.macs.counting).
"""

import math
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from fastscore import batches
from fastscore.graph.cutting import heads
from fastscore.graph.groups import READS, ChannelGroup, Member
from fastscore.modules.inspection import device_of
from fastscore.modules.macs.counting import count
from fastscore.modules.weights.experts import ExpertLinear
from fastscore.recovery.compensation import gets_bias

Resource = Literal["channels", "params", "macs"]
Side = Literal["inputs", "outputs", "copies"]
MacsWithout: TypeAlias = Callable[[Mapping[str, Tensor]], int]  # group -> int64 [R] that are gone -> MACs that run then
_UNCOUNTED = ("width", "expert", "head_dims", "rotary", "query")  # numbers; what is measured, and goes elsewhere
# Bytes along the channels that one instruction of a matrix product takes: the depth of a tensor core's multiply (CUDA),
# a vector register elsewhere.
_CPU_BYTES = {"AVX512": 64}
_OTHER_BYTES = 32


@dataclass
class LayerCost:
    """macs = macs_per_width x width, params = weights_per_width x width + params_per_output x outputs,
    where width = inputs x outputs for a dense layer and outputs for a channelwise one.

    bias_below: with fewer inputs than this, the layer has a bias that it had not: compensation for those that went.
    present: whether it is there; without the block that holds it, it costs nothing, whatever its width. copies: of its
    parameters, one for each of several experts, as many of which run for each row however many there are."""

    inputs: int
    outputs: int
    channelwise: bool
    macs_per_width: float
    weights_per_width: float
    params_per_output: float
    bias_below: int = 0
    present: bool = True
    copies: int = 1

    @property
    def width(self) -> int:
        """inputs x outputs, or outputs where each output has its own input."""
        return self.outputs if self.channelwise else self.inputs * self.outputs

    @property
    def macs(self) -> float:
        """MACs for one sample."""
        return self.macs_per_width * self.width if self.present else 0.0

    @property
    def params(self) -> float:
        """Parameters."""
        if not self.present:
            return 0.0
        new_bias = self.inputs < self.bias_below
        return self.copies * (self.weights_per_width * self.width
                              + (self.params_per_output + new_bias) * self.outputs)

    def grow(self, more: int, side: Side) -> tuple[float, float]:
        """Have `more` inputs, outputs or copies; (MACs, parameters) that this adds."""
        if side == "copies":
            before = self.params
            self.copies += more
            return 0.0, self.params - before
        macs, params = self._grow(more, side == "inputs")
        return (macs, self.copies * params) if self.present else (0.0, 0.0)

    def _grow(self, more: int, inputs: bool) -> tuple[float, float]:
        had_bias = self.inputs < self.bias_below
        if inputs:
            self.inputs += more
            width = 0 if self.channelwise else more * self.outputs
            biases = ((self.inputs < self.bias_below) - had_bias) * self.outputs
            return self.macs_per_width * width, self.weights_per_width * width + biases
        self.outputs += more
        width = more if self.channelwise else more * self.inputs
        return self.macs_per_width * width, self.weights_per_width * width + (self.params_per_output + had_bias) * more


def total_macs(model: nn.Module, example_inputs: batches.Batch, forward: batches.Forward = batches.call_model) -> int:
    """MACs of one sample: those that run for the example inputs (see modules.macs.counting), over their number."""
    return count(model, example_inputs, forward).macs


class Costs:
    """The costs of a model whose groups lose channels one after another.

    model must be in evaluation mode (a copy will do). Widths start whole; `remove` and `restore` keep the totals.
    compensate: count the biases that consumers without one get once channels are gone (see
    fastscore.recovery.compensation), but for `kept_biases`, those of the graph. batch_dim: the dimension of the example
    inputs that counts samples.
    returned: what the model returned when its MACs were counted. uncounted: what no formula knew then.
    """

    def __init__(self, model: nn.Module, groups: Iterable[ChannelGroup], example_inputs: batches.Batch,
                 forward: batches.Forward = batches.call_model, compensate: bool = False, batch_dim: int = 0,
                 kept_biases: Container[str] = ()) -> None:
        self.groups = {group.name: group for group in groups}
        counted = count(model, example_inputs, forward, batch_dim)
        per_layer, self.returned, self.uncounted = counted.layers, counted.returned, counted.uncounted
        self.layers: dict[str, LayerCost] = {}
        counted_parameters = set[int]()  # a head that is tied to an embedding has no weight of its own
        # group -> positions of each channel in a layer -> [(layer, what goes of it)]
        self._losses: dict[str, dict[tuple[int, ...], list[tuple[LayerCost, Side]]]] = {}
        for group in self.groups.values():
            losses = self._losses[group.name] = defaultdict(list)
            for member in () if any(group.role("block")) else group.members:
                if member.role in _UNCOUNTED:
                    continue
                held = model.get_submodule(member.module)._modules.get(member.layer.rpartition(".")[2])
                copied = isinstance(held, ExpertLinear) and member.role == "tensor"
                layer, own = model.get_submodule(member.module), per_layer.get(member.layer, 0.0)
                if member.layer not in self.layers:
                    self.layers[member.layer] = _heads_cost(member, layer, per_layer) if member.role == "heads" \
                        else _tensor_cost(member, layer) if member.role == "tensor" and not copied \
                        else _layer_cost(held if copied and held is not None else layer, own, counted_parameters)
                cost = self.layers[member.layer]
                if compensate and member.role == "consumer" and gets_bias(model, member.layer, kept_biases):
                    cost.bias_below = cost.inputs
                positions = np.bincount(member.channel.numpy(), minlength=group.channels).tolist()
                side: Side = "copies" if copied else "inputs" if member.role in READS else "outputs"
                losses[tuple(positions)].append((cost, side))
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
        self._held = {block: [name for name, makers in self._makers.items() if not layers.isdisjoint(map(id, makers))]
                      for block, layers in inside.items()}  # group of a branch -> groups with layers in it
        self.totals: dict[Resource, float] = {
            "channels": sum(group.channels for group in self.groups.values()),
            "params": sum(parameter.numel() for parameter in model.parameters()),
            "macs": counted.macs,
        }
        self.dense: Mapping[Resource, float] = dict(self.totals)

    def _layers_inside(self, model: nn.Module, block: str, macs: Mapping[str, float]) -> dict[str, LayerCost]:
        """The layers of a block that lose channels, and what all else in it costs as one more, under the block's name
        (with an addition where that is a layer already: an attention that loses heads)."""
        inside = {name: cost for name, cost in self.layers.items() if f"{name}.".startswith(f"{block}.")}
        params = sum(parameter.numel() for parameter in model.get_submodule(block).parameters())
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
        """
        if groups := [group for group in self.groups.values() if int(group.unit.max()) > 0]:
            self._learn(groups, macs_without)

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
        if len(groups) > 1 and not abs(more) < 0.5:  # or it does not run
            self._learn(groups[:len(groups) // 2], macs_without)
            self._learn(groups[len(groups) // 2:], macs_without)
        elif abs(more) >= 0.5:
            group, each = groups[0], more / len(gone[groups[0].name])
            self._losses[group.name][(1,) * group.channels].append(
                (LayerCost(group.channels, group.channels, True, each, 0.0, 0.0), "outputs"))

    def channels_left(self, group: str) -> int:
        """How many of a group's channels there are: none where all that makes them went with a branch."""
        makers = self._makers[group]
        return self._left[group] if not makers or any(layer.present for layer in makers) else 0

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
        changed = (group, *self._held.get(group, ()))
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
        self._left[group] += sign * len(channels)
        self.totals["channels"] += sum(map(self.channels_left, changed)) - before
        self.totals["macs"] += macs
        self.totals["params"] += params


def _heads_cost(member: Member, module: nn.Module, macs: Mapping[str, float]) -> LayerCost:
    """Of an attention module, for each head: what it computes beside its layers, and what it holds itself."""
    count = len(member.index)
    below = sum(macs.get(f"{member.layer}.{name}", 0.0) for name, layer in module.named_modules()
                if isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)))
    own = sum(parameter.numel() for name in heads.tensors(module)
              if (parameter := module._parameters.get(name)) is not None)
    return LayerCost(count, count, True, (macs.get(member.layer, 0.0) - below) / count, 0.0, own / count)


def _tensor_cost(member: Member, module: nn.Module) -> LayerCost:
    """Of a parameter or buffer that the module's code reads itself: it is multiplied or added element by element."""
    name = member.layer.rpartition(".")[2]
    held: Tensor = getattr(module, name)
    width = held.shape[member.dim]
    return LayerCost(width, width, True, 0.0, 0.0, held.numel() / width if name in module._parameters else 0.0)


def _layer_cost(layer: nn.Module, macs: float, counted: set[int]) -> LayerCost:
    """counted: ids of the parameters that stand in the cost of another layer; this one's are added."""
    own = {id(parameter): parameter.numel() for parameter in layer.parameters() if id(parameter) not in counted}
    counted.update(own)

    def numel(parameter: Tensor | None) -> int:
        return own.get(id(parameter), 0)

    if isinstance(layer, nn.Embedding):
        width = layer.embedding_dim
        return LayerCost(width, width, True, macs / width, 0.0, sum(own.values()) / width)
    if isinstance(layer, nn.Linear):
        inputs, outputs, channelwise = layer.in_features, layer.out_features, False
    elif isinstance(layer, nn.modules.conv._ConvNd):
        inputs, outputs = layer.in_channels, layer.out_channels
        channelwise = layer.groups == layer.out_channels and layer.groups > 1
    elif isinstance(layer, nn.PReLU) and layer.num_parameters == 1:  # one slope for all, however many they are
        return LayerCost(1, 1, True, 0.0, 0.0, 0.0)
    else:  # a normalisation: weight and bias are both one for each channel
        parameters = sum(parameter.numel() for parameter in layer.parameters())
        outputs = next((parameter.numel() for parameter in layer.parameters()), 1)
        return LayerCost(outputs, outputs, True, macs / outputs, 0.0, parameters / outputs)
    width = outputs if channelwise else inputs * outputs
    copies = len(layer.weight) if isinstance(layer, ExpertLinear) else 1
    return LayerCost(inputs, outputs, channelwise, macs / width, numel(layer._parameters["weight"]) / width / copies,
                     numel(layer._parameters["bias"]) / outputs, copies=copies)


def channel_multiple(model: nn.Module) -> int:
    """Channels that the widths of `model` should be multiples of: 8, 16 or 32, by its device and floating-point dtype.

    On CUDA 8 in float32 (TF32) and 16 in half precision; on a CPU with AVX-512 16 and 32; on others 8 and 16.
    """
    device = device_of(model)
    itemsize = next((p.dtype.itemsize for p in model.parameters() if p.is_floating_point()), 4)
    capability = torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else ""
    return max(8, _CPU_BYTES.get(capability, _OTHER_BYTES) // itemsize)
