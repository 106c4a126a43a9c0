"""ResNet-20 and -56 for CIFAR-10 as in He et al. (arXiv 1512.03385, section 4.2), with parameter-free shortcuts.

The names of the layers are those of Y. Idelbayev's published checkpoints, which `load` reads.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FILES = {20: "resnet20-12fca82f.th", 56: "resnet56-4bfd9763.th"}
ADAPTED = "networks/cifar10-jpeg-resnet{}-padded-0-1epochs.pt"


class Block(nn.Module):
    """Two 3x3 convolutions; where the shape changes, the shortcut takes every second pixel and pads channels with 0."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.padding = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.padding:
            x = F.pad(x[:, :, ::self.stride, ::self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(y + x)


class ResNet(nn.Module):
    """Three stages of 16, 32 and 64 channels."""

    def __init__(self, depth: int, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        blocks, inputs = (depth - 2) // 6, 16
        for stage, outputs in enumerate((16, 32, 64), 1):
            layers = []
            for i in range(blocks):
                layers.append(Block(inputs, outputs, 2 if i == 0 and stage > 1 else 1))
                inputs = outputs
            setattr(self, f"layer{stage}", nn.Sequential(*layers))
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def load(path: Path, depth: int) -> ResNet:
    """The network of a checkpoint: a state dict, nested under "model", or under "state_dict" with "module." before each
    name."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    state = state.get("state_dict", state.get("model", state))
    model = ResNet(depth)
    model.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    return model.eval()
