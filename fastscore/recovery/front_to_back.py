"""Runs a dense network and a smaller one side by side, and refits the smaller one's layers on the way.

Passes over all batches halt at one layer after another, in both networks; there the layer is fitted (see
fastscore.recovery.asymmetric), and the passes go on through what it has become. That is one pass of each network over
the samples, whatever the number of layers. Early layers, whose activations are large and whose weights are few, are
fitted on fewer samples than there are: as many as MEMORY holds.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn

from fastscore.batches.calls import Forward
from fastscore.batches.devices import with_float64
from fastscore.batches.parts import Batch, valid_tokens
from fastscore.graph.cutting.surgery import RemovedIndices, removed_branches
from fastscore.modules.hooks import input_of, put_on
from fastscore.modules.inspection import device_of
from fastscore.recovery.asymmetric import RIDGES, WIDEST, Joint, bias, error, fit, rescaled
from fastscore.recovery.calibration import Calibration, Part
from fastscore.recovery.lockstep import Lockstep, Pass
from fastscore.recovery.moments import POSITIONS
from fastscore.recovery.rows import (
    blocks_of,
    has_lost_places,
    is_product,
    made_rows,
    read_rows,
    set_weight_rows,
    weight_rows,
)
from fastscore.recovery.shortcuts import Shortcut, shortcuts

MEMORY = 3 << 27  # bytes of a layer's inputs and outputs that passes may hold while they halt
FEWEST = 64  # samples, whatever they hold
ROWS = 20_000, 256  # as many are enough, and so many for each input of an output: fewer places of each sample do


@dataclass(frozen=True)
class Site:
    """A layer that can be refitted. kept: bool [C_out] of the dense one's outputs. norm: the BatchNorm that takes the
    layer's bias over, None where none does. bytes: of its input and output, for a sample."""

    kept: Tensor
    norm: str | None
    shortcut: Shortcut | None
    bytes: int


