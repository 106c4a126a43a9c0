"""The small networks of networks.py, and the blocks that they are made of."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _conv(inputs: int, outputs: int, size: int = 3, stride: int = 1, groups: int = 1, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, groups=groups, bias=bias)


class Head(nn.Module):
    """Global average, then a Linear."""

    def __init__(self, inputs: int, classes: int = 4) -> None:
        super().__init__()
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))


def plain() -> nn.Module:
    """Convolutions with biases and a pool between."""
    return nn.Sequential(_conv(3, 5, bias=True), nn.ReLU(), nn.MaxPool2d(2), _conv(5, 7, bias=True), nn.BatchNorm2d(7),
                         nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 4))


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut, as in ResNet-18; with inplace, the add and the ReLUs work in place."""

    def __init__(self, inputs: int, hidden: int, outputs: int, stride: int = 1, inplace: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(inputs, hidden, stride=stride), nn.BatchNorm2d(hidden)
        self.conv2, self.bn2 = _conv(hidden, outputs), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=inplace)
        self.shortcut = nn.Identity() if inputs == outputs and stride == 1 else \
            nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.inplace:
            y += self.shortcut(x)
        else:
            y = y + self.shortcut(x)
        return self.relu(y)


class Residual(nn.Module):
    """A stem whose channels run on through the shortcut of the first block."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(_conv(3, 6), nn.BatchNorm2d(6), nn.ReLU(inplace=inplace))
        self.block1 = BasicBlock(6, 5, 6, inplace=inplace)
        self.block2 = BasicBlock(6, 8, 7, stride=2, inplace=inplace)
        self.head = Head(7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block2(self.block1(self.stem(x))))


class Dense(nn.Module):
    """Concatenations, old before new and new before old."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0, self.conv1, self.conv2 = _conv(3, 4), _conv(4, 3), _conv(7, 5)
        self.bn, self.transition = nn.BatchNorm2d(12), _conv(12, 6, 1)
        self.head = Head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv0(x)
        x = torch.cat([x, self.conv1(F.relu(x))], 1)
        x = torch.cat([self.conv2(F.relu(x)), x], 1)
        return self.head(F.relu(self.transition(F.relu(self.bn(x)))))


class Mobile(nn.Module):
    """An inverted residual block: expand, depthwise, project, add."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(_conv(3, 4), nn.BatchNorm2d(4), nn.ReLU6())
        self.expand = nn.Sequential(_conv(4, 9, 1), nn.BatchNorm2d(9), nn.ReLU6())
        self.depthwise = nn.Sequential(_conv(9, 9, groups=9), nn.BatchNorm2d(9), nn.ReLU6())
        self.project = nn.Sequential(_conv(9, 4, 1), nn.BatchNorm2d(4))
        self.last = nn.Sequential(_conv(4, 8, 1), nn.BatchNorm2d(8), nn.Hardswish())
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.last(x + self.project(self.depthwise(self.expand(x)))))


class Grouped(nn.Module):
    """A grouped convolution between dense ones."""

    def __init__(self) -> None:
        super().__init__()
        self.reduce, self.grouped, self.expand = _conv(3, 8), _conv(8, 12, groups=4, bias=True), _conv(12, 5, 1)
        self.bn = nn.BatchNorm2d(12)
        self.head = Head(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.expand(F.relu(self.bn(self.grouped(F.relu(self.reduce(x))))))))


def flattening() -> nn.Module:
    """A convolution whose positions all become inputs of a Linear."""
    return nn.Sequential(_conv(3, 4, bias=True), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 6), nn.ReLU(),
                         nn.Linear(6, 4))


class Chunked(nn.Module):
    """Two halves of a convolution's channels go different ways; no channel of it can be told to go alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.left, self.right = _conv(3, 8, bias=True), _conv(4, 3), _conv(4, 5)
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        a, b = F.relu(self.conv(x)).chunk(2, 1)
        return self.head(F.relu(torch.cat([self.left(a), self.right(b)], 1)))


