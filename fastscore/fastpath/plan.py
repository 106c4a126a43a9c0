"""The plan of a fast pass: what is changed in an evaluation copy, and where each tap stands."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fastscore import tables
from fastscore.fastpath.packed_layers import ClampBounds
from fastscore.modules.sample_axis import SampleAxis, Untold
from fastscore.taps.gates import TapPoint
from fastscore.wording import counted


@dataclass(frozen=True)
class PlannedTap:
    """Where a tap stands. layer: whose input (output, for the gate of a BatchNorm) it measures. reads: shape of what it
    reads of one sample. bytes: of that, activation and gradient together. note: what spares it reading more."""

    layer: str
    reads: tuple[int, ...]
    bytes: int
    note: str = ""


@dataclass(frozen=True)
class Plan(tables.Table):
    """How a model is scored; str() is a table.

    taps: where each stands. folded: BatchNorm -> the layer that it was folded into. not_folded: BatchNorm -> why it was
    not. packed: layers whose weights were prepacked for both directions, or that cuDNN fuses with their ReLU -> the
    bounds of the clamp (ReLU, ...) that they end in, or None. not_packed: Conv2d and Linear that run as they are ->
    why. winograd: packed convolutions that take a quarter of the products. added: packed layers that do the addition
    behind them, too, and the ReLU behind that. precision: of the forward and backward pass; sums are float32 or wider.
    layout: of the activations in memory. compiled: whether torch.compile has made the forward and backward pass.
    kernels: what measures at the taps, and why that where it is not what would be fastest. graph: how many CUDA graphs
    ran it, or why none did; empty for a plan that has not run.
    """

    taps: tuple[PlannedTap, ...]
    folded: Mapping[str, str] = field(default_factory=dict)
    not_folded: Mapping[str, str] = field(default_factory=dict)
    packed: Mapping[str, ClampBounds | None] = field(default_factory=dict)
    not_packed: Mapping[str, str] = field(default_factory=dict)
    winograd: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    precision: str = "float32"
    layout: str = "contiguous"
    compiled: bool = False
    kernels: str = ""
    graph: str = ""

    def __repr__(self) -> str:
        return f"<Plan: {self._summary}>"

    def records(self) -> list[dict[str, Any]]:
        """A row for each tap."""
        return [{"tap": tap.layer, "reads": "x".join(map(str, tap.reads)), "KiB": tap.bytes / 1024, "note": tap.note}
                for tap in self.taps]

    @property
    def _summary(self) -> str:
        every = sum(tap.bytes for tap in self.taps)
        return (f"{self.precision}, {self.layout}{', compiled' if self.compiled else ''}; "
                f"{counted(len(self.taps), 'tap reads', 'taps read')} {every / 2**20:.2f} MiB for each sample; "
                f"{counted(len(self.folded), 'BatchNorm')} folded; {counted(len(self.packed), 'layer')} packed, "
                f"{sum(bounds is not None for bounds in self.packed.values())} of them with a clamp"
                + f", {len(self.winograd)} by Winograd's algorithm" * bool(self.winograd)
                + f", {len(self.added)} with an addition and a ReLU" * bool(self.added))

    @property
    def _remarks(self) -> list[str]:
        ran = [f"measured by {self.kernels}"] * bool(self.kernels) + [self.graph] * bool(self.graph)
        return [self._summary, *ran] + \
            [f"{name}: not folded: {reason}" for name, reason in self.not_folded.items()] \
            + [f"{name}: not packed: {reason}" for name, reason in self.not_packed.items()]

    def __str__(self) -> str:
        rows = [("tap", "reads", "KiB", ""),
                *((tap.layer, "x".join(map(str, tap.reads)), f"{tap.bytes / 1024:.1f}", tap.note)
                  for tap in self.taps)]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = self._remarks
        lines += [f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}".rstrip()
                  for row in rows]
        return "\n".join(lines)


def planned_tap(layer: str, point: TapPoint, axis: SampleAxis | Untold, shape: tuple[int, ...], samples: int,
                dtype: torch.dtype) -> PlannedTap:
    """The tap of `layer` at `point`, where what stands there of that many samples has that shape and dtype."""
    if point.window:
        shape = tuple(len(range(size)[step]) for size, step in zip(shape, point.window, strict=True))
    dim = axis.dim if isinstance(axis, SampleAxis) else 0
    places = shape[dim] // samples
    reads = ((places,) if places > 1 else ()) + shape[:dim] + shape[dim + 1:]
    note = f"before {point.module}" if point.module and not point.output else \
        "what its stride reads" if point.window else ""
    return PlannedTap(layer, reads, 2 * math.prod(reads) * dtype.itemsize, note)
