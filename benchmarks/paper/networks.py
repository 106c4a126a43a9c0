"""The paper's networks, and two for Fashion-MNIST. All are new and untrained; widths count the paper's gates."""

from collections.abc import Callable

import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from benchmarks.recovery.resnet import ResNet


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity() if stride == 1 and inputs == outputs else nn.Sequential(
            nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def cifar_resnet(depth: int, channels: int, classes: int) -> nn.Module:
    """ResNet-20, -56, ... for small images (He et al., arXiv 1512.03385, section 4.2), with 1x1 shortcuts."""
    layers: list[nn.Module] = [nn.Conv2d(channels, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    inputs = 16
    for outputs in (16, 32, 64):
        for i in range((depth - 2) // 6):
            layers.append(Block(inputs, outputs, 2 if i == 0 and outputs > 16 else 1))
            inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))


def small_vgg(channels: int, classes: int) -> nn.Module:
    """Six convolutions of 32 to 128 channels, two to a resolution."""
    layers: list[nn.Module] = []
    inputs = channels
    for outputs in (32, 64, 128):
        for _ in range(2):
            layers += [nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            inputs = outputs
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, classes))


def vgg19(channels: int, classes: int) -> nn.Module:
    """VGG-19 with BatchNorm, one Linear behind a global average."""
    features = torchvision.models.vgg19_bn().features
    return nn.Sequential(*features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes))


def resnet18(channels: int, classes: int) -> nn.Module:
    """torchvision's ResNet-18."""
    return torchvision.models.resnet18(num_classes=classes)


# name -> (channels of an image, classes) -> network
NETWORKS: dict[str, Callable[[int, int], nn.Module]] = {
    "resnet20": lambda channels, classes: cifar_resnet(20, channels, classes),
    "resnet56": lambda channels, classes: cifar_resnet(56, channels, classes),
    "resnet20-padded": lambda channels, classes: ResNet(20, classes),  # for images of three channels
    "resnet56-padded": lambda channels, classes: ResNet(56, classes),
    "vgg19": vgg19,
    "resnet18": resnet18,
    "vgg6": small_vgg,
}
