"""Where the samples of a batch lie in a tensor: along which dimension, and in which order with what else lies there."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastscore.batches.parts import first_tensor
from fastscore.wording import counted

EVERY = -1
MIXED = "what {0} reads of one sample reaches the outputs of others, so that samples cannot be told apart"


@dataclass(frozen=True)
class SampleAxis:
    """Samples along dimension `dim`, which has before * N * after places: place i belongs to sample i // after % N.

    Attributes:
        dim: the dimension, never that of the channels; EVERY, where each place along all of them is a row.
        before, after: (1, 1) for [N, ...] and for [T, N, ...]; (1, T) where a sample's T frames, windows or tokens
            follow one another; (T, 1) where the N samples of one frame do, as in two batches stacked (2, 1).
    """

    dim: int = 0
    before: int = 1
    after: int = 1

    def factors(self, size: int, samples: int, fixed: bool = False) -> tuple[int, int] | None:
        """(before, after) for `size` places of `samples` samples; None where they do not fit.

        A factor that was 1 stays 1; the other may differ with the size of a sample. fixed: where samples are as large
        as those that the axis was found with, neither may.
        """
        if not samples or size % samples:
            return None
        places = size // samples
        free = not fixed and (self.before == 1) != (self.after == 1)
        if not free:
            return (self.before, self.after) if places == self.before * self.after else None
        return (1, places) if self.before == 1 else (places, 1)

    def fits(self, x: Tensor, samples: int) -> bool:
        """Whether x can hold that many samples along this axis."""
        return x.dim() > self.dim and self.factors(x.shape[self.dim], samples) is not None

    def first(self, x: Tensor, samples: int) -> Tensor:
        """x, which fits, with its samples first: [N, ...], then what lay before and after them along `dim`."""
        before, after = self.factors(x.shape[self.dim], samples) or (1, 1)
        x = x.unflatten(self.dim, (before, samples, after)).movedim(self.dim + 1, 0)
        x = x.flatten(self.dim + 1, self.dim + 2)
        return x.squeeze(self.dim + 1) if before * after == 1 else x


@dataclass(frozen=True)
class Untold:
    """Why the rows of a tensor cannot be told apart by sample.

    Attributes:
        reached: whether a gradient has been seen there; where none ever comes, nothing is missed.
        moving: the dimension (see SampleAxis) along which they lie, otherwise in every batch, each of one sample: then
            gradients tell whose they are (see fastscore.taps.owners), where they may be sent back again.
    """

    reason: str
    reached: bool = True
    moving: int | None = None


@dataclass(frozen=True)
class Owners:
    """Of which sample each row of a tensor is: int64 [R]."""

    of_row: Tensor


@dataclass(frozen=True)
class SampleAxes:
    """How the rows of every tapped tensor belong to samples.

    Attributes:
        calls: layer -> its axis in each of its calls in one pass, or why there is none. Empty for a graph that was made
            by hand: every tensor is [N, ...] then.
        output: the dimension of the samples in the model's output.
        input: that in the first tensor that the model is called with; None where it has none.
        values: how many values that tensor had for each sample.
        second: whether it is the second dimension of the batch itself, not the first, that counts samples.
        transposing: the `forward` by which a model that takes samples second is given batches [N, ...]: see
            fastscore.graph.samples.samples_second.
        together: whether what comes out for a sample depends on the others of its batch: see
            fastscore.graph.trials.companions.
        one: whether the batch was one sample, whatever its tensors hold: a graph of many nodes.
        flat: whether samples lie one after the other, each with as many rows as it holds: a sample is a row of the
            output then, and is sent back by itself (see fastscore.graph.samples.flat_batches).
        followed: whether rows that move are followed: gradients are sent back as often as that takes.
    """

    calls: Mapping[str, tuple[SampleAxis | Untold, ...]] = field(default_factory=dict)
    output: int = 0
    input: int | None = 0
    values: int = 0
    second: bool = False
    transposing: str = ""
    together: bool = False
    one: bool = False
    flat: bool = False
    followed: bool = True

    @property
    def batch(self) -> int:
        """The dimension of the batch itself that counts samples."""
        return int(self.second)

    def all_at_once(self, reason: str) -> "SampleAxes":
        """These where a batch is sent back once, as a whole: nothing tells flat samples apart then, for `reason`, and
        no row is followed that moves."""
        calls = {layer: (Untold(reason),) for layer in self.calls} if self.flat else self.calls
        return replace(self, calls=calls, flat=False, followed=False)

    def follows(self, axis: "SampleAxis | Untold | Owners") -> bool:
        """Whether rows that lie so are told apart in each batch anew."""
        return self.followed and isinstance(axis, Untold) and axis.moving is not None

    def of(self, layer: str, call: int = 0) -> SampleAxis | Untold:
        """The axis in the call of that number, or why it cannot be told."""
        found = self.calls.get(layer, ())
        if not self.calls:
            return SampleAxis()
        if call < len(found):
            return found[call]
        if found and len(set(found)) == 1:
            return found[0]
        return Untold(f"{layer} did not run, or not as often, on the samples that the model was traced with",
                      moving=0)

    def of_calls(self, layers: Iterable[str]) -> list[SampleAxis | Untold]:
        """The axes of all calls of layers; of one that did not run, what is said of it."""
        return [axis for layer in layers for axis in self.calls.get(layer) or (self.of(layer),)]

    def rerun(self, layer: str) -> SampleAxis | Untold:
        """The axis in whichever call it is, as where activation checkpointing runs a layer again."""
        return self.of(layer) if len(set(self.calls.get(layer, ()))) < 2 else \
            Untold(f"{layer} is called in several ways and run again by an activation checkpoint, in another order")

    def reason(self, layer: str) -> str | None:
        """Why the samples of a layer cannot be told apart in one of its calls; None where they can."""
        return next((axis.reason for axis in self.calls.get(layer, ()) if isinstance(axis, Untold) and axis.reached
                     and not self.follows(axis)), None)

    def first_input(self, inputs: Any) -> Tensor | None:
        """The first tensor of a call, samples first; None where no dimension of it is known to count samples."""
        tensor = first_tensor(inputs)
        if tensor is None or self.input is None or tensor.dim() <= self.input:
            return None
        return tensor.movedim(self.input, 0)


def rows_first(x: Tensor, axis: SampleAxis, channel_dim: int) -> tuple[Tensor, int]:
    """x with the places along `axis` first, and where its channels are then; one row where nothing but channels, or
    the image of one sample, is there."""
    channel = channel_dim % x.dim()
    if channel == 0:
        return x[None], 1
    if axis.dim == EVERY:
        return x.movedim(channel, -1).flatten(0, -2), 1
    return (x.movedim(axis.dim, 0), channel + (axis.dim > channel)) if axis.dim else (x, channel)


def by_sample(rows: Tensor, axis: SampleAxis | Untold | Owners, layer: str, samples: int, mean: int | None,
              fixed: bool = False) -> Tensor | str:
    """What was measured of each row, added up for each of N samples: [P, N, C]; or the reason why the rows cannot be
    told apart.

    rows: [P, R, C], of what a layer reads, which is called `layer` in the reason. axis: how they belong to samples, or
    why that is not known. mean: the part that holds means, which are averaged, if there is one. fixed: see
    SampleAxis.factors.
    """
    if samples == 0:
        return rows[:, :0]
    if samples == 1:  # whatever is there belongs to it
        axis = SampleAxis(0, 1, rows.shape[1])
    if isinstance(axis, Owners):
        total: Tensor = rows.new_zeros(len(rows), samples, rows.shape[2]).index_add_(1, axis.of_row, rows)
        if mean is not None:  # not every row need be anybody's
            total[mean] = rows[mean].nanmean(0, keepdim=True)
        return total
    if isinstance(axis, Untold):
        return spread(rows, samples, mean) if not axis.reached and _no_gradient(rows, mean) else axis.reason
    factors = axis.factors(rows.shape[1], samples, fixed)
    if factors is None:
        return (f"{layer} read {counted(rows.shape[1], 'row')} for {counted(samples, 'sample')}, in another layout "
                "than when it was traced")
    if math.prod(factors) == 1:
        return rows
    places = rows.unflatten(1, (factors[0], samples, factors[1]))
    total = places.sum((1, 3))
    if mean is not None:
        total[mean] = places[mean].nanmean((0, 2))  # of a row that read nothing there is none
    return total


def of_passes(sums: Sequence[Tensor], axis: SampleAxis | Untold | Owners, mean: int | None) -> Tensor | str:
    """[P, 1, C] of each of N samples, that a backward pass of its own measured, as [P, N, C]; or the reason why samples
    meet there."""
    joined = torch.cat(list(sums), 1)
    if isinstance(axis, Untold) and (axis.reached or not _no_gradient(joined, mean)):
        return axis.reason
    return joined


def by_token(rows: Tensor, axis: SampleAxis | Untold | Owners, layer: str, samples: int, tokens: int) -> Tensor | str:
    """What was measured of each row, [P, R, C], in the order of an output's tokens: [P, N * T, C], or a reason."""
    if not isinstance(axis, SampleAxis):
        return axis.reason if isinstance(axis, Untold) else f"{layer} reads rows that move"
    factors = axis.factors(rows.shape[1], samples)
    if factors is None or math.prod(factors) != tokens:
        return (f"{layer} read {counted(rows.shape[1], 'row')} for {counted(samples, 'sample')} of "
                f"{counted(tokens, 'token')}: which token each belongs to is not followed; sample_dims=1 scores it")
    in_order: Tensor = rows.unflatten(1, (factors[0], samples, factors[1])).transpose(1, 2).flatten(1, 3)
    return in_order


def _no_gradient(rows: Tensor, mean: int | None) -> bool:
    """Whether none came in this pass either, as behind a dead ReLU: then what counts is zero for every sample."""
    return not any(bool(part.any()) for number, part in enumerate(rows) if number != mean)


def spread(rows: Tensor, samples: int, mean: int | None) -> Tensor:
    """[P, R, C] -> [P, N, C] with the sums (means) of all rows, in equal parts: for what only their total counts."""
    total = rows.sum(1, keepdim=True) / max(samples, 1)
    if mean is not None:
        total[mean] = rows[mean].nanmean(0, keepdim=True)
    return total.expand(-1, samples, -1)


def joined_axis(shapes: Sequence[torch.Size], samples: Sequence[int]) -> int | None:
    """The dimension that has as many places as there are samples, in each of several batches; the first, if it has."""
    dims = [dim for dim in range(min(map(len, shapes)))
            if all(shape[dim] == count for shape, count in zip(shapes, samples, strict=True))]
    return None if not dims or (dims[0] and len(dims) > 1) else dims[0]
