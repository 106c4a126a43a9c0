"""prune(): a smaller network from scores and a budget."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, distributed, nn

from fastscore.arguments import check_flag
from fastscore.batches import Batch, Forward, call_model, checked_forward
from fastscore.graph.groups import Ignore
from fastscore.modules.evaluation_copy import evaluation_copy
from fastscore.modules.inspection import device_of
from fastscore.modules.wrappers import unwrapped
from fastscore.progress import shown
from fastscore.pruning.budgets import clocks
from fastscore.pruning.budgets.clocks import Clock
from fastscore.pruning.budgets.costs import Costs, MacsWithout
from fastscore.pruning.budgets.finer_steps import say_coarse
from fastscore.pruning.budgets.latency import select_by_latency
from fastscore.pruning.budgets.quality import HELD_OUT, Quality, build_after, select_by_quality
from fastscore.pruning.budgets.selection import check_removable, give_back, macs_along, scored_graph, select
from fastscore.pruning.options import Budgets, Ranking, Scope, resolve_compensate, say_compensation, say_unread
from fastscore.pruning.order.better import better
from fastscore.pruning.order.measured import Measured, measurable
from fastscore.pruning.order.ranking import RemovalStep, ranker
from fastscore.pruning.refusal import checked, repaired
from fastscore.pruning.report import Candidate, Judged, new_report
from fastscore.pruning.result import PruneResult
from fastscore.pruning.saved.recipes import no_biases
from fastscore.pruning.surgery import Surgery, macs_without, plan_surgery, replay, verify
from fastscore.recovery.compensation import say_what_takes_no_mean
from fastscore.recovery.decisions import JudgedOutputs
from fastscore.recovery.held_out import check_batches, split
from fastscore.recovery.not_finite import naming_samples
from fastscore.recovery.reconstruct import Method, reconstruct
from fastscore.recovery.remembering_batches import RememberingBatches
from fastscore.rng import fork_rng
from fastscore.scoring.scores import Scores


@naming_samples("calibration", "held_out")
@torch.inference_mode(False)  # whose tensors no one could train
def prune(model: nn.Module, scores: Scores, example_inputs: Batch, *, channels: float | None = None,
          params: float | None = None, macs: float | None = None, latency: float | None = None,
          scope: Scope = "global", cost_aware: bool | None = None, round_to: int | Literal["auto"] = 1,
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
            fastscore.pruning.budgets.costs.channel_multiple).
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
            It needs calibration.
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
        RuntimeError: a forward that depends on a width which changed; with the layers to ignore.
    """
    model = unwrapped(model)
    quality = Quality(agreement, kl, confidence)
    budgets = quality.alone(Budgets(channels, params, macs, latency), calibration)
    ranking = Ranking(scope, cost_aware, round_to, floor)
    check_removable(scores)
    if repair not in get_args(Method):
        raise ValueError(f"repair: {repair!r} is none of {', '.join(get_args(Method))}")
    if held_out is not None and not quality.given:
        raise ValueError("held_out: agreement= and kl= are judged by it: give one of them, or leave it out")
    if calibration is None and repair != "auto":
        raise ValueError(f"repair: {repair!r} is fitted to samples: give calibration=batches, too")
    if calibration is not None and compensate is False:
        raise ValueError("calibration: it is there to repair by, which compensate=False forbids: give one of them")
    notes = {**scores.notes, **({"importances": scores.all_zero} if scores.all_zero else {})}
    if scores.all_zero:
        warnings.warn(f"scores: {scores.all_zero}", stacklevel=4)
    means = resolve_compensate(compensate, scores)
    notes |= say_unread(scores) if means and calibration is None else {}
    clocks.check(clock, latency, model, example_inputs)
    with shown(progress):
        graph = scored_graph(model, scores, example_inputs, forward, ignore)
    if not graph.groups:
        raise ValueError(f"ignore: it leaves no channel that can go from {type(model).__name__}: ignore fewer layers")
    eval_model = evaluation_copy(model)
    plan = partial(plan_surgery, model, eval_model, graph, scores if means else None, example_inputs, forward)
    compensation = say_compensation(means, compensate, scores) if calibration is None else ""
    candidates: tuple[Candidate, ...] = ()
    judged: tuple[Judged, ...] = ()
    with fork_rng(device_of(eval_model)), shown(progress):
        costs = Costs(eval_model, graph.groups, example_inputs, checked_forward(forward),
                      means or calibration is not None, graph.samples.batch, graph.kept_biases)
        dense = costs.by_group()

        def run(smaller: nn.Module) -> int:
            """MACs of a smaller model, as it is."""
            return verify(smaller, example_inputs, forward, costs.returned.shape, graph.samples.batch)

        def cut(removed: Mapping[str, Tensor]) -> tuple[Surgery, nn.Module, int]:
            """(what was done, the smaller model, its MACs)."""
            surgery = plan(removed)

            def attempt(gone: Mapping[str, Tensor]) -> tuple[nn.Module, int]:
                pruned = (surgery if gone is removed else plan(gone)).copy()
                return pruned, run(pruned)

            return surgery, *checked(attempt, removed)

        def build(removed: Mapping[str, Tensor], fit: Iterable[Batch] | None) -> PruneResult:
            """The smaller model; `costs` are without what was removed."""
            surgery, pruned, macs_left = cut(removed)
            bare = say_what_takes_no_mean(model, graph.groups, removed)
            report = new_report(graph, dense, costs, macs_left, pruned, removed, candidates,
                                {**notes, **({"means": bare} if bare else {})},
                                compensation + (", but for what the note on means names" if bare and means
                                                and calibration is None else ""),
                                scores.origin.units, surgery.made_plain, surgery.made_linear)
            made = PruneResult(pruned, report, costs.with_others(removed), surgery.removed_indices, surgery.new_biases)
            if fit is None or not removed:
                return made
            return repaired(reconstruct(model, made, fit, repair, forward=forward, outputs=outputs,
                                        process_group=process_group), run)

        counted: MacsWithout | None = None
        if budgets.macs is not None or quality.given:
            counted = partial(macs_without, eval_model, graph.groups, example_inputs, checked_forward(forward),
                              graph.samples.batch)
            costs.learn_products(counted)
        ranked, per_channel = ranker(eval_model, graph.groups, scores, costs, budgets, ranking, example_inputs, forward)
        fit: Iterable[Batch] | None = calibration
        judges = held_out
        if quality.given:
            assert calibration is not None
            fit, judges = split(calibration, held_out, HELD_OUT, "calibration")
        if fit is not None:
            check_batches(fit, "calibration")
            fit = RememberingBatches.of(fit, "calibration")

        def pruned(order: list[RemovalStep]) -> PruneResult:
            """The smaller model, whose channels go in this order; `costs` are whole before and after."""
            nonlocal candidates, judged
            coarse = ""
            if quality.given:
                assert judges is not None
                assert counted is not None
                result, judged = select_by_quality(
                    macs_along(order, costs, counted),
                    lambda steps: build_after(order[:steps], costs, partial(build, fit=fit)), quality, eval_model,
                    judges, forward, outputs)
                return result
            if budgets.latency is None:
                removed = select(order, costs, budgets.counted, counted)
                coarse = say_coarse(order, removed, costs, budgets.counted)
            else:
                removed, candidates = select_by_latency(order, costs, budgets, lambda gone: cut(gone)[1:],
                                                        eval_model, example_inputs, forward, counted, clock)
            try:
                made = build(removed, fit)
                return replace(made, report=made.report.with_notes(budget=coarse))
            finally:
                give_back(removed, costs)

        if _is_measured(measured, scores, scope, fit, repair):
            assert isinstance(fit, RememberingBatches)
            seen = fit
            found = seen.once(scores, lambda: Measured(model, eval_model, graph, scores, ranked, per_channel, seen,
                                                       forward, outputs, process_group))
            result = better(found, ranked(scores), pruned, costs, budgets, quality.given, counted)
        else:
            result = pruned(ranked(scores))
    report = result.report
    result = replace(result, report=replace(report, judged=judged, notes={**report.notes, **quality.coarse(judged)}))
    if inplace:
        surgery = Surgery(model, result.removed_indices, no_biases(model, result.new_biases))
        with fork_rng(device_of(model)):
            return replace(result, model=replay(model, result.model, surgery, run))
    return result


def _is_measured(asked: bool | None, scores: Scores, scope: Scope, calibration: object, repair: Method) -> bool:
    """Whether groups are measured. Raises ValueError where they are to be and cannot, TypeError for no bool."""
    check_flag("measured", asked)
    possible = calibration is not None and scope == "global" and measurable(scores)
    if asked and not possible:
        raise ValueError('measured: it takes calibration=batches, scope="global", and scores of channels (units='
                         '"groups") without a sign that read gradients (taylor-sq, taylor-abs): give them, or leave '
                         "measured= out")
    return possible and repair in ("auto", "asymmetric") if asked is None else asked
