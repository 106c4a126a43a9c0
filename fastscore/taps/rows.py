"""The rows of what is tapped: each is measured by itself, and they are told apart by sample afterwards."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fastscore.modules.sample_axis import (
    Owners,
    SampleAxes,
    SampleAxis,
    Untold,
    by_sample,
    by_token,
    of_passes,
    rows_first,
    spread,
)
from fastscore.taps.gates import TapPoint
from fastscore.taps.measures import DEGREES, Measure
from fastscore.taps.passes import ForwardPass, Tapped


class Rows:
    """Of all tapped tensors, as they are measured by `measure`.

    axes, sample_dims, apart: as of Taps.
    """

    def __init__(self, measure: Measure, axes: SampleAxes, sample_dims: int, apart: bool) -> None:
        self._measure, self._axes, self.sample_dims, self._apart = measure, axes, sample_dims, apart

    def gate(self, rows: int, channels: int, like: Tensor) -> Tensor:
        """A leaf [P, R, C] for a tensor such as `like`. It is never read: only what comes back to it counts."""
        return torch.empty(self._measure.parts, rows, channels, device=like.device, requires_grad=True,
                           dtype=torch.float64 if like.dtype == torch.float64 else torch.float32)

    def measured(self, x: Tensor, g: Tensor, channel_dim: int, axis: SampleAxis, valid: Tensor | None,
                 inside: Tensor | None = None) -> Tensor:
        """[P, R, C] of activation and gradient: a row for each place along `axis`, or for each token where tokens are
        samples; where `valid` (bool [N, T]) tells padding, without it, and a row for each sample; where `inside` (bool,
        of the shape of x with one channel) does, without it. Where nothing was read, there is no mean, but NaN."""
        if valid is None:
            if inside is not None:
                x = x.masked_fill(~inside, 0)
            x, channel = self.first(x, channel_dim, axis)
            measured = self._measure.compute(x, self.first(g, channel_dim, axis)[0], channel)
            if self._measure.mean is not None and not x.numel():
                measured[self._measure.mean].fill_(torch.nan)
            if self._measure.mean is not None and inside is not None:
                there = self.first(inside, channel_dim, axis)[0].flatten(1).to(measured.dtype)
                measured[self._measure.mean] /= there.mean(1, keepdim=True)  # 0 / 0 of a row of padding alone
            return measured
        valid = valid.to(x.device)
        x, g = axis.first(x, len(valid)), axis.first(g, len(valid))
        measured = self._measure.compute(x.masked_fill(~valid[..., None], 0), g, -1)
        if self._measure.mean is not None:
            measured[self._measure.mean] *= (valid.shape[1] / valid.sum(1).clamp(min=1))[:, None]
        return measured

    def by_sample(self, rows: Sequence[Tapped], done: ForwardPass, output: Tensor) -> list[tuple[str, Tensor | str]]:
        """(layer, sums [P, N, C]) from the rows that were measured in a pass, of whose output [N, ...] only the shape
        counts; or (layer, the reason why its rows cannot be told apart by sample)."""
        samples, mean = len(output), self._measure.mean
        tensor = self._axes.first_input(done.inputs)
        fixed = tensor is not None and tensor.numel() == self._axes.values * samples

        def of(layer: str, each: Tensor, axis: SampleAxis | Untold | Owners) -> Tensor | str:
            found = by_token(each, axis, layer, samples, output.shape[1]) if self.sample_dims > 1 \
                else by_sample(each, axis, layer, samples, mean, fixed)
            return spread(each, samples, mean) if isinstance(found, str) and not self._apart else found

        return [(layer, of(layer, each, axis)) for layer, each, axis in rows]

    def moving(self, gates: Iterable[Tapped], samples: int) -> list[Tapped]:
        """Those of `gates` whose rows have to be followed in a pass of so many samples."""
        return [each for each in gates if self._axes.follows(each.axis)] \
            if self._apart and self.sample_dims == 1 and samples > 1 else []

    @property
    def linear(self) -> list[int]:
        """The parts of what is measured that are as large as the gradient is."""
        return [part for part, degree in enumerate(DEGREES[self._measure]) if degree == 1]

    @property
    def one_by_one(self) -> bool:
        """Whether each sample takes a backward pass of its own."""
        return self._axes.flat and self._apart

    def of_sample(self, rows: Sequence[Tapped]) -> list[Tapped]:
        """What a backward pass of one sample alone has measured, [P, 1, C]: wherever it came to."""
        return [each._replace(gate=spread(each.gate, 1, self._measure.mean)) for each in rows]

    def of_samples(self, passes: Sequence[Sequence[Tapped]]) -> list[tuple[str, Tensor | str]]:
        """As `by_sample`, from what `of_sample` made of each sample's pass."""
        return [(layer, of_passes([rows[place].gate for rows in passes], axis, self._measure.mean))
                for place, (layer, _, axis) in enumerate(passes[0])]

    def first(self, x: Tensor, channel_dim: int, axis: SampleAxis) -> tuple[Tensor, int]:
        """x with the rows first that are measured one by one, and where its channels are then."""
        x, channel = rows_first(x, axis, channel_dim)
        return (x.flatten(0, 1), channel - 1) if self.sample_dims > 1 and channel_dim == -1 and x.dim() > 2 \
            else (x, channel)

    def axis_of(self, x: Tensor, layer: str, point: TapPoint, axis: SampleAxis | Untold, valid: Tensor | None
                ) -> SampleAxis | Untold:
        """How the rows that are measured of x belong to samples, or why that is not known."""
        if valid is not None:
            return SampleAxis()
        if self.sample_dims == 1 or isinstance(axis, Untold):
            return axis
        if point.channel_dim != -1 or x.dim() < 2:
            return Untold(f"{layer} reads {list(x.shape)}, which has no dimension of tokens, [N, T, C], to tell "
                          f"samples apart by (sample_dims={self.sample_dims})")
        return axis if x.dim() == 2 else SampleAxis(0, 1, rows_first(x, axis, -1)[0].shape[1])
