"""What normalisations over channels compute, of as many channels as there are."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastscore.batches.devices import wide


@dataclass(frozen=True)
class ChannelNorm:
    """What a module computes of x: (x - mean) / sqrt(mean of squares + eps) * factor * (gain + offset) + shift, over
    one dimension.

    Attributes:
        dim: that of the channels, from the end: -1, -2, -3 in images, or -4 in videos; or 1, however many there are.
        centered: whether the mean is taken off first (LayerNorm), or not (RMSNorm).
        offset: 1 where gains are kept as differences from 1, as in Gemma.
        eps: None: the rounding of the input's dtype, as in nn.RMSNorm.
        place: where eps counts: "inside" the root, "added" to it, or as the "least" that is divided by.
        fewer: by how much less than the width squares are divided: 1 in torch.std(); None where they are summed.
        gain, shift: the parameters that they are, by their names, if there are.
        factor: a number of the code's own.
        spread: whether squares are of how far x is from its mean, which it keeps unless it is centered (SimpleNorm).
    """

    dim: int
    centered: bool
    offset: float
    eps: float | None
    place: Literal["inside", "added", "least"] = "inside"
    fewer: int | None = 0
    gain: str = "weight"
    shift: str = "bias"
    factor: float = 1.0
    spread: bool = False

    @property
    def _has_mean(self) -> bool:
        return self.centered or self.spread

    @property
    def ignores_width(self) -> bool:
        """Whether it computes of some channels alone what it does of these beside zeros."""
        return not self._has_mean and self.fewer is None

    def _divisor(self, dense_width: int) -> int:
        return 1 if self.fewer is None else dense_width - self.fewer

    def statistics(self, x: Tensor, dense_width: int) -> tuple[Tensor, Tensor]:
        """(x less the mean where it is taken off, what that is multiplied by), of x in float32 or wider."""
        away, squares = self._squares(x, dense_width)
        return away if self.centered else x, self._scale(squares)

    def _squares(self, x: Tensor, dense_width: int) -> tuple[Tensor, Tensor]:
        """(what is squared, the mean of its squares)."""
        divisor = self._divisor(dense_width)
        if not self._has_mean:
            return x, x.square().sum(self.dim, keepdim=True) / divisor
        mean = x.sum(self.dim, keepdim=True) / dense_width
        x = x - mean
        zeros = (dense_width - x.shape[self.dim]) * mean.square()  # what channels that are gone are away from the mean
        return x, (x.square().sum(self.dim, keepdim=True) + zeros) / divisor

    def _scale(self, squares: Tensor) -> Tensor:
        eps = torch.finfo(squares.dtype).eps if self.eps is None else self.eps
        if self.place == "inside":
            return (squares + eps).rsqrt()
        root = squares.sqrt()
        return 1 / (root + eps if self.place == "added" else root.clamp_min(eps))

    def _steepness(self, squares: Tensor, scale: Tensor) -> Tensor:
        """-2 times the derivative of the scale by the mean of squares, over the scale's square."""
        if self.place == "inside":
            return scale
        root = squares.sqrt()
        moves = root > (self.eps or 0.0) if self.place == "least" else root > 0
        return torch.where(moves, 1 / root, 0.0)

    def along_channels(self, values: Tensor) -> Tensor:
        """[C], or one number, in a shape that broadcasts over the input."""
        return values.reshape(()) if values.numel() == 1 else values.view(-1, *[1] * (-1 - self.dim))

    def __call__(self, x: Tensor, gain: Tensor | None, shift: Tensor | None, dense_width: int) -> Tensor:
        """What the module computes; x may have fewer channels than `dense_width`."""
        centered, scale = self.statistics(wide(x), dense_width)
        y = centered * (scale * self.factor if self.factor != 1 else scale)
        if gain is not None:
            y = y * self.along_channels(gain + self.offset if self.offset else gain)
        if shift is not None:
            y = y + self.along_channels(shift)
        return y.to(x.dtype)

    def gradient_of_statistics(self, x: Tensor, g: Tensor, gain: Tensor | None, dense_width: int) -> Tensor:
        """The gradient of x through mean and mean square alone, from that of the output: of x's shape and dtype."""
        away, squares = self._squares(wide(x), dense_width)
        scale = self._scale(squares)
        g = wide(g) * self.factor if self.factor != 1 else wide(g)
        if gain is not None:
            g = g * self.along_channels(gain + self.offset if self.offset else gain)
        by_scale = (g * (away if self.centered else wide(x))).sum(self.dim, keepdim=True) * scale.square()
        through = away * by_scale * self._steepness(squares, scale) / -self._divisor(dense_width)
        if self.centered:
            through = through - g.sum(self.dim, keepdim=True) * (scale / dense_width)
        return through.to(x.dtype)


@dataclass(frozen=True)
class ResponseNorm:
    """What a global response normalisation (ConvNeXt V2's) computes of images: x + shift + gain * x * norm of x /
    (mean of norms + eps), with every channel's norm over an image.

    Attributes:
        dim: that of the channels, from the end: -1, or -3.
        eps: added to the mean.
        gain, shift: the parameters that they are, by their names, if there are.
    """

    dim: int
    eps: float
    gain: str = "weight"
    shift: str = "bias"

    @property
    def _image(self) -> tuple[int, int]:
        return (-3, -2) if self.dim == -1 else (-2, -1)

    def _along_channels(self, values: Tensor) -> Tensor:
        return values.flatten().view(-1, *[1] * (-1 - self.dim))

    def _norms(self, x: Tensor, dense_width: int) -> tuple[Tensor, Tensor]:
        """(norm of each channel, mean of all + eps), of x in float32 or wider."""
        norms = torch.linalg.vector_norm(x, dim=self._image, keepdim=True)
        return norms, norms.sum(self.dim, keepdim=True) / dense_width + self.eps

    def __call__(self, x: Tensor, gain: Tensor | None, shift: Tensor | None, dense_width: int) -> Tensor:
        """What the module computes; x may have fewer channels than `dense_width`."""
        large = wide(x)
        norms, mean = self._norms(large, dense_width)
        y = large * (norms / mean)
        if gain is not None:
            y = y * self._along_channels(gain)
        y = large + y
        if shift is not None:
            y = y + self._along_channels(shift)
        return y.to(x.dtype)

    def gradient_of_statistics(self, x: Tensor, g: Tensor, gain: Tensor | None, dense_width: int) -> Tensor:
        """The gradient of x through the mean of norms alone, from that of the output: of x's shape and dtype."""
        large, g = wide(x), wide(g)
        norms, mean = self._norms(large, dense_width)
        product = g * large * norms
        if gain is not None:
            product = product * self._along_channels(gain)
        of_mean = -product.sum((*self._image, self.dim), keepdim=True) / mean.square()
        return (of_mean / dense_width * torch.where(norms > 0, large / norms, 0.0)).to(x.dtype)
