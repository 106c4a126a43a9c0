"""Sequences: which tokens of a batch are no padding, and tokens as samples of their own.

With sample_dims=2 a sample is one token: the output [N, T, ...] has a gradient of its own at each, and activation x
gradient is summed at each token of a layer's input [N, T, C]. With independent random gradients, the mean square of
that sum is the squared length of the change of all outputs when a channel goes at that one token. Padding, where an
attention_mask tells it, has no gradient and is no sample, so that scores do not depend on how far a batch is padded.
"""

from typing import Any

import torch
from torch import Tensor

from fastscore import fingerprints, ops
from fastscore.batches.parts import MASK, first_input, mappings
from fastscore.modules.sample_axis import SampleAxes
from fastscore.scoring import gradients
from fastscore.scoring.scores import Origin
from fastscore.taps.passes import ForwardPass


def ids_of(done: ForwardPass, axes: SampleAxes, samples: int) -> Tensor:
    """int64 [N]: the ids of the samples that a pass began with, by what the model was called with, or, where that has
    no dimension of samples, by the batch; by all rows of its first tensor, and by their number, where these are of one
    sample or of samples that lie one after the other."""
    if axes.one or axes.flat:
        ids = fingerprints.sample_ids(first_input(done.inputs)[None])
        return ids + torch.arange(samples, device=ids.device)
    known = axes.input is not None or done.batch is None
    return sample_ids(done.inputs if known else done.batch, done.valid, axes.input or 0)


def sample_ids(inputs: Any, valid: Tensor | None, dim: int = 0) -> Tensor:
    """int64 [N], see fingerprints.sample_ids: of what a batch, or a call, holds but for its mask and its padding.

    dim: where the samples lie in the first tensor.
    """
    found = next((tensor for mapping in mappings(inputs) for key, tensor in mapping.items()
                  if key != MASK and isinstance(tensor, Tensor)), None) if _first_is_mask(inputs) else None
    x = first_input(inputs) if found is None else found
    x = x.movedim(dim, 0) if 0 < dim < x.dim() else x
    if valid is not None and x.shape[:2] == valid.shape:
        x = x.masked_fill(~_along(valid, x), 0)
    return fingerprints.sample_ids(x)


def of_output(valid: Tensor | None, output: Tensor) -> Tensor | None:
    """`valid` where the output has a value for each of those tokens, [N, T, ...]; else None."""
    return None if valid is None or output.shape[:2] != valid.shape else valid.to(output.device)


def rows(output: Tensor, sample_dims: int, valid: Tensor | None) -> tuple[int, Tensor | None]:
    """How many samples and paddings an output has, and which are samples: bool, or None for all.

    Raises ValueError for an output without tokens where they are to be the samples.
    """
    if sample_dims == 1:
        return len(output), None
    if output.dim() < 3:
        raise ValueError(f"sample_dims: {sample_dims}, but the output {list(output.shape)} has no dimension of tokens, "
                         "[N, T, ...]: use sample_dims=1, or a forward that returns a value for each token")
    valid = of_output(valid, output)
    return output.shape[0] * output.shape[1], None if valid is None else valid.flatten()


def random_gradient(output: Tensor, ids: Tensor, probe: int, how: Origin, valid: Tensor | None) -> Tensor:
    """gradients.random_gradient for what counts as a sample: see Origin.sample_dims. Zero at padding."""
    draw = (how.seed, probe, how.distribution)
    valid = of_output(valid, output)
    if how.sample_dims > 1:
        rows(output, how.sample_dims, valid)
        each = output.flatten(0, 1)
        gradient = gradients.random_gradient(each, fingerprints.token_ids(ids, output.shape[1]), *draw, how.normalize,
                                             how.center).reshape(output.shape)
        return gradient if valid is None else gradient * _along(valid, output)
    if valid is None:
        return gradients.random_gradient(output, ids, *draw, how.normalize, how.center)
    if how.center or how.distribution not in ("normal", "rademacher"):
        raise ValueError(f"distribution: {how.distribution!r}{' with center=True' if how.center else ''} counts the "
                         "padding of a batch among its directions; use normal or rademacher, or sample_dims=2")
    gradient = gradients.random_gradient(output, ids, *draw, False) * _along(valid, output)
    return ops.normalize_gradient(gradient)[0] if how.normalize else gradient


def loss_and_gradient(output: Tensor, batch: Any, loss: gradients.Loss | None, how: Origin, valid: Tensor | None
                      ) -> tuple[Tensor, Tensor]:
    """gradients.loss_and_gradient for what counts as a sample. Zero at padding."""
    valid = of_output(valid, output)
    if how.sample_dims == 1 and valid is None:
        return gradients.loss_and_gradient(output, batch, loss, how.normalize)
    rows(output, how.sample_dims, valid)
    value, gradient = gradients.loss_and_gradient(output, batch, loss, False)
    if valid is not None:
        gradient = gradient * _along(valid, output)
    if how.normalize:
        gradient = ops.normalize_gradient(gradient.flatten(0, how.sample_dims - 1))[0].reshape(output.shape)
    return value, gradient


def _along(valid: Tensor, x: Tensor) -> Tensor:
    """bool [N, T] in a shape that broadcasts over x [N, T, ...]."""
    return valid.to(x.device).reshape(*valid.shape, *[1] * (x.dim() - 2))


def _first_is_mask(inputs: Any) -> bool:
    mask = next((mapping[MASK] for mapping in mappings(inputs) if MASK in mapping), None)
    return mask is not None and first_input(inputs) is mask
