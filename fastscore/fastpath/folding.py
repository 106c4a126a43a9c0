"""BatchNorms folded into the layers before them. The input of every Conv and Linear stays as it was, to rounding."""

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastscore.batches.devices import with_float64
from fastscore.fastpath.done_ahead import DoneAhead
from fastscore.modules.hooks import OwnHook
from fastscore.modules.inspection import hooked, parametrized

# exact types: a subclass may do anything
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_AT_ONCE = 2 ** 15  # elements of a weight that are float64 at a time


class Folding:
    """BatchNorms folded into the weights of the layers before them, in place; `undo` brings everything back.

    model: an evaluation copy. normalized_by: layer -> the BatchNorm that alone reads its output. flat: Linear layers
    whose output is [N, C]; behind others a BatchNorm normalises another dimension. ahead: where what layers have made
    waits for the BatchNorms that they hold; None of a copy that is compiled, which does not go other ways unseen.
    folded: BatchNorm -> the layer that it went into. not_folded: BatchNorm -> why it stays.

    In evaluation mode BatchNorm is affine for each channel, so folding is exact. The modules stay the same objects,
    whatever other names or lists the model has them in.
    """

    def __init__(self, model: nn.Module, normalized_by: Mapping[str, str], flat: Collection[str],
                 ahead: DoneAhead | None = None) -> None:
        self._ahead = ahead
        self._hooks: list[RemovableHandle] = []
        self.folded: dict[str, str] = {}
        self.not_folded = {
            name: "no layer that it alone reads comes before it" for name, module in model.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and name not in normalized_by.values()}
        self._before: list[tuple[nn.Module, nn.Module, Tensor, nn.Parameter | None]] = []
        for layer_name, norm_name in normalized_by.items():
            layer, norm = model.get_submodule(layer_name), model.get_submodule(norm_name)
            reason = _why_not(layer, norm, layer_name in flat)
            if reason is None:
                self.folded[norm_name] = layer_name
                self._fold(layer_name, layer, norm)
            elif isinstance(norm, nn.modules.batchnorm._BatchNorm):
                self.not_folded[norm_name] = reason

    def _fold(self, name: str, layer: Any, norm: Any) -> None:
        self._before.append((layer, norm, layer.weight, layer.bias))
        weight, mean, variance = (with_float64(x.detach()) for x in (layer.weight, norm.running_mean, norm.running_var))
        bias, factor, offset = (None if x is None else with_float64(x.detach())
                                for x in (layer.bias, norm.weight, norm.bias))
        scale = (variance.double() + norm.eps).rsqrt()
        shift = -mean.double() if bias is None else bias - mean.double()
        scale = scale if factor is None else scale * factor
        shift = shift * scale if offset is None else shift * scale + offset
        groups = layer.groups if getattr(layer, "transposed", False) else None  # then [in, out / groups, ...]
        rows = weight.flatten(1) if groups is None else weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
        rows = _scaled(rows, scale.reshape(-1, *[1] * (rows.dim() - 1)))
        new = rows.reshape(weight.shape) if groups is None else \
            rows.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
        device = layer.weight.device
        layer.weight = nn.Parameter(new.to(device), requires_grad=False)
        layer.bias = nn.Parameter(shift.to(weight.dtype).to(device), requires_grad=False)
        vars(norm)["forward"] = _identity if self._ahead is None else partial(_identity, ahead=self._ahead)
        if self._ahead is not None:
            self._hooks.append(layer.register_forward_hook(OwnHook(partial(_note, self._ahead, name))))

    def undo(self, reason: str) -> None:
        """Everything as it was before; `reason` becomes why."""
        for layer, norm, weight, bias in self._before:
            layer.weight, layer.bias = weight, bias  # type: ignore[assignment]
            del vars(norm)["forward"]
        for hook in self._hooks:
            hook.remove()
        self.not_folded |= dict.fromkeys(self.folded, reason)
        self.folded.clear()
        self._before.clear()

    def make_permanent(self) -> None:
        """Let go of what `undo` would bring back."""
        self._before.clear()


def _scaled(rows: Tensor, scale: Tensor) -> Tensor:
    """rows * scale, computed in float64 and rounded once; a few rows at a time, as a copy of all would be twice as
    large, and PyTorch takes twice as long for a product of two dtypes."""
    scaled, few = torch.empty_like(rows), max(_AT_ONCE // max(rows[:1].numel(), 1), 1)
    for some, by, made in zip(rows.split(few), scale.split(few), scaled.split(few), strict=True):
        made.copy_(some.double() * by)
    return scaled


def _note(ahead: DoneAhead, name: str, layer: nn.Module, args: Any, output: Tensor) -> None:
    ahead.add(name, "BatchNorm", output)


def _identity(input: Tensor, ahead: DoneAhead | None = None) -> Tensor:  # as BatchNorm calls it, or code by keyword
    if ahead is not None:
        ahead.take("BatchNorm", input)
    return input


def _why_not(layer: nn.Module, norm: nn.Module, flat: bool) -> str | None:
    """Why `norm` cannot be folded into `layer`; None where it can."""
    kind = type(norm).__name__
    checks = (
        (parametrized(layer) or parametrized(norm), "a weight is computed (a parametrization)"),
        (type(norm) not in _NORMS, f"{kind} may do more than a BatchNorm"),
        (getattr(norm, "running_mean", None) is None, "it keeps no running statistics"),
        (norm.training, "it stays in training mode"),
        (type(layer) not in (*_CONVOLUTIONS, nn.Linear), f"{type(layer).__name__} may do more than its base class"),
        (type(layer) is nn.Linear and not flat, "it normalises another dimension than a Linear's channels"),
        (hooked(layer) or hooked(norm), "the model has hooks of its own there"),
    )
    return next((reason for holds, reason in checks if holds), None)
