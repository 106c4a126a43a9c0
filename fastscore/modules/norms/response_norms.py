"""Global response normalisation, as in ConvNeXt V2: every channel's norm over an image, divided by the mean of all.

What stands for one in fastscore.modules.norms.channel_norms: with fewer channels the mean stays over the dense width,
as if those that are gone were zero.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastscore.batches.devices import wide


@dataclass(frozen=True)
class ResponseNorm:
    """What a module computes of images: x + shift + gain * x * norm of x / (mean of norms + eps).

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