class GatedUnit(nn.Module):
    """One half of the channels opens and shuts the other."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = _conv(3, 8, bias=True), _conv(4, 5)
        self.head = Head(5)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.conv(x).chunk(2, 1)
        return self.head(F.relu(self.last(a * torch.sigmoid(b))))


class SqueezeExcite(nn.Module):
    """Channels scaled by what their averages say."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = _conv(3, 6), nn.BatchNorm2d(6)
        self.squeeze, self.excite = _conv(6, 2, 1, bias=True), _conv(2, 6, 1, bias=True)
        self.last = _conv(6, 5)
        self.head = Head(5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.bn(self.conv(x)))
        scale = torch.sigmoid(self.excite(F.silu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))))
        return self.head(F.gelu(self.last(scale * x)))


class UNet(nn.Module):
    """Down, up by a transposed convolution, a skip connection; the output is an image."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.down = _conv(3, 4, bias=True), _conv(4, 6, bias=True)
        self.up = nn.ConvTranspose2d(6, 5, 2, 2)
        self.merge, self.out = _conv(9, 3, bias=True), _conv(3, 2, 1, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.enter(x))
        low = F.relu(self.down(F.max_pool2d(x, 2)))
        return self.out(F.relu(self.merge(torch.cat([F.relu(self.up(low)), x], 1))))


def mlp() -> nn.Module:
    """Linear layers and nothing else but a BatchNorm."""
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3))


class Tokens(nn.Module):
    """Linear layers on [N, L, C] with a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc1, self.fc2, self.head = nn.Linear(6, 7), nn.Linear(7, 9), nn.Linear(9, 7), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head((x + self.fc2(F.gelu(self.fc1(x)))).mean(1))


class Shared(nn.Module):
    """One convolution called on two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.shared = _conv(3, 5, bias=True), _conv(3, 5, bias=True), _conv(5, 6, bias=True)
        self.head = Head(6)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.shared(F.relu(self.left(x))), self.shared(torch.tanh(self.right(x)))
        return self.head(F.relu(a) + F.relu(b))


class ZeroPadded(nn.Module):
    """Residual blocks whose shortcuts take every second position and pad zeros beside the channels (option A of He et
    al. 2016): where zeros come in, channels stay; the others go together in all widths."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = _conv(3, 4, bias=True), _conv(4, 8, stride=2)
        self.bn, self.inner, self.last = nn.BatchNorm2d(8), _conv(8, 6), _conv(6, 8)
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.bn(self.down(x)) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)))
        return self.head(F.relu(self.last(F.relu(self.inner(x))) + x))


class Upsampling(nn.Module):
    """A mask for all channels, learned numbers, an input beside channels, GLU, sub-pixel convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.mask, self.b = _conv(3, 6, bias=True), _conv(6, 1, bias=True), _conv(9, 8, bias=True)
        self.up, self.last = _conv(4, 8, bias=True), _conv(2, 5, bias=True)
        self.weights, self.head = nn.Parameter(torch.tensor([0.7, 1.2])), Head(5)

    def forward(self, x: Tensor) -> Tensor:
        a = F.silu(self.a(x)) * F.softplus(self.weights)[0]
        a = a * torch.sigmoid(self.mask(a)) * self.weights[1]
        y = F.pixel_shuffle(self.up(F.glu(self.b(torch.cat([x, a], 1)), 1)), 2)
        return self.head(F.relu(self.last(y)))


class Recurrent(nn.Module):
    """One convolution called on its own output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.step = _conv(3, 5, bias=True), _conv(5, 5, bias=True)
        self.head = Head(5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.step(x))
        x = F.relu(self.step(x))
        return self.head(x)


class Signal(nn.Module):
    """One dimension, a channelwise PReLU, one PReLU for all, an InstanceNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1, self.act1 = nn.Conv1d(2, 6, 3), nn.InstanceNorm1d(6, affine=True), nn.PReLU(6)
        self.conv2, self.act2 = nn.Conv1d(6, 5, 3), nn.PReLU()
        self.fc = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.norm1(self.conv1(x)))
        return self.fc(self.act2(self.conv2(x)).mean(2))
