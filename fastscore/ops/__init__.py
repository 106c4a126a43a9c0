"""The kernels' Python face: one function per op, on every device that has a kernel.

The ops are `torch.ops.fastscore.*`: `torch.compile` and `torch.export` see each as one node. They are not
differentiable: results never require grad, whatever the arguments do, so calling them records no graph. Under
torch.func and in forward mode, where PyTorch would take that for a derivative of 0, they raise RuntimeError.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fastscore.ops import checks, library
from fastscore.ops.backends import use_backend

__all__ = ["channel_dot", "channel_powers", "channel_sums", "clamp_backward", "normalize_gradient", "random_gradient",
           "use_backend"]

_channel_sums = torch.ops.fastscore.channel_sums.default
_channel_dot = torch.ops.fastscore.channel_dot.default
_channel_powers = torch.ops.fastscore.channel_powers.default
_clamp_backward_ = torch.ops.fastscore.clamp_backward_.default
_random_gradient = torch.ops.fastscore.random_gradient.default
_normalize_gradient = torch.ops.fastscore.normalize_gradient.default


def _of_pair(op: Callable[..., Tensor], a: Tensor, g: Tensor, channel_dim: int, *mean: bool) -> Tensor:
    """Runs an op on an activation and its gradient. Every kernel checks what it is given; only once one has refused is
    the caller told why at length, as looking beforehand takes a tenth of a small call."""
    if not library.plain_call():
        checks.check_pair(a, g, channel_dim)
        return op(a, g, channel_dim, *mean)
    try:
        with library.past_autograd():
            return op(a, g, channel_dim, *mean)
    except RuntimeError as error:
        refused = error
    checks.check_pair(a, g, channel_dim)
    raise refused


def channel_sums(a: Tensor, g: Tensor, channel_dim: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """(Σ a·g, Σ a, Σ g) over every position of a channel, in one pass over the two tensors.

    The first sum is the change of the output, to first order, when the channel's activation becomes zero
    (arXiv 2310.20203, the Taylor criterion per sample); with the others it can be taken to any other constant.

    Args:
        a: activation [N, ..., C, ...], float32, bfloat16, float16 or float64, with any strides.
        g: the gradient of `a`: same shape, dtype and device, with strides of its own.
        channel_dim: where C is; never 0, which counts the samples.

    Returns:
        Three tensors [N, C], float64 for float64 and float32 for the rest.

    Raises:
        ValueError: shapes or devices differ, fewer than 2 dimensions, or `channel_dim` out of range.
        TypeError: dtypes differ or are not floating.
    """
    dot, total, gradient = _of_pair(_channel_sums, a, g, channel_dim).unbind()
    return dot, total, gradient


def channel_moments(a: Tensor, g: Tensor, channel_dim: int = 1) -> Tensor:
    """`channel_sums` as one tensor, with the mean of `a` in place of its sum.

    Args:
        a, g: activation and gradient [N, ..., C, ...], as `channel_sums` takes them.
        channel_dim: where C is; never 0, which counts the samples.

    Returns:
        [3, N, C], float64 for float64 and float32 for the rest.

    Raises:
        ValueError, TypeError: as `channel_sums` does.
    """
    return _of_pair(_channel_sums, a, g, channel_dim, True)


def channel_dot(a: Tensor, g: Tensor, channel_dim: int = 1) -> Tensor:
    """Σ a·g over every position of a channel: the first of `channel_sums`.

    Args:
        a, g: activation and gradient [N, ..., C, ...], as `channel_sums` takes them.
        channel_dim: where C is; never 0, which counts the samples.

    Returns:
        [N, C], float64 for float64 and float32 for the rest.

    Raises:
        ValueError, TypeError: as `channel_sums` does.
    """
    return _of_pair(_channel_dot, a, g, channel_dim)


def channel_powers(a: Tensor, g: Tensor, channel_dim: int = 1) -> tuple[Tensor, Tensor]:
    """(Σ |a·g|, Σ (a·g)²) over every position of a channel: the elementwise criteria.

    Squares of float32 and bfloat16 products overflow beyond 1e19.

    Args:
        a, g: activation and gradient [N, ..., C, ...], as `channel_sums` takes them.
        channel_dim: where C is; never 0, which counts the samples.

    Returns:
        Two tensors [N, C], float64 for float64 and float32 for the rest.

    Raises:
        ValueError, TypeError: as `channel_sums` does.
    """
    absolute, squares = _of_pair(_channel_powers, a, g, channel_dim).unbind()
    return absolute, squares


def clamp_backward(y: Tensor, g: Tensor, rest: Tensor | None, low: float, high: float, overwrite: bool = False
                   ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The backward of a clamp (ReLU, ReLU6, Hardtanh) and the channel sums of its result, in one pass over them.

    Args:
        y: what the clamp made, [N, C, ...], float32, bfloat16, float16 or float64.
        g: the gradient that came from one of its readers: same shape, dtype and device.
        rest: the sum of those from its other readers, or None.
        low, high: the clamp's ends, which are rounded to the dtype as the clamp did; (0, inf) for a ReLU.
        overwrite: whether the result may take the memory of `g`; it does not where `y` or `rest` lie there, too,
            or autograd holds it.

    Returns:
        The gradient of the clamp's input, g + rest where low < y < high and 0 elsewhere, with the strides of `y`; and
        (Σ y·g, Σ y, Σ g) over every position of a channel, as `channel_sums` has them. What is neither contiguous nor
        channels last, or has other strides than `y`, is copied first.

    Raises:
        ValueError: shapes or devices differ, or fewer than 2 dimensions.
        TypeError: dtypes differ or are not floating.
    """
    gradient, sums = clamp_backward_sums(y, g, rest, low, high, overwrite)
    dot, total, of_gradient = sums.unbind()
    return gradient, dot, total, of_gradient


