"""3x3 convolutions in float32 with a quarter of the products, for both directions (see csrc/cpu/winograd.h)."""

import copy
import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastscore.fastpath.packed_layers import RELU, ClampBounds, flipped
from fastscore.ops import library

TILE = 4  # outputs of a tile, in height and width
PANEL = 32  # outputs whose transformed weights lie beside each other
POINTS = (0.0, 2 / 3, -2 / 3, 3 / 2, -3 / 2)  # and infinity
_LEAST_CHANNELS = 32  # below, transforms take as long as what they save
_LEAST_FILL = 0.75  # of the tiles' area
# Transformed weights take four times the memory: that many at most, but for images of as many tiles.
_MOST_WEIGHTS, _MANY_TILES = 4 << 20, 16

_winograd = torch.ops.fastscore.winograd.default


@functools.cache
def kernel_transform() -> Tensor:
    """G ⊗ G, [36, 9] in float64: what a kernel's nine weights become."""
    rows = [[point**power / math.prod(point - other for other in POINTS if other != point) for power in range(3)]
            for point in POINTS]
    g = torch.tensor([*rows, [0.0, 0.0, 1.0]], dtype=torch.float64)
    return torch.kron(g, g)


def transformed(weight: Tensor) -> Tensor:
    """[K, C, 3, 3] -> [36, ceil(K / PANEL), C, PANEL], with zeros for outputs that there are not."""
    outputs, inputs = weight.shape[:2]
    panels = -(-outputs // PANEL)
    taps = weight.new_zeros(9, panels * PANEL, inputs)
    taps[:, :outputs] = weight.permute(2, 3, 0, 1).reshape(9, outputs, inputs)
    taps = taps.view(9, panels, PANEL, inputs).transpose(2, 3).reshape(9, -1)
    return (kernel_transform().to(weight.dtype) @ taps).view(36, panels, inputs, PANEL)


def takes(layer: nn.Module, size: Sequence[int]) -> bool:
    """Whether `layer` is a Conv2d that is faster so, with zeros for padding on images of that height and width."""
    if not isinstance(layer, nn.Conv2d) or layer.weight.dtype != torch.float32 or layer.groups != 1:
        return False
    padding = [int(pad) for pad in layer.padding]
    made = [each + 2 * pad - 2 for each, pad in zip(size, padding, strict=True)]
    tiles, weights = math.prod(-(-each // TILE) for each in made), 36 * layer.in_channels * layer.out_channels
    return ((layer.kernel_size, layer.stride, layer.dilation) == ((3, 3), (1, 1), (1, 1))
            and max(padding) <= 2 and min(layer.in_channels, layer.out_channels) >= _LEAST_CHANNELS
            and (weights <= _MOST_WEIGHTS or tiles >= _MANY_TILES)
            and math.prod(made) >= _LEAST_FILL * tiles * TILE**2)


class Convolution:
    """A Conv2d that it `takes`, on [N, C, H, W]. Backward is a convolution with the flipped weight."""

    def __init__(self, layer: nn.Conv2d, clamp: ClampBounds | None = None) -> None:
        weight = layer.weight.detach()
        self.bias, self.clamp = layer.bias, clamp
        self.padding = [int(pad) for pad in layer.padding]
        self.width, self.inputs = layer.out_channels, layer.in_channels
        self.weight, self.backward_weight = transformed(weight), transformed(flipped(weight, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[N, C_in, H, W] -> [N, C_out, H', W']."""
        return self._run(x, self.weight, self.bias, self.width, self.padding, self.clamp)

    def backward(self, g: Tensor, shape: torch.Size) -> Tensor:
        """[N, C_out, H', W'] -> `shape`, [N, C_in, H, W]."""
        return self._run(g, self.backward_weight, None, self.inputs, [2 - pad for pad in self.padding], None)

    def channels(self, x: Tensor) -> int:
        """C_out."""
        return self.width

    def rectified(self) -> "Convolution":
        """The same, with a ReLU behind it; it is not clamped itself, and shares its weights."""
        other = copy.copy(self)
        other.clamp = RELU
        return other

    @staticmethod
    def _run(x: Tensor, weight: Tensor, bias: Tensor | None, outputs: int, padding: list[int],
             clamp: ClampBounds | None) -> Tensor:
        made: Tensor = library.run(_winograd, x.contiguous(memory_format=torch.channels_last), weight, bias, outputs,
                                   *padding, *(clamp or (-math.inf, math.inf)))
        return made
