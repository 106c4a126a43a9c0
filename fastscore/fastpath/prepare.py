"""An evaluation copy made fast, stage by stage, and the plan that tells what was done."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastscore import rng
from fastscore.batches.calls import Forward
from fastscore.batches.devices import to_channels_last
from fastscore.batches.outputs import checked_forward
from fastscore.batches.parts import Batch
from fastscore.fastpath.compiled import compile_tapped
from fastscore.fastpath.done_ahead import DoneAhead
from fastscore.fastpath.folding import Folding
from fastscore.fastpath.fusion import FusedLayers
from fastscore.fastpath.observation import Observation, observe
from fastscore.fastpath.plan import Plan, planned_tap
from fastscore.fastpath.precision import PRECISIONS, cast, check_runs, described
from fastscore.graph.trials.differences import all_close
from fastscore.modules.hooks import OwnHook
from fastscore.modules.inspection import device_of
from fastscore.ops.backends import serving
from fastscore.taps.taps import Taps


@dataclass
class Prepared:
    """An evaluation copy with taps, on its way to a fast pass: each stage of `prepare` changes it in place.

    copy, taps: the model that is run, and what measures it. example: a batch to try each change on. forward: calls the
    copy on a batch. normalized_by: layer -> the BatchNorm that alone reads its output. precision: None as the copy is,
    or a name in PRECISIONS. compiled: through torch.compile. samples: two, where the example is one.
    """

    copy: nn.Module
    taps: Taps
    example: Batch
    forward: Callable[[nn.Module, Batch], Tensor]
    normalized_by: Mapping[str, str]
    precision: str | None
    compiled: bool
    samples: Batch | None = None
    channels_last: bool = False
    any_format: bool = True  # False: the model's code depends on where numbers lie in memory
    observation: Observation = field(init=False)
    dtype: torch.dtype = field(init=False)  # of the passes
    folding: Folding = field(init=False)
    ahead: DoneAhead = field(default_factory=DoneAhead)
    layers: FusedLayers | None = None
    formats: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # parameters, and as they lay in memory
    unfolded: dict[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)  # layer -> its weight and bias

    def run(self, batch: Batch) -> Tensor:
        """The copy's output [N, ...] for a batch; float32 or wider where a precision was asked for.

        Raises RuntimeError, naming the layer, where this batch goes past something that layers have done already."""
        wide = torch.promote_types(self.dtype, torch.float32) if self.precision else self.dtype
        self.ahead.start()
        output = self.forward(self.copy, self.arrange(batch)).to(wide)
        self.ahead.finish()
        return output

    def arrange(self, batch: Batch) -> Batch:
        """`batch` in the memory format of the activations."""
        return to_channels_last(batch) if self.channels_last else batch

    def bits_gained(self) -> int:
        """By how many bits a number is longer in the passes than in the model."""
        return torch.finfo(self.dtype).bits - torch.finfo(self.observation.output.dtype).bits

    @property
    def plan(self) -> Plan:
        """What was done."""
        seen = self.observation
        taps = tuple(planned_tap(layer, self.taps.points[layer], self.taps.axes.of(layer), shapes[0], seen.samples,
                                 self.dtype) for layer, shapes in seen.shapes.items())
        layers = self.layers
        packed, not_packed, quarter, added = ({}, {}, set(), set()) if layers is None else \
            (layers.packed, layers.not_packed, layers.winograd, layers.added)
        return Plan(taps, self.folding.folded, self.folding.not_folded, packed, not_packed,
                    tuple(name for name in packed if name in quarter), tuple(name for name in packed if name in added),
                    described(self.dtype, seen.output.device),
                    "channels_last" if self.channels_last else "contiguous", self.compiled,
                    serving(seen.output.device))


def prepare(eval_model: nn.Module, taps: Taps, normalized_by: Mapping[str, str], example: Batch, forward: Forward,
            precision: str | None = None, compiled: bool = False, samples: Batch | None = None) -> Prepared:
    """Make an evaluation copy fast, in place; it runs two to four times, and taps on it may be moved.

    normalized_by: layer -> the BatchNorm that alone reads its output. example: a batch. precision: None as the copy is,
    or a name in PRECISIONS; outputs are float32 then, and so is what follows. compiled: through torch.compile, for
    batches of the size of the first; others run as they are. samples: two, where the example is one: a view can join
    channels with the samples where there is but one of them. Raises ValueError, naming the layer, where one cannot take
    the precision, or is called twice and compiled.
    """
    for weight in taps.weights.values():
        weight.requires_grad_()
    prepared = Prepared(eval_model, taps, example, checked_forward(forward), normalized_by, precision, compiled,
                        samples)
    for stage in STAGES:
        stage(prepared)
    return prepared


def _observe(prepared: Prepared) -> None:
    """See what one pass shows, and move taps to where they read less."""
    rng.start_over(device_of(prepared.copy))
    seen = observe(prepared.copy, prepared.taps, prepared.example, prepared.forward)
    for layer, (point, shape) in seen.earlier.items():
        prepared.taps.points[layer] = point
        seen.shapes[layer] = [shape]
    prepared.observation = seen
    prepared.dtype = PRECISIONS[prepared.precision] if prepared.precision else seen.output.dtype
    prepared.unfolded = {
        name: (layer.weight.detach(), None if layer.bias is None else layer.bias.detach())
        for name, layer in prepared.copy.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))}


def _cast_up(prepared: Prepared) -> None:
    """To a wider precision before folding: folded weights are rounded once, to the finer of the two."""
    if prepared.precision and prepared.bits_gained() > 0:
        cast(prepared.copy, prepared.dtype)


def _fold(prepared: Prepared) -> None:
    """BatchNorms, into the layers before them."""
    # a filter's own gradient is read from filters as they are: folding changes them
    normalized_by = {} if prepared.taps.weights else prepared.normalized_by
    prepared.folding = Folding(prepared.copy, normalized_by, prepared.observation.flat,
                               None if prepared.compiled else prepared.ahead)


def _channels_last(prepared: Prepared) -> None:
    """The memory format that convolutions are fastest in."""
    prepared.channels_last = any(isinstance(module, nn.Conv2d) for module in prepared.copy.modules())
    if not prepared.channels_last:
        return
    for module in prepared.copy.modules():
        if isinstance(module, nn.modules.conv._ConvNd):  # other tensors may be read by code as they lie in memory
            prepared.formats += [(parameter, parameter.data) for parameter in module._parameters.values()
                                 if parameter is not None]
            module._apply(to_channels_last, recurse=False)  # Module.to() would refuse a parameter of five dimensions


def _pack(prepared: Prepared) -> None:
    """Layers' weights, for both directions; weights that are to be rounded are packed once they are (cast down)."""
    if prepared.bits_gained() >= 0:
        prepared.layers = _packed(prepared)