def sites(dense: nn.Module, example: Batch, forward: Forward, removed: RemovedIndices,
          normalized_by: Mapping[str, str]) -> dict[str, Site]:
    """The layers that can be refitted, in the order they run, from the first that has lost inputs, or that was in a
    branch which went.

    Those that are called several times, are no plain matrix product, or compute their weights keep what they have. So
    does one that runs while parameters are others than at rest, as within torch.func.functional_call: it is not what is
    set there, and a pass that halts there would leave them to the passes of other batches. dense: an evaluation copy.
    """
    found: dict[str, Site] = {}
    calls: dict[str, int] = {}
    layers = {name: layer for name, layer in dense.named_modules()
              if isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd))}
    modules = dict(dense.named_modules())
    at_rest = [(module._parameters, name, parameter) for module in dense.modules()
               for name, parameter in module._parameters.items()]

    def look(name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> None:
        calls[name] = calls.get(name, 0) + 1
        x = input_of(args, kwargs)
        if all(held.get(key) is parameter for held, key, parameter in at_rest) and is_product(layer, x, y):
            kept = torch.ones(len(weight_rows(layer).flatten(0, 1)), dtype=torch.bool)
            if (name, "outputs") in removed:
                kept[removed[name, "outputs"]] = False
            norm = normalized_by.get(name)
            if layer.bias is not None or norm is None or modules[norm].running_mean is None:
                norm = None
            size = sum(tensor.numel() * tensor.element_size() for tensor in (x, y))
            found[name] = Site(kept, norm, None, size // max(len(x), 1))

    with put_on(layer.register_forward_hook(partial(look, name), with_kwargs=True) for name, layer in layers.items()):
        beside = shortcuts(dense, lambda: forward(dense, example), normalized_by)
    order = list(found)
    gone = removed_branches(removed)
    lost = [number for number, name in enumerate(order) if (name, "inputs") in removed or gone(name)]
    beside = {name: shortcut for name, shortcut in beside.items() if not gone(shortcut.module)}
    return {name: Site(found[name].kept, found[name].norm, beside.get(name), found[name].bytes)
            for name in order[min(lost, default=len(order)):]
            if calls[name] == 1 and not hasattr(modules[name], "parametrizations") and not gone(name)}


class _Run:
    """Both networks' passes over the batches of one part."""

    def __init__(self, batches: Iterator[tuple[int, Batch]], dense: Lockstep, small: Lockstep) -> None:
        self._batches, self._dense, self._small = batches, dense, small
        self._passes: list[tuple[Pass, Pass, Tensor | None]] = []
        self._next: tuple[int, Batch] | None = next(batches, None)

    def rows(self, name: str, site: Site, batches: float, places: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(what the layer reads, what the dense one makes) of each batch whose number is below `batches`; where there
        is a shortcut, what it should make follows on what the dense one makes, in each block."""
        while self._next is not None and self._next[0] < batches:
            batch = self._next[1]
            self._passes.append((self._dense.begin(batch), self._small.begin(batch), valid_tokens(batch)))
            self._next = next(self._batches, None)
        for dense, small, valid in self._passes:
            y, x = dense.to(name), small.to(name)
            layer = self._small.model.get_submodule(name)
            if x is None or y is None or has_lost_places(layer, x, y):
                continue
            made = made_rows(layer, y, valid, places)[:, site.kept.to(y.device)]
            targets = made.unflatten(1, (blocks_of(layer), -1))
            if site.shortcut is not None:
                owed = made + self._owed(name, site, dense, small, valid, y.shape, places)
                targets = torch.cat([targets, owed.unflatten(1, (blocks_of(layer), -1))], 2)
            yield read_rows(layer, x, valid, places), targets

    def _owed(self, name: str, site: Site, dense: Pass, small: Pass, valid: Tensor | None, shape: torch.Size,
              places: int) -> Tensor | float:
        """What the shortcut has lost, in units of the layer's output."""
        assert site.shortcut is not None
        layer = self._small.model.get_submodule(name)
        one, other = dense.seen.pop(name, None), small.seen.pop(name, None)
        if one is None or other is None or one.shape != shape:
            return 0.0
        lost = made_rows(layer, one, valid, places)[:, site.kept.to(one.device)] - \
            made_rows(layer, other, valid, places)
        if site.shortcut.norm is None:
            return lost
        norm: Any = self._small.model.get_submodule(site.shortcut.norm)
        scale = (norm.running_var + norm.eps).rsqrt() * (1.0 if norm.weight is None else norm.weight)
        scale = torch.where(scale.abs() < 1e-3 * scale.abs().max(), math.inf, scale)
        owed: Tensor = lost / scale
        return owed


def refit(dense: nn.Module, small: nn.Module, where: Mapping[str, Site], calibration: Calibration, part: Part,
          ridges: dict[str, float], forward: Forward, process_group: distributed.ProcessGroup | None) -> None:
    """Refit the layers `where` (see `sites`) says of `small`, in place; those that have no bias, nor a norm for it, get
    none.

    dense, small: in evaluation mode. calibration: its `part` fits. ridges: layer -> its ridge; those that are not there
    are chosen by the samples held out, and written there.
    """
    device = device_of(small)
    limits = _limits(where, calibration)
    watched = {name: site.shortcut for name, site in where.items() if site.shortcut is not None}
    layers = list(where)

    def lockstep(model: nn.Module, side: Any) -> Lockstep:
        by_place: dict[tuple[str, Any], list[str]] = {}
        for name, shortcut in watched.items():
            by_place.setdefault((shortcut.module, shortcut.side), []).append(name)
        return Lockstep(model, forward, side, layers, by_place)

    choosing = any(name not in ridges for name in where)
    with ExitStack() as stack:
        both = stack.enter_context(lockstep(dense, "output")), stack.enter_context(lockstep(small, "input"))
        runs = [_Run(calibration.numbered(each), *both) for each in ([part, "held out"] if choosing else [part])]
        for name, site in where.items():
            layer: Any = small.get_submodule(name)
            weights = weight_rows(layer).cpu()
            wide = weights.shape[2] > WIDEST
            start = weights.new_ones(weights[..., 0].numel(), 1, 1) if wide else weights
            asked = slice(start.shape[1] if site.shortcut is not None and not wide else 0, None)
            start = start.repeat(1, 2 if asked.start else 1, 1)
            samples = max(min(limits[name] * calibration.size, calibration.samples), 1)
            places = min(math.ceil(max(ROWS[0], ROWS[1] * weights.shape[2]) / samples), POSITIONS)
            joints = [Joint.empty(len(start), start.shape[2], start.shape[1]) for _ in runs]
            for run, joint in zip(runs, joints, strict=True):
                for x, t in run.rows(name, site, limits[name], places):
                    if wide:  # what it makes of them now is all that is looked at
                        x = torch.einsum("ngk,gok->ngo", x, weights.to(x)).flatten(1)[..., None]
                        t = t[:, :, :weights.shape[1]].flatten(1)[..., None]
                    joint.add(x, t)
                if process_group is not None:
                    joint.all_reduce(process_group, device)
            if not joints[0].count:
                continue
            biased = site.norm is not None or layer.bias is not None
            if not biased:
                joints = [joint.about_zero() for joint in joints]
            if name not in ridges:
                found = {ridge: fit(joints[0], start, ridge) for ridge in ((math.inf,) if wide else RIDGES)}
                errors = {ridge: error(weight[:, asked], *(joint.outputs(asked) for joint in joints))
                          for ridge, weight in found.items()}
                ridges[name] = min(errors, key=lambda ridge: errors[ridge])
            fitted = fit(joints[0], start, ridges[name])
            alone = slice(0, asked.start or None)
            weight = fitted[:, asked] - fitted[:, alone] + rescaled(fitted[:, alone], joints[0].outputs(alone))
            shift = bias(weight, joints[0].outputs(asked))
            if wide:
                weight = weights * weight.reshape(*weights.shape[:2], 1)
            set_weight_rows(layer, weight)
            if site.norm is None and biased:
                layer.bias.copy_(shift)
            elif site.norm is not None:
                norm: Any = small.get_submodule(site.norm)
                mean = with_float64(norm.running_mean)
                norm.running_mean.copy_(mean - shift.to(mean.device))


def _limits(where: Mapping[str, Site], calibration: Calibration) -> dict[str, float]:
    """Layer -> the number of the first batch that it is not fitted on; no less than of any layer before it."""
    limits: dict[str, float] = {}
    limit = math.inf
    for name in reversed(list(where)):
        samples = max(FEWEST, MEMORY // max(where[name].bytes, 1))
        limit = min(limit, math.ceil(samples / calibration.size))
        limits[name] = limit
    return limits
