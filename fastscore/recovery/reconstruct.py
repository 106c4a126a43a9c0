"""reconstruct(): the layers of a smaller network take over what removed channels gave, as far as held-out samples
agree.

One pass of the dense network over the calibration batches yields the second moments of what its layers read, and its
outputs for the samples held out. Every repair is fitted without those samples and judged by them; the one that is
chosen is fitted once more on all samples, and judged once more: where that went far astray, what was judged before is
returned.
"""

import copy
import math
import warnings
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from os import PathLike
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, distributed, nn

from fastscore.arguments import check_callable, check_number
from fastscore.batches.calls import Forward, call_model
from fastscore.batches.not_finite import naming_samples
from fastscore.batches.parts import Batch
from fastscore.default_device import keeps_own_on_cpu
from fastscore.graph.cutting.surgery import removed_branches
from fastscore.graph.tracing import trace
from fastscore.modules.evaluation_copy import evaluation_copy, own_copies
from fastscore.modules.inspection import device_of, held_by_others
from fastscore.modules.modes import evaluating
from fastscore.modules.refused_batches import naming_argument
from fastscore.modules.weights import called_layers, own_products
from fastscore.modules.weights.computed_weights import computed_weight, why_it_computes_on
from fastscore.modules.wrappers import check_whole, unwrapped
from fastscore.progress import bar, shown
from fastscore.recovery.calibration import Calibration, Part
from fastscore.recovery.compensation import has_no_place, mean_contributions, weight_alone
from fastscore.recovery.decisions import Decisions, JudgedOutputs
from fastscore.recovery.divergence import Divergence, divergence, figures, of_one_kind
from fastscore.recovery.front_to_back import refit, sites
from fastscore.recovery.held_out import check_batches
from fastscore.recovery.kept import KeptPasses
from fastscore.recovery.linear import InputEstimate, estimate_inputs, rewired
from fastscore.recovery.moments import InputMoments, Moments, layouts
from fastscore.recovery.pruned import Pruned
from fastscore.recovery.recalibration import NothingToMeasure, recalibrate_on, running_norms
from fastscore.recovery.remembering_batches import RememberingBatches
from fastscore.recovery.repairs import Repair
from fastscore.rng import fork_rng
from fastscore.wording import counted

Method = Literal["mean", "linear", "asymmetric", "auto"]
RIDGES = (0.1, 0.01, 0.001)
STIFFNESSES = (1.0, 8.0)
_PARTS = {"asymmetric": 5}  # so many times as long as the others a repair takes


R = TypeVar("R", bound=Pruned)


@keeps_own_on_cpu
@naming_samples("batches")
def reconstruct(model: nn.Module, result: R, batches: Iterable[Batch], method: Method = "auto", *,
                ridges: Iterable[float] = RIDGES, forward: Forward = call_model,
                outputs: JudgedOutputs = None,
                resume: str | PathLike[str] | None = None, process_group: distributed.ProcessGroup | None = None,
                progress: bool = True) -> R:
    """Repair what pruning broke, without labels and without training: a new result, whose report says what each repair
    gave.

    Args:
        model: the dense model that `result` was pruned from, unchanged since; it stays as it is.
        result: what fastscore.prune returned (not in place); it stays as it is.
        batches: calibration batches as fastscore.score takes them, labels unread, in the same order at every reading:
            a list, or a DataLoader that does not shuffle. One of four samples is held out to judge by.
        method: "mean": what removed channels gave on average goes into biases. "linear": what removed channels gave is
            predicted from the channels that stay, by ridge regression from the moments of the dense network; the ridge
            is the one that does best on the samples held out. "asymmetric": after that, front to back, each layer is
            fitted to what the dense one made, from what the smaller network gives it (see
            fastscore.recovery.asymmetric). "auto": whichever of these, or nothing, is nearest to the dense
            network on the samples held out, with or without fastscore.recalibrate after it.
        ridges: to choose from, each a share of a channel's own variance; math.inf leaves the mean.
        forward: forward(model, batch), for models that are called otherwise.
        outputs: where `forward` returns several (a tuple, list, dict or dataclass of tensors): the places, keys or
            fields of those that are judged, each by itself. None: all. A dict says how: see fastscore.prune.
        resume: a file that keeps the moments of the dense network, written now and then. Stopped at any moment and
            called again with the same model, result and batches, by whatever method, the pass over the dense network
            goes on from there, to the same bits on a CPU. The file stays.
        process_group: processes that share the work, each calling with the same arguments.
        progress: show a bar where it takes longer than two seconds.

    Returns:
        A result with a new model. report.repairs has a row for every repair tried, "none" first: what the cut alone
        left. Figures are of the samples held out, before the last fit on all; they choose among repairs and ridges,
        and are in no fit. Where the last fit is far further from the dense network on the same samples, the network
        that was judged is returned, and report.notes says so. A warning says where a method that was asked for
        leaves a network far further from it than the cut alone.

    Raises:
        TypeError, ValueError: a method there is none of; batches that are none, or one tensor, or can be read only
            once; a dense model that is not the one pruned; a `resume` file that is damaged or of another run, or
            batches that are not those it has seen. FloatingPointError: NaN or infinity in what a layer reads, or in
            outputs of the dense model, naming it. Nothing is changed then.
    """
    if method not in get_args(Method):
        raise ValueError(f"method: {method!r} is none of {', '.join(get_args(Method))}")
    if not hasattr(result, "removed_indices"):
        raise TypeError(f"result: {type(result).__name__}; give what fastscore.prune returned, not its model alone")
    ridges = _checked(ridges)
    check_callable("forward", forward, "forward(model, batch)")
    model = unwrapped(model)
    check_whole(model)
    device = device_of(model)
    check_batches(batches, "batches")
    seen = RememberingBatches.of(batches)
    with fork_rng(device), torch.inference_mode(False), torch.no_grad(), shown(progress), \
            bar("repairing", " parts", _parts(method, ridges, bool(running_norms(result.model)))) as tried:
        kept = KeptPasses(resume, model, result.removed_indices, forward, process_group)
        bench = _Bench(model, result, seen, forward, process_group, kept, outputs)
        repaired: R = bench.best(method, ridges, tried)
    return repaired