def _packed(prepared: Prepared) -> FusedLayers | None:
    if prepared.compiled or prepared.taps.weights or not prepared.any_format:
        return None
    return FusedLayers(prepared.copy, prepared.taps, prepared.observation.clamps, prepared.folding.folded,
                       prepared.observation.inputs, prepared.observation.sums, prepared.observation.relus,
                       prepared.ahead)


def _verify_or_undo(prepared: Prepared) -> None:
    """Everything back as it was, where the output became another one."""
    if prepared.folding.folded or prepared.layers is not None or prepared.channels_last:
        fault = _fault(prepared)
        if fault == _STOPS and prepared.channels_last:  # a view, say, of what lies otherwise in memory
            _undo_format(prepared)
            fault = _fault(prepared)
        if fault:
            if prepared.layers is not None:
                prepared.layers.undo(fault)
            prepared.folding.undo(fault)
            if prepared.channels_last and _fault(prepared):
                _undo_format(prepared)
    prepared.folding.make_permanent()
    prepared.formats.clear()


_STOPS = "the model did not run afterwards"


def _fault(prepared: Prepared) -> str:
    """What is wrong with the output since the copy was changed; nothing where it is as it was."""
    rng.start_over(device_of(prepared.copy))  # whatever is drawn, is drawn again
    try:
        with torch.no_grad():
            output = prepared.forward(prepared.copy, prepared.arrange(prepared.example))
            if prepared.channels_last and prepared.samples is not None:
                prepared.forward(prepared.copy, prepared.arrange(prepared.samples))
    except Exception:  # of the model's code
        return _STOPS
    before = prepared.observation.output
    half_the_digits: float = torch.finfo(before.dtype).eps ** 0.5
    return "" if all_close(output.to(before.dtype), before, rounding=half_the_digits) else \
        "the model's output was another one afterwards"


def _undo_format(prepared: Prepared) -> None:
    """Layers as they lay in memory, and none that would hand on anything else."""
    if prepared.layers is not None:
        prepared.layers.undo("the model's code depends on where numbers lie in memory")
    for parameter, data in prepared.formats:
        parameter.data = data
    prepared.channels_last = prepared.any_format = False


def _cast_down(prepared: Prepared) -> None:
    """To the precision asked for, where that is no wider; packed layers, of which none can be undone now, let go."""
    if prepared.precision and prepared.bits_gained() <= 0:
        cast(prepared.copy, prepared.dtype)
    if prepared.bits_gained() < 0:
        prepared.layers = _packed(prepared)
    if prepared.layers is not None:
        prepared.layers.release(prepared.copy, prepared.unfolded)
    prepared.unfolded.clear()
    if prepared.precision:
        check_runs(prepared.copy, prepared.arrange(prepared.example), prepared.forward, prepared.precision)


def _mend_gradients(prepared: Prepared) -> None:
    """PyTorch's BatchNorm, on a CPU, sends back a wrong gradient of a single sample from tokens: where what it is given
    is [1, C, H, W] in memory as [H, W, C], and its input is not. It is given the same numbers in the input's order."""
    if prepared.compiled:
        return

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if len(output) == 1 and output.dim() > 2 and output.requires_grad and output.device.type == "cpu" \
                and output.is_contiguous():
            output.register_hook(lambda gradient: None if gradient is None else gradient.contiguous())

    for name, module in prepared.copy.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and name not in prepared.folding.folded:
            module.register_forward_hook(OwnHook(hook))


def _compile(prepared: Prepared) -> None:
    """Through torch.compile, taps included."""
    if prepared.compiled:
        seen = prepared.observation
        compile_tapped(prepared.copy, prepared.taps, seen.shapes, seen.samples, prepared.dtype)


STAGES: tuple[Callable[[Prepared], None], ...] = (
    _observe, _cast_up, _fold, _channels_last, _pack, _verify_or_undo, _cast_down, _mend_gradients, _compile)
