"""EDSR, which no library of the page has: a long shortcut around residual blocks without norms, then pixel shuffles."""

from torch import Tensor, nn


class EDSR(nn.Module):
    """[N, 3, H, W] -> [N, 3, 2H, 2W].

    Source: Lim et al., Enhanced Deep Residual Networks for Single Image Super-Resolution, arXiv 1707.02921.
    """

    def __init__(self, width: int = 16, blocks: int = 4) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, width, 3, padding=1)
        self.body = nn.Sequential(*(ResidualBlock(width) for _ in range(blocks)), nn.Conv2d(width, width, 3, padding=1))
        self.tail = nn.Sequential(nn.Conv2d(width, 4 * width, 3, padding=1), nn.PixelShuffle(2),
                                  nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x)
        made: Tensor = self.tail(x + self.body(x))
        return made


class ResidualBlock(nn.Module):
    """Two convolutions, scaled and added."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
                                    nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * self.layers(x)
