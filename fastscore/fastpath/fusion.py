"""Which layers of an evaluation copy run packed on a CPU or fused by cuDNN, and which clamp goes into which layer."""

import weakref
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastscore.fastpath import cudnn_layers, packed_layers, winograd
from fastscore.fastpath.deferred import Work, computed, deferred
from fastscore.fastpath.done_ahead import DoneAhead
from fastscore.fastpath.fused_taps import clamped, packed
from fastscore.fastpath.packed_layers import RELU, ClampBounds
from fastscore.modules.attention.multihead_attention import SequenceFirstLinear
from fastscore.modules.attention.projections import ProjectionLinear
from fastscore.modules.hooks import has_users_hooks
from fastscore.modules.inspection import parametrized
from fastscore.ops.backends import portable
from fastscore.taps.taps import Taps

LAYERS = (nn.Conv2d, nn.Linear, SequenceFirstLinear, ProjectionLinear)  # exact types, as the others
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
CONVOLUTIONS = (packed_layers.Convolution, winograd.Convolution)
CLAMPS = (nn.ReLU, nn.ReLU6, nn.Hardtanh)


class FusedLayers:
    """The forward passes of an evaluation copy's layers, as packed layers run them; `undo` brings back their own.

    taps: on the copy; a clamp publishes a tap on its output. clamps: module -> the bounds of the clamp that alone reads
    its output. folded: BatchNorm -> the layer that it went into. inputs: Conv2d or Linear -> shape of its input.
    sums: module -> the bounds of the clamp that alone reads the sum which alone reads the module's output.
    relus: modules whose output a ReLU alone reads that is no module. ahead: where clamps that layers have taken wait
    for the modules that they are.
    packed: Conv2d and Linear -> the clamp that they end in, or None. winograd: of these, the convolutions that take a
    quarter of the products. added: those that have waited for what is added to
    their output, and taken the ReLU of the sum. not_packed: those that run as they are -> why.
    """

    def __init__(self, model: nn.Module, taps: Taps, clamps: Mapping[str, ClampBounds], folded: Mapping[str, str],
                 inputs: Mapping[str, tuple[int, ...]], sums: Mapping[str, ClampBounds],
                 relus: Collection[str], ahead: DoneAhead) -> None:
        self.packed: dict[str, ClampBounds | None] = {}
        self.winograd: set[str] = set()
        self.added: set[str] = set()
        self.not_packed: dict[str, str] = {}
        self._taps: Taps = weakref.proxy(taps)  # which hold the model, whose layers hold what is made here
        self._changed: list[tuple[nn.Module, str]] = []
        # what sends back a gradient that nothing else holds
        self._readers = {
            name for name, module in model.named_modules() if type(module) in LAYERS
            and not has_users_hooks(module) and not parametrized(module) and "forward" not in vars(module)}
        self._ahead = ahead
        bounds, sums = (dict(found) | {layer: found[norm] for norm, layer in folded.items() if norm in found}
                        for found in (clamps, sums))
        relus = {*relus, *(layer for norm, layer in folded.items() if norm in relus)}
        for name, module in model.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                reason, clamp = _why_not(module, inputs.get(name), bounds.get(name)), bounds.get(name)
                if reason is not None:
                    self.not_packed[name] = reason
                    self._arrange(module)
                    continue
                self.packed[name] = clamp
                layer = _fast(module, inputs[name], clamp, name not in taps.points)  # where a tap sees NaN
                if isinstance(layer, winograd.Convolution):
                    self.winograd.add(name)
                if sums.get(name) == RELU and clamp is None and packed_layers.adds(layer):
                    self._replace(module, "forward", self._deferred_forward(self._with_addition(name, layer)))
                elif name in relus and clamp is None and isinstance(layer, CONVOLUTIONS):
                    self._replace(module, "forward", self._deferred_forward(self._with_relu(name, layer)))
                else:
                    self._run(name, module, layer, clamp)
            elif type(module) in NORMS and name not in folded and _plain(module):
                self._run(name, module, packed_layers.BatchNorm(module, bounds.get(name)), bounds.get(name))
            elif type(module) in CLAMPS and "forward" not in vars(module):
                self._clamp(module, clamp_bounds(module))
            elif isinstance(module, nn.ConvTranspose2d):
                self._arrange(module)

    def release(self, model: nn.Module, before: Mapping[str, tuple[Tensor, Tensor | None]]) -> None:
        """Let the packed layers hold the weights that they had, which take no memory of their own; for good."""
        self._changed.clear()
        for name in self.packed:
            layer: Any = model.get_submodule(name)
            weight, bias = before[name]
            layer.weight = nn.Parameter(weight, requires_grad=False)
            layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def undo(self, reason: str) -> None:
        """Everything as it was before; `reason` becomes why."""
        for module, name in self._changed:
            del vars(module)[name]
        self._changed.clear()
        self.not_packed |= dict.fromkeys(self.packed, reason)
        self.packed.clear()
        self.winograd.clear()
        self.added.clear()

    def _replace(self, module: nn.Module, name: str, function: Callable[[Tensor], Tensor]) -> None:
        self._changed.append((module, name))
        vars(module)[name] = function

    def _run(self, name: str, module: nn.Module, layer: packed_layers.Layer, clamp: ClampBounds | None) -> None:
        self._replace(module, "forward", self._packed_forward(layer) if clamp is None
                      else self._packed_clamped_forward(name, layer, clamp))

    def _packed_forward(self, layer: packed_layers.Layer) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            return packed(x, layer, self._taps)

        return run

    def _deferred_forward(self, work: Work) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            x = self._taps.claim(x)
            return work.compute(x, None) if x.is_inference() else deferred(x, work)

        return run

    def _with_addition(self, name: str, layer: Any) -> Work:
        """The module of the ReLU, behind the addition, has nothing left to do."""

        def add(x: Tensor, other: Tensor, into: Tensor | None) -> Tensor | None:
            if not layer.takes(x, other):
                return None
            y = clamped(x, layer, RELU, self._taps, self._readers, other, into)
            self._ahead.add(name, "clamp", y)
            self.added.add(name)
            return y

        return Work(name, partial(self._unclamped, layer), add=add)

    def _with_relu(self, name: str, layer: packed_layers.Convolution | winograd.Convolution) -> Work:
        """The code calls a ReLU behind it that is no module, and takes what this has made with one."""
        rectified = layer.rectified()

        def relu(x: Tensor, into: Tensor | None) -> Tensor:
            self.packed[name] = RELU
            return clamped(x, rectified, RELU, self._taps, self._readers, into=into)

        return Work(name, partial(self._unclamped, layer), relu=relu)

    def _unclamped(self, layer: packed_layers.Layer, x: Tensor, into: Tensor | None) -> Tensor:
        return packed(x, layer, self._taps, into)

    def _packed_clamped_forward(self, name: str, layer: packed_layers.Layer, clamp: ClampBounds
                                ) -> Callable[[Tensor], Tensor]:
        """The module of the clamp, behind this one, has nothing left to do."""

        def run(x: Tensor) -> Tensor:
            y = clamped(self._taps.claim(x), layer, clamp, self._taps, self._readers)
            self._ahead.add(name, "clamp", y)
            return y

        return run

    def _arrange(self, module: nn.Module) -> None:
        """A convolution that runs as it is gets gradients in its output's memory format: of two, a GPU's kernels
        would turn its input, too."""
        if isinstance(module, nn.Linear) or "forward" in vars(module):
            return
        plain = module.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            y = plain(*args, **kwargs)
            if _in_channels_last(y) and y.requires_grad:
                y.register_hook(_to_channels_last)
            return y

        self._replace(module, "forward", run)

    def _clamp(self, module: Any, bounds: ClampBounds) -> None:
        layer = packed_layers.Clamp(bounds, bool(module.inplace))

        def run(x: Tensor) -> Tensor:
            x = computed(x)
            if self._ahead.take("clamp", x):
                return x
            if layer.in_place and x._is_view():  # which autograd lets no function change that returns two tensors
                return layer.forward(x)
            return clamped(x, layer, bounds, self._taps, self._readers)

        self._replace(module, "forward", run)


