"""prune(): a smaller network from scores and a budget."""

import warnings
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, distributed, nn

from fastscore.arguments import check_flag
from fastscore.batches.calls import Forward, call_model
from fastscore.batches.not_finite import naming_samples
from fastscore.batches.outputs import checked_forward
from fastscore.batches.parts import Batch
from fastscore.default_device import keeps_own_on_cpu
from fastscore.garbage import seldom_searched
from fastscore.graph.groups import Ignore
from fastscore.modules.evaluation_copy import evaluation_copy
from fastscore.modules.inspection import device_of
from fastscore.modules.wrappers import unwrapped
from fastscore.progress import shown
from fastscore.pruning.budgets import clocks
from fastscore.pruning.budgets.clocks import Clock
from fastscore.pruning.budgets.costs import Costs, MacsWithout
from fastscore.pruning.budgets.finer_steps import say_coarse
from fastscore.pruning.budgets.latency import say_slower, select_by_latency
from fastscore.pruning.budgets.quality import Quality, Way, build_after, finer_than_next, select_by_quality
from fastscore.pruning.budgets.selection import (
    OutOfReachError,
    check_removable,
    give_back,
    macs_along,
    scored_graph,
    select,
)
from fastscore.pruning.building import Builder, Cut
from fastscore.pruning.options import (
    Budgets,
    Ranking,
    Scope,
    check_repair,
    multiple,
    resolve_compensate,
    say_compensation,
    say_unread,
)
from fastscore.pruning.order.better import better
from fastscore.pruning.order.measured import Measured, is_measured
from fastscore.pruning.order.ranking import RemovalStep, ranker
from fastscore.pruning.order.widths import Widths
from fastscore.pruning.report import Candidate
from fastscore.pruning.result import PruneResult
from fastscore.pruning.saved.recipes import no_biases
from fastscore.pruning.surgery import Surgery, replay
from fastscore.recovery.calibration import HELD_OUT
from fastscore.recovery.decisions import JudgedOutputs
from fastscore.recovery.held_out import check_batches, split
from fastscore.recovery.reconstruct import Method, reconstruct
from fastscore.recovery.remembering_batches import RememberingBatches
from fastscore.rng import fork_rng
from fastscore.scoring.scores import Scores


