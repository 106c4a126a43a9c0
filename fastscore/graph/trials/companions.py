"""Whether what a model returns for a sample depends on the others in its batch, by values alone: a scale, a threshold
or a statistic of the batch, without a gradient, as in dynamic quantisation."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastscore.batches import Batch, first_tensor, map_tensors, tensors_of
from fastscore.graph.trials.differences import close
from fastscore.graph.trials.sample_trials import Run, Trial, tried
from fastscore.graph.trials.trial_inputs import batch_of

TOGETHER = ("{0}: what it returns for a sample depends on which others are in its batch (by a scale, a threshold or a "
            "statistic that its code takes over the batch, say). These are scores for batches as they are given: give "
            "such as the model is used with, or have its code treat each sample by itself")
_LARGER = 8  # than what is there: the largest of a batch is another then


def depend(model: nn.Module, run: Run, known: Trial, batch: Batch, example: Batch,
           axes: Sequence[int | None]) -> bool:
    """Whether the outputs of `known`, a run on `batch`, would be others for its first sample beside other samples.
    example: what batches are made of.

    The model runs on the first sample beside others, and once more, as before, where that shows something. Code that
    puts samples in another order shows one output that is as it was.
    """
    count = len(first) if (first := first_tensor(example)) is not None and first.dim() else 0
    other = _beside_others(example, count)
    other = other if batch is example else batch_of(other, known.size)
    if known.size < 2 or all(map(torch.equal, tensors_of(batch), tensors_of(other))):
        return False
    return _none_is_the_same(known, tried(model, {}, run, other, known.size, grad=False), axes) and \
        _all_are_the_same(known, tried(model, {}, run, batch, known.size, grad=False), axes)


def _beside_others(batch: Batch, samples: int) -> Batch:
    def beside_others(x: Tensor) -> Tensor:
        if not x.dim() or len(x) != samples or not x.numel():
            return x
        others = x[1:] * _LARGER if x.is_floating_point() else x[:1].expand_as(x[1:])
        return torch.cat([x[:1], others])

    return map_tensors(beside_others, batch)


def _same(known: Trial, other: Trial | str, axes: Sequence[int | None]) -> list[list[bool]] | None:
    """For each output, whether each sample's is what it was, but for rounding; None where they cannot be compared."""
    if isinstance(other, str) or [x.shape for x in known.outputs] != [x.shape for x in other.outputs]:
        return None
    pairs = [(a.detach().movedim(axis, 0), b.detach().movedim(axis, 0))
             for a, b, axis in zip(known.outputs, other.outputs, axes, strict=False) if axis is not None]
    return [[bool(close(now, before, rounding=torch.finfo(a.dtype).eps ** 0.5).all())
             for before, now in zip(a, b, strict=True)] for a, b in pairs]


def _none_is_the_same(known: Trial, other: Trial | str, axes: Sequence[int | None]) -> bool:
    return any(not any(samples) for samples in _same(known, other, axes) or ())


def _all_are_the_same(known: Trial, other: Trial | str, axes: Sequence[int | None]) -> bool:
    return all(all(samples) for samples in _same(known, other, axes) or [[False]])
