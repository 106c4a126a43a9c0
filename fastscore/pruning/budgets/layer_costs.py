"""What one layer costs as a function of its width."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from fastscore.graph.cutting import heads
from fastscore.graph.groups import Member
from fastscore.modules.weights.own_linear import OwnLinear
from fastscore.modules.weights.parameter_layers import ParameterLinear

Side = Literal["inputs", "outputs", "copies"]
_Ints: TypeAlias = NDArray[np.int64]


@dataclass
class LayerCost:
    """macs = macs_per_width x width, params = weights_per_width x width + params_per_output x outputs,
    where width = inputs x outputs for a dense layer and outputs for a channelwise one.

    bias_below: with fewer inputs than this, the layer has a bias that it had not: compensation for those that went.
    present: whether it is there; without the block that holds it, it costs nothing, whatever its width. copies: of its
    parameters, one for each of several experts, as many of which run for each row however many there are; or, where
    they are `all_run`, of several heads."""

    inputs: int
    outputs: int
    channelwise: bool
    macs_per_width: float
    weights_per_width: float
    params_per_output: float
    bias_below: int = 0
    present: bool = True
    copies: int = 1
    all_run: bool = False

    @property
    def width(self) -> int:
        """inputs x outputs, or outputs where each output has its own input."""
        return self.outputs if self.channelwise else self.inputs * self.outputs

    @property
    def macs(self) -> float:
        """MACs for one sample."""
        return self.macs_per_width * self.width * self._runs if self.present else 0.0

    @property
    def _runs(self) -> int:
        return self.copies if self.all_run else 1

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
            macs, params = self.macs, self.params
            self.copies += more
            return self.macs - macs, self.params - params
        macs, params = self._grow(more, side == "inputs")
        return (self._runs * macs, self.copies * params) if self.present else (0.0, 0.0)

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


@dataclass(frozen=True)
class Places:
    """Where a group's channels lie in one layer that loses some of these positions to another group, too.

    index, channel: int64 [M], as a member's. takers: int64, how many have taken each position of the layer."""

    cost: LayerCost
    side: Side
    index: _Ints
    channel: _Ints
    takers: _Ints

    def take(self, channels: Sequence[int], more: int) -> tuple[float, float]:
        """(MACs, parameters) that are there more once `channels` take, or by `more` < 0 give back, their positions."""
        before = int((self.takers == 0).sum())
        np.add.at(self.takers, self.index[np.isin(self.channel, channels)], more)
        return self.cost.grow(int((self.takers == 0).sum()) - before, self.side)


def heads_cost(member: Member, module: nn.Module, macs: Mapping[str, float], heads_of: Mapping[str, int]
               ) -> LayerCost:
    """Of each head of a module, whose code may be of several attentions: what it computes beside its layers, and what
    it holds itself. heads_of: a module -> the heads of all of them."""
    count = heads_of[member.layer]
    below = sum(macs.get(f"{member.layer}.{name}", 0.0) for name, layer in module.named_modules()
                if isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)))
    own = sum(parameter.numel() for name in heads.tensors(module)
              if (parameter := module._parameters.get(name)) is not None)
    return LayerCost(count, count, True, (macs.get(member.layer, 0.0) - below) / count, 0.0, own / count)


def tensor_cost(member: Member, module: nn.Module) -> LayerCost:
    """Of a parameter or buffer that the module's code reads itself: it is multiplied or added element by element."""
    name = member.layer.rpartition(".")[2]
    held: Tensor = getattr(module, name)
    width = held.shape[member.dim]
    return LayerCost(width, width, True, 0.0, 0.0, held.numel() / width if name in module._parameters else 0.0)


def layer_cost(layer: nn.Module, macs: float, counted: set[int]) -> LayerCost:
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
        channelwise = layer.groups > 1 and layer.groups in (inputs, outputs)
    elif isinstance(layer, nn.PReLU) and layer.num_parameters == 1:  # one slope for all, however many they are
        return LayerCost(1, 1, True, 0.0, 0.0, 0.0)
    else:  # a normalisation: weight and bias are both one for each channel
        parameters = sum(parameter.numel() for parameter in layer.parameters())
        outputs = next((parameter.numel() for parameter in layer.parameters()), 1)
        return LayerCost(outputs, outputs, True, macs / outputs, 0.0, parameters / outputs)
    width = outputs if channelwise else inputs * outputs
    copies = len(layer.weight) if isinstance(layer, ParameterLinear) and layer.weight.dim() == 3 else 1
    weights, biases = (numel(layer._parameters.get(name)) for name in ("weight", "bias"))
    all_run = copies > 1 and isinstance(layer, OwnLinear)
    return LayerCost(inputs, outputs, channelwise, macs / width / (copies if all_run else 1),
                     weights / width / copies, biases / outputs, copies=copies, all_run=all_run)