def _checked(ridges: Iterable[float]) -> tuple[float, ...]:
    """The ridges. Raises TypeError, or ValueError, for what are none."""
    several = isinstance(ridges, Iterable) and not isinstance(ridges, str)
    found: tuple[Any, ...] = tuple(ridges) if several else ()
    for ridge in found:
        check_number("ridges", ridge, "0.01")
    if not found or not all(ridge >= 0 for ridge in found):
        raise ValueError(f"ridges: {ridges!r:.80}; give one or more, none below 0, such as (0.1, 0.01)")
    return found


def _parts(method: Method, ridges: tuple[float, ...], recalibrates: bool) -> int:
    """Of the work of a repair: what is tried, and the last fit, each as long as `_PARTS` says, or one."""
    tried = {"mean": method in ("mean", "auto"), "linear": len(ridges) * (method != "mean"),
             "asymmetric": len(STIFFNESSES) * (method in ("asymmetric", "auto"))}
    last = _PARTS.get("asymmetric" if method == "auto" else method, 1)
    return 1 + sum(_PARTS.get(name, 1) * count for name, count in tried.items()) + last + \
        (method == "auto" and recalibrates)


def check_dense(model: nn.Module, result: Pruned) -> None:
    """Raise ValueError where `model` is not the one that `result` was pruned from: what is to go is gone already, or
    never was there, or leaves other widths."""
    modules = {**own_products.names(result.model), **dict(model.named_parameters()), **dict(model.named_buffers()),
               **dict(model.named_modules())}
    for (name, side), index in result.removed_indices.items():
        layer: Any = modules.get(name)
        width = getattr(layer, "in_features" if isinstance(layer, nn.Linear) else "in_channels", None)
        if layer is None or (side == "inputs" and width is not None and int(index.max()) >= width):
            raise ValueError(f"model: it is not the dense one that the result was pruned from: {name} "
                             f"{'is not there' if width is None else 'reads only ' + counted(width, 'channel')}; "
                             "give the model that went into prune(), which inplace=True overwrites")
    cut = dict(result.cut_again(model, {}, {}).model.named_parameters())
    for name, parameter in result.model.named_parameters():
        if name in cut and cut[name].shape != parameter.shape:
            raise ValueError(f"model: it is not the dense one that the result was pruned from: {name} would be left "
                             f"with shape {list(cut[name].shape)} and has {list(parameter.shape)}; of a model pruned "
                             "several times, give the one that went into the last prune()")