def clamp_backward_sums(y: Tensor, g: Tensor, rest: Tensor | None, low: float, high: float, overwrite: bool = False,
                        mean: bool = False) -> tuple[Tensor, Tensor]:
    """`clamp_backward` with its sums as one tensor.

    Args:
        y, g, rest, low, high, overwrite: as `clamp_backward` takes them.
        mean: the mean of y over positions in place of its sum.

    Returns:
        The gradient of the clamp's input, and the sums [3, N, C].

    Raises:
        ValueError, TypeError: as `clamp_backward` does.
    """
    checks.check_clamp(y, g, rest)
    if not (y.is_contiguous() or (y.dim() == 4 and y.is_contiguous(memory_format=torch.channels_last))):
        y = y.contiguous()
    recorded = g.requires_grad and torch.is_grad_enabled()
    if not overwrite or recorded or g.stride() != y.stride() or any(x is g or checks.overlap(x, g) for x in (y, rest)
                                                                    if x is not None):
        g = torch.empty_like(y).copy_(g)
    if rest is not None and rest.stride() != y.stride():
        rest = torch.empty_like(y).copy_(rest)
    sums: Tensor = _clamp_backward_(y, g, rest, low, high, mean)
    return g.detach() if g.requires_grad else g, sums


def random_gradient(sample_ids: Tensor, classes: int, seed: int, probe: int = 0, distribution: str = "normal",
                    normalize: bool = True, dtype: torch.dtype | None = None) -> Tensor:
    """A random output gradient per sample, a pure function of (seed, sample id, probe, class).

    Sent backward in place of a loss gradient, it ranks channels without labels (arXiv 2310.20203). The bits are
    Philox4x32-10, so a value depends on no batch size, device or earlier call.

    Args:
        sample_ids: int64 [N], on the device where the gradient is wanted.
        classes: K, the width of the network's output.
        seed: any int64.
        probe: which of a sample's independent gradients, 0 to 2**32 - 1.
        distribution: "normal", or "rademacher" for signs.
        normalize: whether each sample's gradient is scaled to length 1.
        dtype: what float32 values are rounded to, if to anything.

    Returns:
        [N, K], float32 or `dtype`.

    Raises:
        TypeError: `sample_ids` is not int64 [N], or `dtype` not floating.
        ValueError: `classes`, `seed` or `probe` out of range, or an unknown `distribution`.
    """
    checks.check_random(sample_ids, classes, seed, probe, distribution, dtype)
    result: Tensor = library.run(_random_gradient, sample_ids, classes, seed, probe, distribution, normalize, dtype)
    return result


def normalize_gradient(g: Tensor, eps: float = 0.0) -> tuple[Tensor, Tensor]:
    """(g / max(‖g‖, eps), ‖g‖) per sample, with ‖·‖ the L2 norm over all of a sample; length 0 stays 0.

    Squares are summed in float64, so neither tiny nor huge gradients lose their length (but for float64 ones below
    1e-162, whose length is 0, and beyond 1e154, whose length is infinite). A sample that holds NaN becomes NaN.

    Args:
        g: [N, ...], float32, bfloat16, float16 or float64, with any strides.
        eps: the least length that is divided by.

    Returns:
        The scaled gradient, like `g` in shape and dtype, and the lengths [N], float64 for float64 and float32 for
        the rest.

    Raises:
        TypeError: `g` is not floating.
        ValueError: `g` has no dimension, or `eps` is negative.
    """
    checks.check_gradient(g, eps)
    result: tuple[Tensor, Tensor] = library.run(_normalize_gradient, g, eps)
    return result
