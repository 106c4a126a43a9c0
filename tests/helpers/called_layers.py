"""Networks of three convolutions whose code calls them, runs a function of what they hold, or runs their forward."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAMES = ["a", "b", "c"]


class Net(nn.Module):
    """Three convolutions, which are called."""

    bias = True

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=self.bias), nn.BatchNorm2d(8)
        self.b, self.slopes = nn.Conv2d(8, 6, 3, 2, 1, bias=self.bias), nn.PReLU(6)
        self.c, self.h = nn.Conv2d(6, 5, 1, bias=self.bias), nn.Linear(5, 2)

    def first(self, x: Tensor) -> Tensor:
        return self.norm(self.a(x))

    def second(self, x: Tensor) -> Tensor:
        return self.slopes(self.b(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.h(F.relu(self.c(self.second(F.relu(self.first(x))))).mean((2, 3)))


class Forwards(Net):
    """Past their call."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.slopes.forward(self.b.forward(F.relu(self.norm.forward(self.a.forward(x)))))
        return self.h.forward(F.relu(self.c.forward(x)).mean((2, 3)))


class Functions(Net):
    """Of what the layers hold."""

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        x = F.conv2d(x, self.a.weight, self.a.bias, padding=1)
        x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.training, eps=norm.eps)
        x = F.conv2d(F.relu(x), weight=self.b.weight, bias=self.b.bias, stride=(2, 2), padding=(1,))
        x = F.conv2d(F.prelu(x, self.slopes.weight), self.c.weight, self.c.bias)
        return F.linear(F.relu(x).mean((2, 3)), self.h.weight, self.h.bias)


class Views(Functions):
    """Of whole weights as views, as a convolution's that is handed on without its dimension of one."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(F.relu(self.norm(self.a(x))), self.b.weight.unsqueeze(0).squeeze(0), self.b.bias, 2, 1)
        x = F.conv2d(self.slopes(x), self.c.weight.flatten(1)[..., None, None], self.c.bias)
        return self.h(F.relu(x).mean((2, 3)))


class OneOfThem(Net):
    def second(self, x: Tensor) -> Tensor:
        return self.slopes(F.conv2d(x, self.b.weight, self.b.bias, 2, 1))


class ByForward(OneOfThem):
    def second(self, x: Tensor) -> Tensor:
        return self.slopes(self.b.forward(x))


def inputs() -> Tensor:
    return torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()
