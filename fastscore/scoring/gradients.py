"""Where the output gradient comes from: a loss, or a random draw that needs no label.

Random gradients: arXiv 2310.20203, section 3: N(0, I) over the outputs, drawn anew for each sample, scaled to length 1.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from fastscore import ops
from fastscore.arguments import in_users_code
from fastscore.batches.devices import wide, with_float64
from fastscore.ops.checks import FLOATING
from fastscore.wording import counted

Loss: TypeAlias = Callable[[Tensor, Any], Tensor]

_SAME_VALUES = {f"{name}Backward0" for name in ("View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze", "Clone",
                                                "ToCopy", "Alias", "Permute", "Transpose")} | {"SqueezeBackward1"}
DISTRIBUTIONS = ("normal", "rademacher", "orthogonal", "basis")


def random_gradient(output: Tensor, ids: Tensor, seed: int, probe: int, distribution: str, normalize: bool,
                    center: bool = False) -> Tensor:
    """A random gradient for `output` [N, ...], of its shape, dtype and device; all that follows N counts as classes.

    A pure function of seed, sample id (ids: int64 [N]), probe and class.

    distribution: "normal"; "rademacher" (signs); "orthogonal", normal, made orthogonal to the earlier probes of the
    same sample, in sets of as many probes as there are directions (K classes, or K - 1 when centred); or "basis",
    where probe k is the unit vector of class k. Over a whole set, or the basis, the mean of (v·u)² is exact.
    normalize: of length 1; otherwise of the length that a normal draw has (√K for the basis, whose mean of (v·u)² is
    then the expectation over normal draws). center: without its part along (1, ..., 1), which a softmax does not see;
    what is left of a basis keeps its length, the rest is scaled afterwards. Signs that are all alike, one draw in
    2**(K - 1), leave zero.

    Raises ValueError for an unknown distribution, for rows that differ in number from `ids`, for an output without a
    direction, and for a probe that the basis does not have.
    """
    classes = classes_of(output)
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution: {distribution!r} is none of {', '.join(DISTRIBUTIONS)}")
    if len(ids) != len(output):
        raise ValueError(f"output: it has {counted(len(output), 'row')} for {counted(len(ids), 'sample')}; pass a "
                         "forward that returns one for each sample, and put the tensor that has a row for each before "
                         "others of the batch")
    if classes == 0:
        raise ValueError(f"output: {list(output.shape)} holds no value for a gradient to start from")
    if center and classes == 1:
        raise ValueError("center: the output has a single value for each sample, of which nothing is left without its "
                         "mean; use center=False")
    if distribution == "basis" and not 0 <= probe < classes:
        raise ValueError(f"probe: {probe}, but a basis of {counted(classes, 'output')} has directions 0 to "
                         f"{classes - 1} alone")
    ids = ids.to(output.device)
    if distribution == "basis":
        gradient = with_float64(output.new_zeros(len(ids), classes)).double()
        gradient[:, probe] = 1 if normalize else math.sqrt(classes)
        gradient = _centred(gradient) if center else gradient
    elif distribution == "orthogonal":
        first = probe - probe % (classes - center)
        draws = [ops.random_gradient(ids, classes, seed, each, "normal", False) for each in range(first, probe + 1)]
        gradient = _last_direction(with_float64(torch.stack(draws, 2)).double(), normalize, center)
    else:
        direct = not center and output.dtype in FLOATING
        gradient = ops.random_gradient(ids, classes, seed, probe, distribution, normalize and not center,
                                       output.dtype if direct else None)
        if center:
            gradient = _centred(with_float64(gradient).double())
            gradient = ops.normalize_gradient(gradient)[0] if normalize else gradient
    return gradient.reshape(output.shape).to(output)


def _centred(gradient: Tensor) -> Tensor:
    """[N, K] without its mean over the classes."""
    return gradient - gradient.mean(1, keepdim=True)


def _last_direction(draws: Tensor, normalize: bool, center: bool) -> Tensor:
    """The last of `draws`, float64 [N, K, J], made orthogonal to those before it by Gram and Schmidt, [N, K].

    normalize: of length 1; otherwise as long as the draw was. center: orthogonal to (1, ..., 1) too, off which the
    draw's length is then taken.
    """
    columns = torch.cat([torch.ones_like(draws[:, :, :1]), draws], 2) if center else draws
    q: Tensor
    r: Tensor
    q, r = torch.linalg.qr(columns)
    # Householder's reflections leave the sign to the first entries of the draw; Gram and Schmidt keep the draw's own.
    direction = torch.where(r[:, -1, -1:] < 0, -q[:, :, -1], q[:, :, -1])
    return direction if normalize else direction * r[:, int(center):, -1].norm(dim=1, keepdim=True)


def classes_of(output: Tensor) -> int:
    """Values of `output` [N, ...] for each sample."""
    return math.prod(output.shape[1:])


_CALLED = "loss: called as loss(output, batch), with an output {} and the batch as it is, a {}; of an (input, label) " \
    "batch the labels are batch[1]: loss=lambda output, batch: F.cross_entropy(output, batch[1])"


def loss_and_gradient(output: Tensor, batch: Any, loss: Loss | None, normalize: bool) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient at `output` [N, ...], scaled to length 1 for each sample when `normalize`.

    Raises ValueError for a loss that is no scalar, or that does not depend on the output; and for none, of what a
    sigmoid made last.
    """
    if loss is None and _made_by(output) == "SigmoidBackward0":
        raise ValueError("loss: the model ends in a sigmoid, so that each output is a probability by itself, of which "
                         "cross entropy is no loss: give loss=lambda output, batch: F.binary_cross_entropy(output, "
                         "batch[1]), or what it is trained with")
    leaf = output.detach().requires_grad_()
    with torch.enable_grad(), nullcontext() if loss is None else in_users_code(_CALLED.format(
            list(output.shape), type(batch).__name__)):
        value = (loss or cross_entropy)(leaf, batch)
    if not isinstance(value, Tensor) or value.dim() != 0 or not value.requires_grad:
        shown = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError("loss: it must return a scalar tensor computed from the output, without detach(); it returned "
                         f"{shown}")
    (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), ops.normalize_gradient(gradient)[0] if normalize else gradient