class _Bench:
    """A dense model, what goes from it, and what calibration batches say of both."""

    def __init__(self, model: nn.Module, result: Pruned, seen: RememberingBatches, forward: Forward,
                 process_group: distributed.ProcessGroup | None, kept: KeptPasses,
                 outputs: JudgedOutputs) -> None:
        check_dense(model, result)
        calibration = Calibration(seen, device_of(model), forward, process_group, seen.name)
        self._model, self._result, self._calibration = model, result, calibration
        self._forward, self._run, self._group = forward, Decisions(forward, outputs), process_group
        self._example = calibration.first()
        with naming_argument(f"{seen.name}: the model cannot take its batches", model, forward, self._example):
            with torch.enable_grad():
                graph = trace(model, self._example, forward)
            self._eval_model = evaluation_copy(model)
            self._tied = held_by_others(self._eval_model, "weight")  # which keep theirs, and get a mean
            gone = removed_branches(result.removed_indices)
            self._removed = {name: at for (name, side), at in result.removed_indices.items() if side == "inputs"
                             and not gone(name) and (weight_alone(model, name)
                                                     or not has_no_place(model, name, graph.kept_biases))}
            self._alone = {name for name in self._removed if weight_alone(model, name)}
            index = layouts(self._eval_model, graph.groups, self._removed)
            with InputMoments(self._eval_model, index) as inputs:
                inputs.start(self._example)
                self._run(self._eval_model, self._example)
        self._kept_biases = set(graph.kept_biases)
        self._layouts = {name: index[name] for name in inputs.calls}
        self._sites = sites(self._eval_model, self._example, forward, result.removed_indices, graph.normalized_by)
        self._moments: dict[Part, dict[str, Moments]] = {}
        self._kept, self._seen, self._outputs = kept, seen, seen.outputs
        for part in ("fit", "held out"):
            self._measure(part)
        self._moments["all"] = {name: moments.joined(self._moments["held out"][name])
                                for name, moments in self._moments["fit"].items()}

    def _measure(self, part: Part) -> None:
        """What the dense network makes of a part, but for what is known of it. Samples held out are few: of them all
        that is known of the others is measured, which further cuts may ask for."""
        seen, judges = self._seen.moments[part], part == "held out" and not self._outputs.rows
        fitted = {name: moments.index for name, moments in self._seen.moments["fit"].items()}
        unseen = self._seen.unseen(part, fitted | self._layouts)
        if unseen or judges:
            with InputMoments(self._eval_model, unseen) as inputs:
                batches = self._calibration.part(part)
                for batch in self._kept.pass_over(batches, part, {**inputs.moments, "": self._outputs}):
                    inputs.start(batch)
                    with naming_argument(f"{self._seen.name}: the model cannot take its batches", self._eval_model,
                                         self._forward, batch):
                        output = self._run(self._eval_model, batch)
                    if judges:
                        self._outputs.rows.append({name: each.cpu() for name, each in output.items()})
            inputs.finish(self._group)
            seen.update(inputs.moments)
        self._moments[part] = {name: seen[name] for name in self._layouts}

    def _linear(self, ridge: float, part: Part) -> Any:
        """The result, with layers that read channels that went reconstructed from the moments of a part."""
        weights, added, _ = self._symmetric(ridge, part)
        return self._result.cut_again(self._model, weights, added)

    def _symmetric(self, ridge: float, part: Part
                   ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, InputEstimate]]:
        """(new weights, what biases grow by, what stands in for the inputs of each layer)."""
        inputs = {name: estimate_inputs(moments.about_zero() if name in self._alone else moments, self._removed[name],
                                        math.inf if name in self._tied else ridge)
                  for name, moments in self._moments[part].items()}
        weights = {name: rewired(self._eval_model.get_submodule(name), x) for name, x in inputs.items()
                   if name not in self._tied} if ridge != math.inf else {}
        constants = {name: x.constant for name, x in inputs.items() if name not in self._alone}
        added = mean_contributions(self._eval_model, constants, self._example, self._forward)
        return weights, added, inputs

    def _asymmetric(self, ridge: float, part: Part, ridges: dict[str, float]) -> Any:
        """The result, reconstructed front to back. ridges: layer -> of its asymmetric fit; those that are not there yet
        are chosen by the samples held out, and written there."""
        weights, added, _ = self._symmetric(ridge, part)
        result = self._result.cut_again(self._model, weights, added)
        model = result.model
        kept = self._tied | held_by_others(self._eval_model, "bias") | self._kept_biases
        with evaluating(model), ExitStack() as calls:
            for handle in called_layers.replace(model, model):
                calls.enter_context(handle)
            refit(self._eval_model, model, {name: replace(site, norm=None if name in added else site.norm)
                                            for name, site in self._sites.items() if name not in kept
                                            and computed_weight(model.get_submodule(name)) is None
                                            and why_it_computes_on(model.get_submodule(name)) is None},
                  self._calibration, part, ridges, self._forward, self._group)
        return result

    def _recalibrated(self, result: Any, part: Part) -> Any:
        """The result, its BatchNorms measured anew on those batches of a part that they can be measured on."""
        model = copy.deepcopy(result.model, own_copies(result.model))
        recalibrate_on(model, self._calibration.part(part), self._forward, self._group, leave_out_single=True)
        return replace(result, model=model)

    def _judge(self, result: Any) -> Divergence:
        model = result.model
        with evaluating(model):
            return divergence(self._outputs.rows, (self._run(model, batch)
                                                   for batch in self._calibration.part("held out")), self._group,
                              self._run.errors)

    def best(self, method: Method, ridges: tuple[float, ...], bar: Any) -> Any:
        """The result repaired by `method`, and the rows of what was tried, which move `bar`."""
        rows: list[Repair] = []
        best: dict[str, tuple[Repair, Any]] = {}  # of each name

        def add(name: str, ridge: float | None, result: Any, recalibrated: bool = False, stiffness: float = 1.0
                ) -> Divergence:
            found = self._judge(result)
            rows.append(Repair(name, ridge, recalibrated, found.agreement, found.kl, stiffness=stiffness,
                               decisions=found.decisions,
                               outputs={each: (one.agreement, one.kl) for each, one in found.outputs.items()},
                               by_error=found.by_error, mixed=found.mixed))
            if name not in best or found.kl < best[name][0].kl:
                best[name] = rows[-1], result
            bar.set_postfix_str(f"{name}: {figures(found.agreement, found.kl, found.by_error, found.mixed)}")
            bar.update(1 if recalibrated else _PARTS.get(name, 1))
            return found

        corrections: dict[str, float] = {}
        cut = add("none", None, self._result.cut_again(self._model, {}, {}))
        if kind := of_one_kind(cut, sum(len(next(iter(row.values()))) for row in self._outputs.rows)):
            warnings.warn(f"calibration: {kind}", stacklevel=5)
        if method in ("mean", "auto"):
            add("mean", None, self._linear(math.inf, "fit"))
        if method != "mean":
            for ridge in ridges:
                add("linear", ridge, self._linear(ridge, "fit"))
        if method in ("asymmetric", "auto"):
            start = best["linear"][0].ridge
            assert start is not None
            for stiffness in STIFFNESSES:
                stiff = {name: stiffness * each for name, each in corrections.items()} or corrections
                add("asymmetric", start, self._asymmetric(start, "fit", stiff), stiffness=stiffness)
        names = ("mean", "linear", "asymmetric", "none") if method == "auto" else (method,)
        chosen, result = min((best[name] for name in names), key=lambda pair: pair[0].kl)
        if method == "auto" and running_norms(self._result.model):
            with suppress(NothingToMeasure):
                add(chosen.name, chosen.ridge, self._recalibrated(result, "fit"), True, chosen.stiffness)
            chosen = best[chosen.name][0]
        judged = best[chosen.name][1]
        best.clear()  # models
        if chosen.is_far_further(chosen.kl, rows[0].kl):
            warnings.warn(f'repair: "{chosen.name}" leaves a network further from the dense one than the cut alone, '
                          f'{chosen.compared(chosen.kl, rows[0].kl)}: repair="auto" takes what is nearest',
                          stacklevel=5)
        final, notes = judged, dict[str, str]()
        if chosen.name != "none" or chosen.recalibrated:
            final = self._fitted(chosen, corrections)
            after = chosen.kl
            with suppress(RuntimeError):  # of what does not run: whoever returns it says so
                after = self._judge(final).kl
            if chosen.is_far_further(after, chosen.kl):
                final = judged
                notes["last fit"] = (f"fitted on all samples, the repair was further from the dense network on those "
                                     f"held out, {chosen.compared(after, chosen.kl)}: what is returned was fitted "
                                     "without them, and is what was judged")
        repairs = tuple(replace(row, chosen=row is chosen) for row in rows if row.name in ("none", *names))
        report = final.report
        return replace(final, report=replace(report, repairs=repairs, decided=f"{self._run}{cut.one_sided}",
                                             notes={**report.notes, **notes}))

    def _fitted(self, chosen: Repair, corrections: Mapping[str, float]) -> Any:
        """The result, repaired as chosen, on all samples."""
        ridge = math.inf if chosen.ridge is None else chosen.ridge
        stiff = {name: chosen.stiffness * each for name, each in corrections.items()}
        if chosen.name == "none":
            final = self._result.cut_again(self._model, {}, {})
        else:
            final = self._asymmetric(ridge, "all", stiff) if chosen.name == "asymmetric" else self._linear(ridge, "all")
        return self._recalibrated(final, "all") if chosen.recalibrated else final