def _in_channels_last(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)


def _to_channels_last(g: Tensor | None) -> Tensor | None:
    """`g` where channels lie closer together than columns, be it in a part of a larger tensor; else a copy. None, which
    a function behind may send for zeros, stays."""
    return g if g is None or 0 < g.stride(1) < g.stride(3) else g.contiguous(memory_format=torch.channels_last)


def clamp_bounds(module: Any) -> ClampBounds:
    """Of a module whose type is in CLAMPS."""
    return (0.0, float("inf")) if type(module) is nn.ReLU else (float(module.min_val), float(module.max_val))


def _plain(norm: Any) -> bool:
    """Whether a BatchNorm takes its running statistics, and computes nothing else."""
    return not norm.training and norm.running_mean is not None and not parametrized(norm) \
        and "forward" not in vars(norm)


def _fast(layer: Any, shape: tuple[int, ...], clamp: ClampBounds | None, keeps_nan: bool) -> packed_layers.Layer:
    """`layer`, for which `_why_not` has no reason, for inputs of `shape`."""
    if cudnn_layers.available(layer, clamp):
        return cudnn_layers.Convolution(layer)
    if winograd.takes(layer, shape[2:]):
        return winograd.Convolution(layer, clamp)
    return packed_layers.Convolution(layer, shape[2:], clamp, keeps_nan) if type(layer) is nn.Conv2d else \
        packed_layers.Linear(layer.weight, layer.bias, clamp, keeps_nan)


def _why_not(layer: Any, shape: tuple[int, ...] | None, clamp: ClampBounds | None) -> str | None:
    """Why `layer` cannot be packed; None where it can. shape: of its input, if it has run. clamp: what it ends in."""
    checks = (
        (parametrized(layer), "its weight is computed (a parametrization)"),
        (type(layer) not in LAYERS, f"{type(layer).__name__} may do more than its base class"),
        ("forward" in vars(layer), "its forward() is the model's own"),
        (portable(), "FASTSCORE_PORTABLE=1 asks for the path of a GPU"),
        (not packed_layers.available(layer.weight) and not cudnn_layers.available(layer, clamp),
         f"there is no oneDNN for {layer.weight.dtype} on {layer.weight.device}"
         + ", and cuDNN fuses no more than a convolution and its ReLU" * layer.weight.is_cuda),
        (shape is None, "it has not run in its weight's own dtype"),
        (type(layer) is nn.Conv2d and len(shape or ()) != 4, "it does not run on [N, C, H, W]"),
        (getattr(layer, "padding_mode", "zeros") != "zeros", "its padding is not of zeros"),
        (isinstance(getattr(layer, "padding", ()), str), "its padding is given by a word"),
    )
    return next((reason for holds, reason in checks if holds), None)
