"""Convolutions and Linear layers whose frozen weights are prepacked once, for both directions, as oneDNN wants them.

PyTorch's layers have oneDNN reorder the weight in every pass, and compute a Linear with the BLAS at hand. Here both
directions are oneDNN's forward kernels, which can clamp their result. The operations are those that torch.compile
uses on a CPU; they know nothing of autograd (see fastscore.fastpath.fused_taps).
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastscore.ops.backends import portable

ClampBounds: TypeAlias = tuple[float, float]  # low, high: of a clamp
RELU: ClampBounds = (0.0, math.inf)
DTYPES = (torch.float32, torch.bfloat16)
ADDING_DTYPES = (torch.bfloat16,)  # in float32 oneDNN reads what it adds so slowly that it gains nothing
_SAMPLES = 16  # batch size that weights are prepacked for: a single sample wants another layout, more do not

_ops = torch.ops.mkldnn


class Layer(Protocol):
    """A layer's forward pass, and the gradient's pass back through it."""

    def forward(self, x: Tensor) -> Tensor:
        """What the layer makes of `x`, clamped if it was made so."""

    def backward(self, g: Tensor, shape: torch.Size) -> Tensor:
        """The gradient of an input of `shape`, from that of the output before it is clamped."""

    def channels(self, x: Tensor) -> int:
        """How many channels, in dimension 1, the output for `x` has; or as many as there are."""


def available(weight: Tensor) -> bool:
    """Whether a layer with that weight can be packed."""
    return (weight.device.type == "cpu" and weight.dtype in DTYPES and torch.backends.mkldnn.is_available()
            and bool(torch.backends.mkldnn.enabled) and not portable())


def _epilogue(clamp: ClampBounds | None) -> tuple[str, list[float], str]:
    if clamp is None:
        return "none", [], ""
    return ("relu", [], "") if clamp == RELU else ("hardtanh", list(clamp), "")


def _loses_nan(x: Tensor, epilogue: tuple[str, list[float], str]) -> bool:
    """Whether oneDNN's clamp may make a number of NaN, which PyTorch's keeps. A sum that overflows costs time alone."""
    return epilogue[0] != "none" and not math.isfinite(x.sum())


def _clamped(y: Tensor, epilogue: tuple[str, list[float], str]) -> Tensor:
    kind, bounds, _ = epilogue
    return F.relu(y) if kind == "relu" else F.hardtanh(y, bounds[0], bounds[1])


class _PrepackedWeight:
    """A convolution's weight, prepacked for inputs of one height and width, on which the best layout depends.

    It is prepacked anew when inputs of another size come, unless `final`.
    """

    def __init__(self, weight: Tensor, prepack: Callable[[Tensor, list[int]], Tensor], width: int,
                 size: Sequence[int], final: bool = False) -> None:
        self._prepack, self._width, self._final = prepack, width, final
        self._fit(weight, size)

    def __call__(self, x: Tensor) -> Tensor:
        """The weight as `x`, [N, C, H, W], asks for it."""
        if x.shape[2:] != self._size and not self._final:
            self._fit(self._weight.to_dense(), x.shape[2:])
        return self._weight

    def _fit(self, weight: Tensor, size: Sequence[int]) -> None:
        self._size = torch.Size(size)
        self._weight = self._prepack(weight.contiguous(memory_format=torch.channels_last),
                                     [_SAMPLES, self._width, *size])


class Convolution:
    """A Conv2d with zeros for padding, on [N, C, H, W].

    Backward is a forward convolution with the flipped weight. With a stride and a 1x1 kernel, zeros are then put
    between the positions of its result. Any other strided convolution has a transposed one for backward; but for a
    depthwise one in bfloat16 oneDNN has no fast transposed kernel, so zeros are put between those of the gradient.

    keeps_nan: where NaN comes in, it goes out, also through a clamp.
    """

    def __init__(self, layer: nn.Conv2d, size: Sequence[int], clamp: ClampBounds | None = None,
                 keeps_nan: bool = True) -> None:
        self.keeps_nan = keeps_nan
        self.bias, self.epilogue, self.width = layer.bias, _epilogue(clamp), layer.out_channels
        self.dtype = layer.weight.dtype
        self.stride, self.dilation, self.groups = list(layer.stride), list(layer.dilation), layer.groups
        self.padding = [int(pad) for pad in layer.padding]
        self.kernel_extent = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        self.backward_padding = [r - p for r, p in zip(self.kernel_extent, self.padding, strict=True)]
        single = layer.kernel_size == (1, 1) and self.padding == [0, 0]
        strided = self.stride != [1, 1]
        self.spread_first = strided and not single
        weight = layer.weight.detach()
        slow = layer.groups == layer.in_channels and weight.dtype == torch.bfloat16
        self.transposed = min(self.backward_padding) < 0 or (self.spread_first and not slow)
        back = weight if self.transposed else flipped(weight, self.groups)
        backward_size = self._unstrided(size) if self.spread_first and not self.transposed else \
            [(each - 1) // s + 1 for each, s in zip(self._unstrided(size), self.stride, strict=True)]
        self.weight = _PrepackedWeight(weight, self._prepack_forward, layer.in_channels, size)
        self.backward_weight = _PrepackedWeight(back, self._prepack_backward, layer.out_channels, backward_size,
                                                self.transposed)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C_in, H, W] -> [N, C_out, H', W']."""
        apart = self.keeps_nan and _loses_nan(x, self.epilogue)
        y: Tensor = _ops._convolution_pointwise(x, self.weight(x), self.bias, self.padding, self.stride, self.dilation,
                                                self.groups, *_epilogue(None) if apart else self.epilogue)
        return _clamped(y, self.epilogue) if apart else y

    def takes(self, x: Tensor, other: Tensor) -> bool:
        """Whether `add_relu` does what an addition and a ReLU do."""
        shape = (len(x), self.width, *((each - 1) // s + 1 for each, s in
                                       zip(self._unstrided(x.shape[2:]), self.stride, strict=True)))
        return (other.shape == shape and other.dtype == x.dtype and other.layout == x.layout
                and other.device == x.device and other.is_contiguous(memory_format=torch.channels_last))

    def add_relu(self, x: Tensor, other: Tensor) -> Tensor:
        """relu(forward(x) + other), where it `takes` that and is not clamped itself."""
        y: Tensor = _ops._convolution_pointwise.binary(x, other, self.weight(x), self.bias, self.padding, self.stride,
                                                       self.dilation, self.groups, "add", 1.0, "relu", [], None)
        return y

    def rectified(self) -> "Convolution":
        """The same, with a ReLU behind it; it is not clamped itself, and shares its weights."""
        other = copy.copy(self)
        other.epilogue = _epilogue(RELU)
        return other

    def backward(self, g: Tensor, shape: torch.Size) -> Tensor:
        """[N, C_out, H', W'] -> `shape`, [N, C_in, H, W]."""
        if self.transposed:
            left = [(each - 1) % s for each, s in zip(self._unstrided(shape[2:]), self.stride, strict=True)]
            x: Tensor = _ops._convolution_transpose_pointwise(g, self.backward_weight(g), None, self.padding, left,
                                                              self.stride, self.dilation, self.groups, *_epilogue(None))
            return x
        if self.spread_first:
            g = self._spread(g, self._unstrided(shape[2:]))
        x = _ops._convolution_pointwise(g, self.backward_weight(g), None, self.backward_padding, [1, 1], self.dilation,
                                        self.groups, *_epilogue(None))
        return x if x.shape == shape else self._spread(x, shape[2:])

    def channels(self, x: Tensor) -> int:
        """C_out."""
        return self.width

    def _unstrided(self, size: Sequence[int]) -> list[int]:
        """Height and width of the output if the stride were 1."""
        return [each + 2 * p - r for each, p, r in zip(size, self.padding, self.kernel_extent, strict=True)]

    def _prepack_forward(self, weight: Tensor, shape: list[int]) -> Tensor:
        prepacked: Tensor = _ops._reorder_convolution_weight(weight, self.padding, self.stride, self.dilation,
                                                            self.groups, shape)
        return prepacked

    def _prepack_backward(self, weight: Tensor, shape: list[int]) -> Tensor:
        prepacked: Tensor = _ops._reorder_convolution_transpose_weight(
            weight, self.padding, [0, 0], self.stride, self.dilation, self.groups, shape) if self.transposed else \
            _ops._reorder_convolution_weight(weight, self.backward_padding, [1, 1], self.dilation, self.groups, shape)
        return prepacked

    def _spread(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """`x` at every stride-th position of a tensor of that height and width, and zeros between."""
        wide = torch.empty((*x.shape[:2], *size), dtype=x.dtype, memory_format=torch.channels_last).zero_()
        wide[:, :, ::self.stride[0], ::self.stride[1]] = x
        return wide


def flipped(weight: Tensor, groups: int) -> Tensor:
    """[C_out, C_in / groups, H, W] -> [C_in, C_out / groups, H, W], each kernel turned by 180 degrees."""
    if groups > 1:
        of_groups: Tensor = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
        return of_groups.flip(2, 3)
    # PyTorch transposes matrices block by block, and what has more dimensions number by number
    outputs, inputs, *kernel = weight.shape
    taps = weight.permute(0, 2, 3, 1).reshape(outputs, -1).t().contiguous().view(-1, inputs, outputs)
    if len(taps) > 1:
        turned = taps.new_empty(inputs, len(taps), outputs)
        for at, tap in enumerate(reversed(taps.unbind())):
            turned[:, at] = tap
        taps = turned
    back: Tensor = taps.view(inputs, *kernel, outputs).permute(0, 3, 1, 2)
    return back


def adds(layer: Layer) -> bool:
    """Whether `layer` is one convolution with an addition and a ReLU inside, and faster so than with both behind it."""
    return isinstance(layer, Convolution) and layer.groups == 1 and layer.dtype in ADDING_DTYPES


class Linear:
    """A Linear on [..., C]. keeps_nan: as a Convolution's."""

    def __init__(self, weight: Tensor, bias: Tensor | None, clamp: ClampBounds | None = None,
                 keeps_nan: bool = True) -> None:
        self.keeps_nan = keeps_nan
        weight = weight.detach()
        self.bias, self.epilogue, self.width = bias, _epilogue(clamp), len(weight)
        self.weight = _ops._reorder_linear_weight(weight.contiguous(), _SAMPLES)
        self.backward_weight = _ops._reorder_linear_weight(weight.t().contiguous(), _SAMPLES)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C_in] -> [..., C_out]."""
        apart = self.keeps_nan and _loses_nan(x, self.epilogue)
        y: Tensor = _ops._linear_pointwise(x.reshape(-1, x.shape[-1]), self.weight, self.bias,
                                           *_epilogue(None) if apart else self.epilogue)
        return _reshaped(_clamped(y, self.epilogue) if apart else y, [*x.shape[:-1], y.shape[-1]])

    def backward(self, g: Tensor, shape: torch.Size) -> Tensor:
        """[..., C_out] -> `shape`, [..., C_in]."""
        x: Tensor = _ops._linear_pointwise(g.reshape(-1, g.shape[-1]), self.backward_weight, None, *_epilogue(None))
        return _reshaped(x, shape)

    def channels(self, x: Tensor) -> int:
        """C_out for [N, C_in]; for more dimensions, the size of the second."""
        return self.width if x.dim() == 2 else x.shape[1]


def _reshaped(x: Tensor, shape: Sequence[int]) -> Tensor:
    """As view, but that autograd lets the result be changed in place."""
    return x if x.shape == shape else torch.ops.aten._unsafe_view(x, shape)


class BatchNorm:
    """A BatchNorm by its running statistics, on [N, C, ...]: affine for each channel."""

    def __init__(self, norm: Any, clamp: ClampBounds | None = None) -> None:
        self.affine = norm.running_mean, norm.running_var, norm.weight, norm.bias
        self.eps, self.clamp = norm.eps, None if clamp is None else Clamp(clamp, in_place=True)
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        self.scale = (scale if norm.weight is None else scale * norm.weight).to(norm.running_var.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, ...] -> the same."""
        y = F.batch_norm(x, *self.affine, eps=self.eps)
        return y if self.clamp is None else self.clamp.forward(y)

    def backward(self, g: Tensor, shape: torch.Size) -> Tensor:
        """[N, C, ...] -> the same."""
        return g.mul(self.scale.view(-1, *[1] * (g.dim() - 2)))

    def channels(self, x: Tensor) -> int:
        """C."""
        return len(self.scale)


class Clamp:
    """A clamp by itself: ReLU, ReLU6, Hardtanh. in_place: as the module it stands for."""

    def __init__(self, clamp: ClampBounds, in_place: bool) -> None:
        self.bounds, self.in_place = clamp, in_place

    def forward(self, x: Tensor) -> Tensor:
        """`x` between the bounds."""
        return F.hardtanh(x, *self.bounds, inplace=self.in_place) if self.bounds[1] < math.inf else \
            F.relu(x, inplace=self.in_place)

    def backward(self, g: Tensor, shape: torch.Size) -> Tensor:
        """`g` as it is: it has come back through the clamp already."""
        return g

    def channels(self, x: Tensor) -> int:
        """C."""
        return x.shape[1] if x.dim() > 1 else 1
