"""Convolutions that end in a ReLU, as one kernel of cuDNN's: bias and ReLU are done before the result is written.

PyTorch's own layers write it, read it and write it again for the bias, and once more for the ReLU.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fastscore.fastpath.packed_layers import RELU, ClampBounds

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def available(layer: Any, clamp: ClampBounds | None) -> bool:
    """Whether cuDNN has one kernel for `layer` and the `clamp` it ends in; depthwise ones are faster elsewhere."""
    return (type(layer) is nn.Conv2d and clamp == RELU and layer.weight.device.type == "cuda"
            and layer.weight.dtype in DTYPES and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
            and (layer.groups == 1 or layer.groups < layer.in_channels)
            and torch.version.hip is None and torch.backends.cudnn.enabled and torch.backends.cudnn.is_available())


class Convolution:
    """relu(layer(x)) for a Conv2d with zeros for padding, on [N, C, H, W]."""

    def __init__(self, layer: nn.Conv2d) -> None:
        self.weight, self.bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
        self.arguments = list(layer.stride), [int(pad) for pad in layer.padding], list(layer.dilation)
        self.groups = layer.groups

    def forward(self, x: Tensor) -> Tensor:
        """[N, C_in, H, W] -> [N, C_out, H', W']."""
        y: Tensor = torch.ops.aten.cudnn_convolution_relu(x, self.weight, self.bias, *self.arguments, self.groups)
        return y

    def backward(self, g: Tensor, shape: torch.Size) -> Tensor:
        """[N, C_out, H', W'], the gradient before the ReLU -> `shape`, [N, C_in, H, W]."""
        like = torch.empty(shape, dtype=g.dtype, device=g.device, memory_format=torch.channels_last)  # for its shape
        found: Tensor = torch.ops.aten.convolution_backward(g, like, self.weight, None, *self.arguments, False, [0, 0],
                                                            self.groups, [True, False, False])[0]
        return found

    def channels(self, x: Tensor) -> int:
        """C_out."""
        return len(self.weight)
