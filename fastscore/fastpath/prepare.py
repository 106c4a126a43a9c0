"""The plan of a fast pass: what is changed in an evaluation copy, and where each tap stands; made once for a model."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastscore.batches import Batch, Forward, checked_forward, to_channels_last
from fastscore.fastpath.compiled import compile_tapped
from fastscore.fastpath.folding import Folding
from fastscore.fastpath.fusion import FusedLayers
from fastscore.fastpath.observation import observe
from fastscore.fastpath.packed_layers import ClampBounds
from fastscore.fastpath.precision import PRECISIONS, cast, check_runs, described
from fastscore.taps.gates import TapPoint
from fastscore.taps.taps import Taps


@dataclass(frozen=True)
class PlannedTap:
    """Where a tap stands. layer: whose input (output, for the gate of a BatchNorm) it measures. reads: shape of what it
    reads of one sample. bytes: of that, activation and gradient together. note: what spares it reading more."""

    layer: str
    reads: tuple[int, ...]
    bytes: int
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """How a model is scored; str() is a table.

    taps: where each stands. folded: BatchNorm -> the layer that it was folded into. not_folded: BatchNorm -> why it was
    not. packed: layers whose weights were prepacked for both directions -> the bounds of the clamp (ReLU, ...) that
    they end in, or None. not_packed: Conv2d and Linear that run as they are -> why.
    precision: of the forward and backward pass; sums are float32 or wider. layout: memory format of the activations.
    compiled: whether torch.compile has made the forward and backward pass.
    """

    taps: tuple[PlannedTap, ...]
    folded: Mapping[str, str] = field(default_factory=dict)
    not_folded: Mapping[str, str] = field(default_factory=dict)
    packed: Mapping[str, ClampBounds | None] = field(default_factory=dict)
    not_packed: Mapping[str, str] = field(default_factory=dict)
    precision: str = "float32"
    layout: str = "contiguous"
    compiled: bool = False

    def __str__(self) -> str:
        every = sum(tap.bytes for tap in self.taps)
        rows = [("tap", "reads", "KiB", ""),
                *((tap.layer, "x".join(map(str, tap.reads)), f"{tap.bytes / 1024:.1f}", tap.note)
                  for tap in self.taps)]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = [f"{self.precision}, {self.layout}{', compiled' if self.compiled else ''}; {len(self.taps)} taps read "
                 f"{every / 2**20:.2f} MiB for each sample; {len(self.folded)} BatchNorms folded; {len(self.packed)} "
                 f"layers packed, {sum(bounds is not None for bounds in self.packed.values())} of them with a clamp"]
        lines += [f"{name}: not folded: {reason}" for name, reason in self.not_folded.items()]
        lines += [f"{name}: not packed: {reason}" for name, reason in self.not_packed.items()]
        lines += [f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}".rstrip()
                  for row in rows]
        return "\n".join(lines)


def prepare(eval_model: nn.Module, taps: Taps, normalized_by: Mapping[str, str], example: Batch, forward: Forward,
            precision: str | None = None, compiled: bool = False) -> tuple[Plan, Callable[[nn.Module, Batch], Tensor]]:
    """Make an evaluation copy fast, in place: (the plan, what to call it with, which returns its output).

    taps: on the copy; they may be moved. example: a batch, on which the copy runs two or three times.
    precision: None as it is, or a name in PRECISIONS; outputs are float32 then, and so is what follows from them.
    compiled: through torch.compile, for batches of the size of the first; others run as they are.
    Raises ValueError, naming the layer, where one cannot take the precision, or is called twice and compiled.
    """
    run = checked_forward(forward)
    seen = observe(eval_model, taps, example, run)
    dtype = PRECISIONS[precision] if precision else seen.output.dtype
    before = {name: (layer.weight.detach(), None if layer.bias is None else layer.bias.detach())
              for name, layer in eval_model.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))}
    wider = torch.finfo(dtype).bits > torch.finfo(seen.output.dtype).bits
    if precision and wider:  # folded weights are rounded once, to the finer of the two
        cast(eval_model, dtype)
    # a filter's own gradient is read from filters as they are: folding changes them
    folding = Folding(eval_model, {} if taps.weights else normalized_by, seen.flat)
    channels_last = any(isinstance(module, nn.Conv2d) for module in eval_model.modules())
    if channels_last:
        eval_model.to(memory_format=torch.channels_last)
    arrange = to_channels_last if channels_last else _as_it_is
    narrower = torch.finfo(dtype).bits < torch.finfo(seen.output.dtype).bits

    def pack() -> FusedLayers | None:
        return None if compiled or taps.weights else \
            FusedLayers(eval_model, taps, seen.clamps, folding.folded, seen.inputs)

    layers = None if narrower else pack()
    if folding.folded or layers is not None:
        torch.manual_seed(0)  # whatever is drawn, is drawn again
        with torch.no_grad():
            output = run(eval_model, arrange(example))
        if not _close(output.to(seen.output.dtype), seen.output):
            reason = "the model's output was another one afterwards"
            if layers is not None:
                layers.undo(reason)
            folding.undo(reason)
    if precision and not wider:
        cast(eval_model, dtype)
    layers = pack() if narrower else layers
    if layers is not None:
        layers.release(eval_model, before)
    if precision:
        check_runs(eval_model, arrange(example), run, precision)
    if compiled:
        compile_tapped(eval_model, taps, seen.shapes, dtype)
    planned = tuple(_planned(layer, taps.points[layer], shapes[0][1:], dtype) for layer, shapes in seen.shapes.items())
    plan = Plan(planned, folding.folded, folding.not_folded, {} if layers is None else layers.packed,
                {} if layers is None else layers.not_packed, described(dtype, seen.output.device),
                "channels_last" if channels_last else "contiguous", compiled)
    wide = torch.promote_types(dtype, torch.float32) if precision else dtype
    return plan, lambda model, batch: run(model, arrange(batch)).to(wide)


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _close(x: Tensor, before: Tensor) -> bool:
    """To what rounding leaves: half the digits of the largest value."""
    largest = float(before.abs().nan_to_num(0, 0, 0).max()) if before.numel() else 0.0
    return torch.allclose(x, before, rtol=0, atol=torch.finfo(x.dtype).eps ** 0.5 * largest, equal_nan=True)


def _planned(layer: str, point: TapPoint, shape: tuple[int, ...], dtype: torch.dtype) -> PlannedTap:
    reads = tuple(len(range(size)[window]) for size, window in zip(shape, point.window[1:], strict=True)) \
        if point.window else shape
    note = f"before {point.module}" if point.module else "what its stride reads" if point.window else ""
    return PlannedTap(layer, reads, 2 * math.prod(reads) * dtype.itemsize, note)
