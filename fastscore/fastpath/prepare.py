"""The plan of a fast pass: what is changed in an evaluation copy, and where each tap stands; made once for a model."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastscore.batches import Batch, Forward, checked
from fastscore.fastpath.compiled import compile_tapped
from fastscore.fastpath.fusion import FastLayers
from fastscore.fastpath.observation import observe
from fastscore.fastpath.packed_layers import Ends
from fastscore.fastpath.precision import PRECISIONS, cast, check_runs, described
from fastscore.modules.evaluation_copy import Folding, to_channels_last
from fastscore.taps.gates import Place
from fastscore.taps.taps import Taps


@dataclass(frozen=True)
class Site:
    """Where a tap stands. layer: whose input (output, for the gate of a BatchNorm) it measures. reads: shape of what it
    reads of one sample. bytes: of that, activation and gradient together. note: what spares it reading more."""

    layer: str
    reads: tuple[int, ...]
    bytes: int
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """How a model is scored; str() is a table.

    sites: the taps. folded: BatchNorm -> the layer that it was folded into. kept: BatchNorm -> why it was not.
    packed: layers whose weights were laid out once, for both directions -> the ends of the clamp (ReLU, ...) that they
    end in, or None. unpacked: Conv2d and Linear that run as they are -> why.
    precision: of the forward and backward pass; sums are float32 or wider. layout: memory format of the activations.
    compiled: whether torch.compile has made the forward and backward pass.
    """

    sites: tuple[Site, ...]
    folded: Mapping[str, str] = field(default_factory=dict)
    kept: Mapping[str, str] = field(default_factory=dict)
    packed: Mapping[str, Ends | None] = field(default_factory=dict)
    unpacked: Mapping[str, str] = field(default_factory=dict)
    precision: str = "float32"
    layout: str = "contiguous"
    compiled: bool = False

    def __str__(self) -> str:
        every = sum(site.bytes for site in self.sites)
        rows = [("tap", "reads", "KiB", ""),
                *((site.layer, "x".join(map(str, site.reads)), f"{site.bytes / 1024:.1f}", site.note)
                  for site in self.sites)]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = [f"{self.precision}, {self.layout}{', compiled' if self.compiled else ''}; {len(self.sites)} taps read "
                 f"{every / 2**20:.2f} MiB for each sample; {len(self.folded)} BatchNorms folded; {len(self.packed)} "
                 f"layers packed, {sum(ends is not None for ends in self.packed.values())} of them with a clamp"]
        lines += [f"{name}: not folded: {reason}" for name, reason in self.kept.items()]
        lines += [f"{name}: not packed: {reason}" for name, reason in self.unpacked.items()]
        lines += [f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}".rstrip()
                  for row in rows]
        return "\n".join(lines)


def prepare(twin: nn.Module, taps: Taps, normalized_by: Mapping[str, str], example: Batch, forward: Forward,
            precision: str | None = None, compiled: bool = False) -> tuple[Plan, Callable[[nn.Module, Batch], Tensor]]:
    """Make an evaluation copy fast, in place: (the plan, what to call it with, which returns its output).

    taps: on the copy; they may be moved. example: a batch, on which the copy runs two or three times.
    precision: None as it is, or a name in PRECISIONS; outputs are float32 then, and so is what follows from them.
    compiled: through torch.compile, for batches of the size of the first; others run as they are.
    Raises ValueError, naming the layer, where one cannot take the precision, or is called twice and compiled.
    """
    run = checked(forward)
    seen = observe(twin, taps, example, run)
    dtype = PRECISIONS[precision] if precision else seen.output.dtype
    before = {name: (layer.weight.detach(), None if layer.bias is None else layer.bias.detach())
              for name, layer in twin.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))}
    wider = torch.finfo(dtype).bits > torch.finfo(seen.output.dtype).bits
    if precision and wider:  # folded weights are rounded once, to the finer of the two
        cast(twin, dtype)
    # a filter's own gradient is read from filters as they are: folding changes them
    folding = Folding(twin, {} if taps.weights else normalized_by, seen.flat)
    channels_last = any(isinstance(module, nn.Conv2d) for module in twin.modules())
    if channels_last:
        twin.to(memory_format=torch.channels_last)
    arrange = to_channels_last if channels_last else _as_it_is
    narrower = torch.finfo(dtype).bits < torch.finfo(seen.output.dtype).bits

    def pack() -> FastLayers | None:
        return None if compiled or taps.weights else \
            FastLayers(twin, taps, seen.clamps, folding.folded, seen.inputs)

    layers = None if narrower else pack()
    if folding.folded or layers is not None:
        torch.manual_seed(0)  # whatever is drawn, is drawn again
        with torch.no_grad():
            output = run(twin, arrange(example))
        if not _close(output.to(seen.output.dtype), seen.output):
            reason = "the model's output was another one afterwards"
            if layers is not None:
                layers.undo(reason)
            folding.undo(reason)
    if precision and not wider:
        cast(twin, dtype)
    layers = pack() if narrower else layers
    if layers is not None:
        layers.release(twin, before)
    if precision:
        check_runs(twin, arrange(example), run, precision)
    if compiled:
        compile_tapped(twin, taps, seen.shapes, dtype)
    sites = tuple(_site(layer, taps.places[layer], shapes[0][1:], dtype) for layer, shapes in seen.shapes.items())
    plan = Plan(sites, folding.folded, folding.kept, {} if layers is None else layers.packed,
                {} if layers is None else layers.kept, described(dtype, seen.output.device),
                "channels_last" if channels_last else "contiguous", compiled)
    wide = torch.promote_types(dtype, torch.float32) if precision else dtype
    return plan, lambda model, batch: run(model, arrange(batch)).to(wide)


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _close(x: Tensor, before: Tensor) -> bool:
    """To what rounding leaves: half the digits of the largest value."""
    largest = float(before.abs().nan_to_num(0, 0, 0).max()) if before.numel() else 0.0
    return torch.allclose(x, before, rtol=0, atol=torch.finfo(x.dtype).eps ** 0.5 * largest, equal_nan=True)


def _site(layer: str, place: Place, shape: tuple[int, ...], dtype: torch.dtype) -> Site:
    reads = tuple(len(range(size)[window]) for size, window in zip(shape, place.window[1:], strict=True)) \
        if place.window else shape
    note = f"before {place.module}" if place.module else "what its stride reads" if place.window else ""
    return Site(layer, reads, 2 * math.prod(reads) * dtype.itemsize, note)