@keeps_own_on_cpu
@naming_samples("calibration", "held_out")
@torch.inference_mode(False)  # whose tensors no one could train
def prune(model: nn.Module, scores: Scores, example_inputs: Batch, *, channels: float | None = None,
          params: float | None = None, macs: float | None = None, latency: float | None = None,
          scope: Scope = "global", cost_aware: bool | None = None, round_to: int | Literal["auto"] | None = None,
          floor: float | Mapping[str, float] = 0.0, compensate: bool | None = None,
          calibration: Iterable[Batch] | None = None, repair: Method = "auto", measured: bool | None = None,
          agreement: float | None = None, kl: float | None = None, confidence: float | None = None,
          held_out: Iterable[Batch] | None = None, clock: Clock = "torch", ignore: Ignore = (),
          forward: Forward = call_model, outputs: JudgedOutputs = None,
          process_group: distributed.ProcessGroup | None = None, inplace: bool = False,
          progress: bool = True) -> PruneResult:
    """Remove the least important channels of `model` until a budget holds.

    Args:
        model: the dense model; left as it is unless `inplace`.
        scores: of this model, by fastscore.score.
        example_inputs: a batch that `forward(model, batch)` takes, for tracing and counting MACs; convolutions that pad
            with zeros are compensated at its height and width.
        channels, params, macs: one or more budgets, each what REMAINS as a share of the original, 0 < share <= 1; met
            exactly or from below, by less than any one removed step.
        latency: what remains of the time that one call takes on the example inputs, measured on the present device,
            beside the dense model, in medians. A few candidates along the removal order, chosen by the time that each
            layer takes, are built and timed until one is below the budget by little, twice, or little separates
            it from one that is over it (see fastscore.pruning.budgets.latency); report.candidates is the curve.
        scope: "global" compares channels of all layers; "layer" shrinks all layers alike; "isomorphic" compares within
            each class of groups that are made, passed and read by the same kinds of layers, and shrinks all classes
            alike.
        cost_aware: rank by importance per MAC that a channel costs in the dense model, per parameter where params is
            a budget and macs is not, per second where latency is the only one. None: where such a budget is given,
            layers are compared, and the scores measure how the outputs change (by gradients, not layerwise). False: the
            paper's way.
        round_to: remaining widths are multiples of it; "auto": of 8, 16 or 32, by device and dtype (see
            fastscore.pruning.budgets.costs.channel_multiple). None: "auto" where latency is measured by a clock of
            another runtime, which is slow at other widths, and else 1.
        floor: the share of each group's channels that stays in any case, or layer -> share (at least one always does).
        compensate: add what the channels gave to their consumers on average to the consumers' biases (see
            fastscore.recovery.compensation); consumers without a bias get one, which counts towards params. It takes
            scores with means: those of a criterion that reads gradients, or with means lent by such scores,
            dataclasses.replace(scores, means=other.means). None: where the scores hold means. False: the paper's way,
            removed channels read as zero.
        calibration: batches without labels by which the smaller model is repaired in the same call: see
            fastscore.reconstruct, which takes them, `repair` as its method, and process_group. It compensates with
            means of its own, whatever the scores hold; report.repairs says what each repair gave.
        repair: "auto", "linear", "asymmetric" or "mean".
        measured: within a group, channels that others can stand in for go first (fastscore.pruning.order.redundancy);
            groups are compared by what the loss of their channels costs once it is repaired, measured on calibration
            samples that are held out: three cuts of each group alone, each judged on 50 samples (see
            fastscore.pruning.order.measured). Of this choice and that by importances alone, both repaired linearly, the
            one is taken that is nearer to the dense model on further samples held out; report.notes has both. None:
            where `repair` is "auto" or "asymmetric", the scope is "global" and
            importances are of one sign and measure how the outputs change. False: importances alone.
        agreement: in place of the budgets: the smallest network along the removal order, repaired, that makes at least
            this share of the dense model's decisions (of outputs judged by error: such an R²), found by bisection on
            samples that no repair has seen (see fastscore.pruning.budgets.quality); report.judged has what was tried.
            It needs calibration. Where few judge, a warning says what they show of others.
        kl: likewise: the largest mean KL divergence from the dense model's outputs, in nats (of outputs judged by
            error: the squared error as a share of their variance).
        confidence: such as 0.95: the agreement holds, with this probability at least, beyond the samples that judge;
            by an exact binomial bound, on a half of them that the search does not see.
        held_out: batches to judge agreement and kl by, which should not have been scored on either. Default: one of 4
            samples of calibration, told by content, which then does not repair.
        clock: what runs the models when latency is measured: "torch", on the model's device, or on the CPU
            "onnxruntime" or "openvino", which take models of one tensor. Candidates are converted for it, which takes
            longer than to time them.
        process_group: processes that share the work of repairing.
        ignore: layers (names with `*`, which stand for all below; types, modules) to leave as they are: neither what
            they make nor what they read loses a channel.
        forward: how the model is called on a batch. A tuple, list, dict or dataclass of tensors that it returns are
            several outputs, which all count; agreement and KL are of each by itself, and so are they of the parts that
            one was put together of by torch.cat. report.decided says what was taken for decisions.
        outputs: the places, keys or fields of those that are judged, where not all are (features). A dict says how:
            "decision", by its largest value, or "error", for regressions: by the squared error as a share of the dense
            output's variance, such as {"classes": "decision", "boxes": "error"}; {"": "error"} for a single tensor.
            Outputs of one column (a scalar, a depth map), and those that tanh, sigmoid or normalize made last, are
            judged by their error where nothing else is said.
        inplace: make `model` itself smaller.
        progress: say on stderr what takes longer than two seconds.

    Returns:
        The smaller model and what was done. Its parameters are new objects: make a new optimizer, or call
        fastscore.rebuild_optimizer.

    Raises:
        ValueError: a budget outside (0, 1] or out of reach, scores of another model, of units="norms", or without the
            means to compensate with, a model that cannot be traced; before anything is changed, as all that follow.
        FloatingPointError: means that are NaN or infinite, or what layers of the dense model read of calibration
            batches, or its outputs, which are judged, naming the sample where it is in there.
        RuntimeError: a smaller model that does not run, for another reason than a width, at which it stays wider.
    """
    model = unwrapped(model)
    check_flag("inplace", inplace)
    quality = Quality(agreement, kl, confidence)
    budgets = quality.alone(Budgets(channels, params, macs, latency), calibration)
    ranking = Ranking(scope, cost_aware, multiple(round_to, latency, clock), floor)
    check_removable(scores)
    check_repair(repair, calibration, compensate, held_out, quality.given)
    notes = dict(scores.notes)
    if scores.all_zero:
        notes["importances"] = scores.all_zero
        warnings.warn(f"scores: {scores.all_zero}", stacklevel=5)
    means = resolve_compensate(compensate, scores)
    notes |= say_unread(scores) if means and calibration is None else {}
    compensation = say_compensation(means, compensate, scores) if calibration is None else ""
    measures = is_measured(measured, scores, scope, calibration, repair)
    fit, judges = _parts(calibration, held_out, quality.given)
    clocks.check(clock, latency, model, example_inputs)
    with shown(progress):
        graph = scored_graph(model, scores, example_inputs, forward, ignore)
    if not graph.groups:
        raise ValueError(f"ignore: it leaves no channel that can go from {type(model).__name__}: ignore fewer layers")
    eval_model = evaluation_copy(model)
    # a repair takes long, and whatever code it runs
    searched = seldom_searched() if calibration is None else nullcontext()
    with fork_rng(device_of(eval_model)), shown(progress), searched:
        costs = Costs(eval_model, graph.groups, example_inputs, checked_forward(forward),
                      means or calibration is not None, graph.samples.batch, graph.kept_biases)
        builder = Builder(model, eval_model, graph, costs, scores, means, example_inputs, forward,
                          None if fit is None else partial(
                              reconstruct, model, batches=fit, method=repair, forward=forward, outputs=outputs,
                              process_group=process_group), notes, compensation)
        counted = builder.macs_without if budgets.macs is not None or quality.given else None
        if counted is not None:
            costs.learn_products(counted)
        ranked, per_channel = ranker(eval_model, graph.groups, scores, costs, budgets, ranking, example_inputs, forward)
        if judges is not None:
            pruned = partial(_until_quality, builder, quality, judges, outputs)
        else:
            pruned = partial(_until_budgets, builder, budgets, counted, clock)
        plain, widths = ranked(scores), Widths(graph.groups)
        if measures:
            assert fit is not None
            found = fit.once(scores, partial(Measured, model, eval_model, graph, scores, ranked, per_channel, fit,
                                             forward, outputs, process_group))
            result = widths.pruned(lambda: better(found, widths.along(found.order), widths.along(plain), pruned, costs,
                                                  budgets, quality.given, counted, builder.cut), plain)
        else:
            result = widths.pruned(lambda: pruned(widths.along(plain)), plain)
    few, left_out = quality.few(result.report.judged), str(widths)
    for warning in filter(None, (few and f"agreement: {few}", left_out)):
        warnings.warn(warning, stacklevel=5)
    result = replace(result, report=result.report.with_notes(agreement=few, widths=left_out))
    if inplace:
        surgery = Surgery(model, result.removed_indices, no_biases(model, result.new_biases))
        with fork_rng(device_of(model)):
            result = replace(result, model=replay(model, result.model, surgery, builder.run))
    return result


