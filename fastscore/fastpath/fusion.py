"""The fast layers of an evaluation copy on a CPU: weights packed, a clamp taken into the layer before it, and the
clamp's way back taken into the tap behind it."""

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastscore.fastpath import packed_layers
from fastscore.fastpath.packed_layers import ClampBounds
from fastscore.modules.evaluation_copy import parametrized
from fastscore.modules.multihead_attention import MultiheadAttention, SequenceFirstLinear
from fastscore.taps.measures import unclamped
from fastscore.taps.taps import FusedTap, Taps

LAYERS = (nn.Conv2d, nn.Linear, SequenceFirstLinear)  # exact types, as the others
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
CLAMPS = (nn.ReLU, nn.ReLU6, nn.Hardtanh)


class _Packed(torch.autograd.Function):
    """x -> layer(x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: packed_layers.Layer) -> Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        return layer.forward(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return ctx.layer.backward(g, ctx.shape), None


class _Clamped(torch.autograd.Function):
    """(x, gate) -> layer(x), which ends in a clamp, twice: for the other readers, and for a tap."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, layer: packed_layers.Layer, bounds: ClampBounds, taps: Taps
                ) -> tuple[Tensor, Tensor]:
        y = layer.forward(x)
        if y is x:
            ctx.mark_dirty(x)
        ctx.save_for_backward(y)
        ctx.set_materialize_grads(False)
        ctx.layer, ctx.shape, ctx.taps = layer, x.shape, taps
        ctx.bounds = torch.tensor(bounds, dtype=y.dtype).tolist()  # as y holds them
        return y, y.detach()

    @staticmethod
    def backward(ctx: Any, rest: Tensor | None, tapped: Tensor | None
                 ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        (y,) = ctx.saved_tensors
        if tapped is None:
            g, measured = None if rest is None else unclamped(rest, y, ctx.bounds), None
        else:
            g, measured = ctx.taps.measure.clamped(y, tapped, rest, ctx.bounds)
        return None if g is None else ctx.layer.backward(g, ctx.shape), measured, None, None, None


class FusedLayers:
    """The forward passes of an evaluation copy's layers, as packed layers run them; `undo` brings back their own.

    taps: on the copy; a clamp publishes a tap on its output. clamps: module -> the bounds of the clamp that alone reads
    its output. folded: BatchNorm -> the layer that it went into. inputs: Conv2d or Linear -> shape of its input.
    packed: Conv2d and Linear -> the clamp that they end in, or None. not_packed: those that run as they are -> why.
    """

    def __init__(self, model: nn.Module, taps: Taps, clamps: Mapping[str, ClampBounds], folded: Mapping[str, str],
                 inputs: Mapping[str, tuple[int, ...]]) -> None:
        self.packed: dict[str, ClampBounds | None] = {}
        self.not_packed: dict[str, str] = {}
        self._taps: Taps = weakref.proxy(taps)  # which hold the model, whose layers hold what is made here
        self._changed: list[tuple[nn.Module, str]] = []
        self._rectified: Callable[[], Tensor | None] = lambda: None  # what a layer has clamped already, last
        bounds = {layer: clamps[norm] for norm, layer in folded.items() if norm in clamps} | dict(clamps)
        for name, module in model.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                reason = _why_not(module, inputs.get(name))
                if reason is not None:
                    self.not_packed[name] = reason
                    continue
                self.packed[name] = clamp = bounds.get(name)
                packed = packed_layers.Convolution(module, inputs[name][2:], clamp) if type(module) is nn.Conv2d \
                    else packed_layers.Linear(module.weight, module.bias, clamp)
                self._run(module, packed, clamp)
            elif type(module) in NORMS and name not in folded and _plain(module):
                self._run(module, packed_layers.BatchNorm(module, bounds.get(name)), bounds.get(name))
            elif type(module) is MultiheadAttention and module.in_proj_weight is not None \
                    and f"{name}.out_proj".lstrip(".") in inputs and packed_layers.available(module.in_proj_weight):
                self._run(module, packed_layers.Linear(module.in_proj_weight, module.in_proj_bias), function="in_proj")
            elif type(module) in CLAMPS and "forward" not in vars(module):
                self._clamp(module, clamp_bounds(module))

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

    def _replace(self, module: nn.Module, name: str, function: Callable[[Tensor], Tensor]) -> None:
        self._changed.append((module, name))
        vars(module)[name] = function

    def _run(self, module: nn.Module, layer: packed_layers.Layer, clamp: ClampBounds | None = None,
             function: str = "forward") -> None:
        self._replace(module, function, self._packed_forward(layer) if clamp is None
                      else self._packed_clamped_forward(layer, clamp))

    def _packed_forward(self, layer: packed_layers.Layer) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            y: Tensor = _Packed.apply(self._taps.claim(x), layer) if _in_graph(x) else layer.forward(x)
            return y

        return run

    def _packed_clamped_forward(self, layer: packed_layers.Layer, clamp: ClampBounds) -> Callable[[Tensor], Tensor]:
        """The module of the clamp, behind this one, has nothing left to do."""

        def run(x: Tensor) -> Tensor:
            y = self._with_tap(self._taps.claim(x), layer, clamp)
            self._rectified = weakref.ref(y)
            return y

        return run

    def _clamp(self, module: Any, bounds: ClampBounds) -> None:
        layer = packed_layers.Clamp(bounds, bool(module.inplace))

        def run(x: Tensor) -> Tensor:
            if x is self._rectified():
                return x
            if layer.in_place and x._is_view():  # which autograd lets no function change that returns two tensors
                return layer.forward(x)
            return self._with_tap(x, layer, bounds)

        self._replace(module, "forward", run)

    def _with_tap(self, x: Tensor, layer: packed_layers.Layer, bounds: ClampBounds) -> Tensor:
        if not _in_graph(x):
            return layer.forward(x)
        gate = self._taps.gate(len(x), layer.channels(x), x)
        y, tapped = _Clamped.apply(x, gate, layer, bounds, self._taps)
        # a packed layer sends back a gradient that nothing else holds: it may be written to
        self._taps.publish(FusedTap(y, tapped, gate, self.packed))
        rest: Tensor = y
        return rest


def _in_graph(x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()


def clamp_bounds(module: Any) -> ClampBounds:
    """Of a module whose type is in CLAMPS."""
    return (0.0, float("inf")) if type(module) is nn.ReLU else (float(module.min_val), float(module.max_val))


def _plain(norm: Any) -> bool:
    """Whether a BatchNorm takes its running statistics, and computes nothing else."""
    return not norm.training and norm.running_mean is not None and not parametrized(norm) \
        and "forward" not in vars(norm)


def _why_not(layer: Any, shape: tuple[int, ...] | None) -> str | None:
    """Why `layer` cannot be packed; None where it can. shape: of its input, if it has run."""
    checks = (
        (parametrized(layer), "its weight is computed (a parametrization)"),
        (type(layer) not in LAYERS, f"{type(layer).__name__} may do more than its base class"),
        ("forward" in vars(layer), "its forward() is the model's own"),
        (not packed_layers.available(layer.weight),
         f"there is no oneDNN for {layer.weight.dtype} on {layer.weight.device}"),
        (shape is None, "it has not run in its weight's own dtype"),
        (type(layer) is nn.Conv2d and len(shape or ()) != 4, "it does not run on [N, C, H, W]"),
        (getattr(layer, "padding_mode", "zeros") != "zeros", "its padding is not of zeros"),
        (isinstance(getattr(layer, "padding", ()), str), "its padding is given by a word"),
    )
    return next((reason for holds, reason in checks if holds), None)