def cross_entropy(output: Tensor, batch: Any) -> Tensor:
    """The loss that stands in when none is given: cross entropy with the labels of an (input, label) batch, of logits;
    or of probabilities, where no output is negative and each row sums to 1."""
    labels = batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else \
        batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor):
        raise ValueError('batches: gradient="loss" needs labels: give (input, label) batches, or loss=, or use '
                         'gradient="random", which needs none')
    try:
        return F.cross_entropy(_logits(output), labels)
    except (RuntimeError, ValueError, IndexError) as error:
        raise ValueError(f"batches: cross entropy does not take their labels, {labels.dtype} {list(labels.shape)} "
                         f"beside an output {list(output.shape)} ({error}): give the numbers of classes from 0 on, "
                         "int64, one for each of its decisions, or loss=lambda output, batch: what it is trained "
                         "with") from error


def _logits(output: Tensor) -> Tensor:
    """An output, or the logarithms of it, where it is probabilities, which is not waited for."""
    if output.dim() < 2 or output.shape[1] < 2 or not output.is_floating_point():
        return output
    x, rounding = wide(output), torch.finfo(output.dtype).eps ** 0.5
    sums = x.detach().sum(1)
    are_probabilities = (x.detach() >= 0).all() & ((sums - 1).abs() <= rounding).all()
    return torch.where(are_probabilities, x.clamp_min(torch.finfo(x.dtype).tiny).log(), x)


def _made_by(output: Tensor) -> str:
    """The name of the autograd node that made the values of an output."""
    node = output.grad_fn
    while node is not None and node.name() in _SAME_VALUES:
        node = node.next_functions[0][0]
    return "" if node is None else node.name()
