"""Whether what a model returns for a sample depends on the others in its batch, by values alone: a scale, a threshold
or a statistic of the batch, without a gradient, as in dynamic quantisation; or rows of all samples that compete for
places, as in experts of a limited capacity; or on its place in the batch, as where halves are treated differently."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from fastscore import rng
from fastscore.batches.parts import Batch, first_tensor, map_tensors, tensors_of
from fastscore.graph.trials.differences import all_close
from fastscore.graph.trials.known_samples import KnownSamples
from fastscore.graph.trials.sample_trials import Run, Trial, tried
from fastscore.graph.trials.trial_inputs import batch_of, hold_other_values
from fastscore.modules.inspection import device_of
from fastscore.modules.weights import recurrent

TOGETHER = ("{0}: what it returns for a sample depends on which others are in its batch, or on its place there (by a "
            "scale, a threshold or a statistic that its code takes over the batch, rows of all samples that it chooses "
            "among, or halves of the batch that it treats differently, say). These "
            "are scores for batches as they are given: give such as the model is used with, or have its code treat "
            "each sample by itself")
_LARGER = 8  # than what is there: the largest of a batch is another then
_PART = 3  # samples of a batch that are run by themselves
_MOST = 4  # samples of the example that are run together


def beside_larger(batch: Batch, example: Batch) -> Batch:
    """Two samples, made of `example`, with the first of them last, beside a larger one: what it returns alone it
    returns there, unless that depends on others or on its place."""
    def turned(x: Tensor) -> Tensor:
        first, other = x[:1], x[1:]
        return torch.cat([other * _LARGER if x.is_floating_point() else other, first])

    each = iter(_own(example))
    return map_tensors(lambda x: turned(x) if next(each) else x, batch)


def others(example: Batch) -> Batch:
    """Two samples, as they are, beside the first of `example`."""
    return _picked(batch_of(example, 3), _own(example), slice(1, 3))


def _own(example: Batch) -> list[bool]:
    """Of each tensor, whether it has a row for each sample."""
    first = first_tensor(example)
    count = len(first) if first is not None and first.dim() else 0
    return [x.dim() > 0 and len(x) == count for x in tensors_of(example)]


def depend(model: nn.Module, run: Run, trials: Sequence[Trial], batch: Batch, example: Batch,
           axes: Sequence[int | None], known_samples: KnownSamples, single: Batch = None) -> bool:
    """Whether what the model returns for a sample would be another beside other samples, or at another place.

    Where the last of `batch` was run alone, and is beside a larger one there, that has shown it; where there are none,
    as of tokens, the other, which has the largest of whatever the last has not, is run alone. Otherwise, where
    `example` has several samples, they are run at the places of others, and the last is run beside larger ones;
    the first were run beside fewer.
    Where the code decides by what the batch holds, or reads numbers of it, that could show nothing by luck: then every
    sample is run by itself, the first and the last beside copies of themselves, which want what they want, and those
    last in `example`, or among its first. What shows something counts where the same run twice does not. Code that
    puts samples in another order returns something that was there before.

    model, run: as in fastscore.graph.samples.sample_axes.find. trials: runs that were made, the last on `batch`, made
    of `example`, which has the model's own samples. axes: where samples lie in each output. known_samples: what layers
    made of samples in these runs. single: the batch of one sample that the first run was on, if it was one.
    """
    known, small = trials[-1], trials[0]
    if known.size < 2:
        return False
    first = first_tensor(example)
    count = len(first) if first is not None and first.dim() else 0
    own = _own(example)
    last = _picked(batch, own, [known.size - 1])
    alone = single is not None and _are_equal(last, single)
    free = bool(known.decides or known.reads)
    drawn = False
    runs = list[tuple[Batch, Sequence[Tensor] | None]]()  # what was run, each batch once

    def outputs(batch: Batch, size: int, once_more: bool = False) -> Sequence[Tensor] | None:
        nonlocal drawn
        for known, made in () if once_more else runs:
            if _are_equal(known, batch):
                return made
        ran = tried(model, {}, run, batch, size, grad=False, known=known_samples)
        drawn = drawn or rng.has_drawn(device_of(model))
        runs.append((batch, None if isinstance(ran, str) else ran.outputs))
        return runs[-1][1]

    def shown() -> Iterator[Batch]:
        """What runs that show something are compared with."""
        if alone:
            if _none_is_there(outputs(last, 1) if was_sketched else small.outputs, before, axes):
                yield batch
            larger = any(x.is_floating_point() for x, each in zip(tensors_of(last), own, strict=True) if each)
            if not (free or larger) and not _are_there(before, outputs(_picked(batch, own, slice(1)), 1), axes):
                yield batch
            if not free:
                return
        for other in _beside_others(batch, own, free, free or count > 1):
            if hold_other_values(batch, other) and _none_is_there(before, outputs(other, known.size), axes):
                yield batch
        turned = _picked(batch, own, [known.size - 1, *range(known.size - 1)])
        if count > 1 and hold_other_values(batch, turned) \
                and not _are_there(before, outputs(turned, known.size), axes):
            yield batch
        if single is None and not was_sketched and known.size > small.size <= count \
                and not _are_there(before, small.outputs, axes):
            yield batch
        several = [batch] if free else []
        if free and batch is not example and count > known.size:
            several.append(_picked(example, own, slice(_MOST)))
        for whole in several:
            size = known.size if whole is batch else min(count, _MOST)
            made = before if whole is batch else outputs(whole, size)
            for sample in range(size)[-_PART:]:
                if not _are_there(made, outputs(_picked(whole, own, slice(sample, sample + 1)), 1), axes):
                    yield whole

    with recurrent.whole(model) as was_sketched:
        before = outputs(batch, known.size) if was_sketched else known.outputs
        if alone and not was_sketched:
            runs.append((last, small.outputs))
        for whole in shown():
            size = known.size if whole is batch else min(count, _MOST)
            again = outputs(whole, size, once_more=True)
            return not drawn and _are_there(before if whole is batch else outputs(whole, size), again, axes)
        return False


def is_alone_what_it_was(trials: Sequence[Trial], batch: Batch, example: Batch, axes: Sequence[int | None],
                         single: Batch) -> bool:
    """Whether the last sample of `batch` was run alone, and then gave what it gives beside others. See `depend`."""
    last = _picked(batch, _own(example), [trials[-1].size - 1])
    if single is None or not _are_equal(last, single):
        return False
    found = _found(trials[-1].outputs, trials[0].outputs, axes)
    return bool(found) and all(all(samples) for samples in found)


def _are_equal(one: Batch, other: Batch) -> bool:
    ours, theirs = list(tensors_of(one)), list(tensors_of(other))
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def _picked(batch: Batch, own: Sequence[bool], samples: slice | list[int]) -> Batch:
    """Some samples of a batch. own: of each of its tensors, whether it has a row for each sample."""
    each = iter(own)
    return map_tensors(lambda x: x[samples] if next(each) else x, batch)


def _beside_others(batch: Batch, own: Sequence[bool], copies: bool, larger: bool) -> Iterator[Batch]:
    """Batches in which one sample is what it was, and others are none of those there were."""
    ways: list[tuple[int, int | None]] = [(-1, _LARGER)] if larger else []
    for kept, by in ways + ([(-1, None), (0, None)] if copies else []):
        each = iter(own)

        def others(x: Tensor, each: Iterator[bool] = each, kept: int = kept, by: int | None = by) -> Tensor:
            if not next(each):
                return x
            other = x[kept].expand_as(x).clone() if by is None or not x.is_floating_point() else x * by
            other[kept] = x[kept]
            return other

        yield map_tensors(others, batch)


def _found(before: Sequence[Tensor] | None, after: Sequence[Tensor] | None, axes: Sequence[int | None]
           ) -> list[list[bool]]:
    """For each output, whether each sample's afterwards is one of those before, but for rounding; nothing where they
    cannot be compared."""
    if before is None or after is None or len(before) != len(after):
        return []
    found = []
    for a, b, axis in zip(before, after, axes, strict=False):
        if axis is None:
            continue
        old, new = a.detach().movedim(axis, 0), b.detach().movedim(axis, 0)
        if old.shape[1:] != new.shape[1:]:
            return []
        rounding = torch.finfo(old.dtype).eps ** 0.5
        found.append([any(all_close(one, other, old, rounding) for other in old) for one in new])
    return found


def _none_is_there(before: Sequence[Tensor] | None, after: Sequence[Tensor] | None, axes: Sequence[int | None]) -> bool:
    return any(not any(samples) for samples in _found(before, after, axes))


def _are_there(before: Sequence[Tensor] | None, after: Sequence[Tensor] | None, axes: Sequence[int | None]) -> bool:
    """Whether every sample afterwards is one of those before; where they cannot be compared, nothing is said against
    it."""
    return all(all(samples) for samples in _found(before, after, axes))