def _parts(calibration: Iterable[Batch] | None, held_out: Iterable[Batch] | None, judged: bool
           ) -> tuple[RememberingBatches | None, Iterable[Batch] | None]:
    """(batches to repair by, batches to judge a quality by); None where nothing is repaired, or judged."""
    if calibration is None:
        return None, None
    fit, judges = split(calibration, held_out, HELD_OUT, "calibration") if judged else (calibration, None)
    check_batches(fit, "calibration")
    return RememberingBatches.of(fit, "calibration"), judges


def _until_budgets(builder: Builder, budgets: Budgets, counted: MacsWithout | None, clock: Clock,
                   order: list[RemovalStep]) -> PruneResult:
    """The smaller model, of which channels went in this order until the budgets held; the builder's costs are whole
    before and after."""
    costs, coarse, candidates, cut = builder.costs, "", tuple[Candidate, ...](), None
    if budgets.latency is None:
        removed, cut = _by_sums(builder, budgets, order) if counted is not None and costs.sums_hold else ({}, None)
        if cut is None:
            removed = select(order, costs, budgets.counted, counted)
        coarse = say_coarse(order, removed, costs, budgets.counted)
    else:
        removed, candidates = select_by_latency(order, costs, budgets, lambda gone: builder.cut(gone)[1:],
                                                builder.eval_model, builder.example_inputs, builder.forward, counted,
                                                clock)
    try:
        made = builder.build(removed, candidates, cut)
        return replace(made, report=made.report.with_notes(budget=coarse, latency=say_slower(candidates)))
    finally:
        give_back(removed, costs)


def _by_sums(builder: Builder, budgets: Budgets, order: list[RemovalStep]) -> tuple[dict[str, Tensor], Cut | None]:
    """(what goes so that the budgets hold by the sums over layers alone, and is gone from the builder's costs; the cut
    without it, whose MACs are as many as these say). No cut, and costs that are whole, where there is none such."""
    costs = builder.costs
    try:
        removed = select(order, costs, budgets.counted)
    except OutOfReachError:  # how much remains is for a count to say
        return {}, None
    holds = False
    try:
        cut = builder.cut(removed)
        if holds := costs.tells(costs.totals["macs"], cut.macs):
            costs.totals["macs"] = cut.macs
        return (removed, cut) if holds else ({}, None)
    finally:
        if not holds:
            give_back(removed, costs)


def _until_quality(builder: Builder, quality: Quality, judges: Iterable[Batch], outputs: JudgedOutputs,
                   order: list[RemovalStep]) -> PruneResult:
    """Likewise, the smallest that is as good as was asked for."""
    costs = builder.costs

    def along(order: list[RemovalStep]) -> Way:
        return macs_along(order, costs, builder.macs_without), \
            lambda steps: build_after(order[:steps], costs, builder.build)

    macs, build = along(order)

    def finer(best: int) -> Way | None:
        taken = finer_than_next(order, best, macs, lambda order: along(order)[0])
        return None if taken is None else along(taken)

    result, judged = select_by_quality(macs, build, quality, builder.eval_model, judges, builder.forward, outputs,
                                       finer=finer)
    return replace(result, report=replace(result.report, judged=judged))
