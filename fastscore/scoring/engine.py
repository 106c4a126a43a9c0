"""score(): batches in, a score for every channel out; the model comes back as it went in."""

import warnings
from collections.abc import Iterable
from dataclasses import asdict, replace
from os import PathLike
from typing import Literal

import torch
from torch import Tensor, distributed, nn

from fastscore.arguments import check_callable
from fastscore.batches.calls import Forward, call_model
from fastscore.batches.parts import MASK, Batch, can_be_cut, few_samples, first_input, mappings
from fastscore.default_device import keeps_own_on_cpu
from fastscore.fastpath.graphs import Graphs
from fastscore.fastpath.precision import WRONG, wrong_convolutions
from fastscore.fastpath.prepare import Prepared, prepare
from fastscore.fingerprints import run_fingerprint
from fastscore.graph.groups import ChannelGraph, Ignore, listed, matching_layers
from fastscore.graph.scored_units import Units, among, named
from fastscore.graph.tracing import trace
from fastscore.graph.trials import draws
from fastscore.graph.trials.companions import TOGETHER
from fastscore.graph.trials.trial_inputs import batch_of
from fastscore.modules.evaluation_copy import evaluation_copy
from fastscore.modules.inspection import device_of
from fastscore.modules.wrappers import unwrapped, without_checkpoints
from fastscore.progress import bar, shown
from fastscore.rng import fork_rng
from fastscore.scoring import gradients, options
from fastscore.scoring.batch_passes import BatchPasses, Measured
from fastscore.scoring.coverage import coverage
from fastscore.scoring.options import (
    AGREEMENT,
    Checkpoint,
    Execution,
    Gradient,
    Persistence,
    Precision,
    Probes,
    Sampling,
    check,
    origin_of,
)
from fastscore.scoring.runs import Batches, Run
from fastscore.scoring.scores import Origin, Scores
from fastscore.scoring.tap_points import groups_to_score
from fastscore.scoring.totals import Totals
from fastscore.scoring.weights import WEIGHT_IMPORTANCES


@keeps_own_on_cpu
def score(model: nn.Module, batches: Iterable[Batch], *, importance: str = "taylor-sq",
          gradient: Gradient = "random", normalize: bool = True, units: Units = "groups", reduction: str = "sum",
          ablation: str = "zero", layerwise: str = "none", probes: Probes = 1,
          samples: int | Literal["auto"] | None = None, agreement: tuple[float, float] = AGREEMENT, seed: int = 0,
          distribution: str = "normal", center: bool = False, sample_dims: int = 1, loss: gradients.Loss | None = None,
          forward: Forward = call_model, ignore: Ignore = (),
          resume: str | PathLike[str] | Checkpoint | None = None, process_group: distributed.ProcessGroup | None = None,
          fixed_order: bool = False, precision: Precision | None = None, compile: bool = False,
          graph: bool | Literal["auto"] = "auto", progress: bool = True) -> Scores:
    """Score every channel of `model` on `batches`, without labels unless gradient="loss".

    The work is done on a copy of the model, in evaluation mode with frozen weights; of one in DistributedDataParallel,
    on the model inside. The model comes back as it went in.

    Args:
        model: Any module.
        batches: Tensors [N, ...], tuples (the first element is the input), dicts (keyword arguments) or dataclasses
            (what the model is called on). They are moved to the model's device. Samples may lie one after the other,
            each with as many rows as it holds and one in the output: each then takes a backward pass of its own.
        importance: "taylor", "taylor-abs" or "taylor-sq" (activation x gradient); "molchanov-bn" or "molchanov-group",
            from the gradients of whole batches; or "magnitude-l1", "magnitude-l2", "bn-scale", "random", which read
            only weights.
        gradient: "random" (no labels) or "loss".
        normalize: Scale each sample's output gradient to length 1.
        units: "groups", channels that live and die together and can be pruned; "blocks", these and whole residual
            branches, one score each, which go for zeros; "experts", these and whole experts of mixtures, which go with
            their rows of the router; "head_dims", channels, with the dimensions of attention heads (query-key pairs and
            values) in the place of whole heads where code permits; "heads_and_dims", both of these; several of them,
            ("blocks", "heads_and_dims"), which then go under one budget; or "norms", a gate at the output of each
            BatchNorm, as in the paper, which can be masked.
        reduction: "sum" over a channel's positions before the absolute value or square, or "element".
        ablation: What a channel's absence is compared with: "zero", or "mean" (taylor-sq), the channel at its mean
            activation.
        layerwise: Divide each layer's importances by their "l2" norm or "mean", or not ("none").
        probes: Random gradients for each sample; or "exact": one for each output, in turn, whose mean for taylor-sq is
            the value that random gradients approach.
        samples: Stop after so many; "auto": as soon as the even and the odd samples agree on 95 % of the 30 % of
            channels that each would prune (see Scores.overlap). They are examples, whatever sample_dims is.
        agreement: (fraction, share) in place of 30 and 95 %.
        seed: Of the random gradients. They depend on it, the sample's content and the probe alone, so that scores do
            not depend on batch size or order (but where a BatchNorm keeps no running statistics).
        distribution: Of the random gradients: "normal", "rademacher", or "orthogonal" (as many probes of a sample as
            it has outputs are orthogonal).
        center: Take the all-ones direction out of the random gradients, which a softmax does not see.
        sample_dims: 1: a sample is one example of the batch. 2: each token of an output [N, T, ...] is a sample, with
            a gradient and a length of its own, scored by what the channels do at that token. Tokens that an
            attention_mask [N, T], given to the model by that name, has at 0 are padding: they have no gradient and do
            not count.
        loss: loss(output, batch) -> scalar; default: cross entropy, of logits or of probabilities (none negative, each
            row sums to 1), with the labels of (input, label) batches. Its gradient is taken as it stands when
            normalize=False.
        forward: forward(model, batch) -> output [N, ...], for models that are called otherwise.
        ignore: Layer names (with `*`; a name stands for all below it), types or modules to leave out, whether they
            make channels or read them.
        resume: A file that keeps the run, written now and then. Stopped at any moment and called again with the same
            arguments, score goes on from there, and ends with the scores, bit for bit on a CPU, that it would have
            given. Batches that are done are read again and compared, except those of a folder of images. The file
            stays.
        process_group: Processes that share the work. Each calls score with the same arguments (batches included),
            takes every size-th batch, and returns the scores of all.
        fixed_order: Add up in an order that does not depend on the number of processes (at most 64), so that any
            number gives the same bits. It takes the memory of 64 totals.
        precision: Of the passes: "float32", "bfloat16" (parameters, activations and their gradients; sums over
            positions and samples stay float32 and wider, and so does the output; faster where the processor has
            arithmetic for it, slower where it has none), or as the model is (None).
        compile: Through torch.compile, taps included: the same scores, for batches of the size of the first; others
            run as they are. It takes a while to start, and on a CPU it was at best as fast as without (see
            docs/speed.md).
        graph: On a CUDA device, run each pass as one CUDA graph, recorded where two batches in a row have one shape:
            "auto" where that can be, and the plan says why not; True, or RuntimeError; or never (False).
        progress: Show a bar.

    Returns:
        Scores: layer -> float32 [C], the importance of its output channels. Their `plan` tells what was done.

    Raises:
        ValueError: No channel to score, no labels for a loss gradient, a loss that is not finite, a batch the model
            cannot take, options that contradict each other, a `resume` file that is damaged or of another run.
        TypeError: A model that returns no tensor.
        FloatingPointError: NaN or infinity; the message names the layer.

    Source: arXiv 2310.20203; molchanov-*: arXiv 1906.10771.
    """
    origin = origin_of(importance, gradient, normalize, probes, reduction=reduction, seed=seed,
                       distribution=distribution, units=units, ablation=ablation, layerwise=layerwise, center=center,
                       sample_dims=sample_dims)
    sampling, execution = Sampling(probes, samples, agreement), Execution(precision, compile, progress, graph)
    persistence = Persistence(resume, process_group, fixed_order)
    if loss is not None:
        check_callable("loss", loss, "loss(output, batch)")
    check(batches, origin, sampling, execution, persistence)
    model = unwrapped(model)
    ignore = listed(ignore)
    with fork_rng(device_of(model)), torch.inference_mode(False), torch.enable_grad(), without_checkpoints():
        data = Batches(batches, device_of(model), sampling.limit)
        # one sample is enough to trace with, where it is known how to take it
        example = few_samples(data.first, 1) if forward is call_model else data.first
        with shown(progress):
            channels = trace(model, example, forward, data.first, origin.units)
        ignore = matching_layers(model, ignore)
        eval_model = evaluation_copy(model)  # of a model that was traced: which layers compute their weight is known
        if "experts" in among(origin.units) and not (channels.experts or channels.kept_whole.get("experts")):
            without = named([*among(origin.units) - {"experts"}, "groups"])
            warnings.warn(f"units: {type(model).__name__} has no mixture of experts that is known: these are scores as "
                          f'with units="{without}"', stacklevel=3)
        if origin.gradient == "none":
            return _score_weights(eval_model, channels, origin, ignore)
        _check_flat(channels, sampling, execution)
        if drawn := draws.said(model, channels.drawing):
            warnings.warn(drawn, stacklevel=3)
        if compile:
            channels = replace(channels, samples=replace(channels.samples, followed=False))
        several = len(first_input(data.first)) > 1 and not channels.samples.one
        totals = Totals(eval_model, channels, origin, ignore, several=several)
        alone = len(first_input(example)) < 2 and not channels.samples.one and can_be_cut(data.first)
        prepared = prepare(eval_model, totals.taps(traceable=True), channels.normalized_by, example, forward, precision,
                           compile, batch_of(data.first, 2) if alone else None)
        if wrong := wrong_convolutions(prepared.copy, prepared.observation.inputs, prepared.dtype):
            warnings.warn(WRONG.format(", ".join(wrong)), stacklevel=3)
        same = run_fingerprint(model, asdict(totals.origin), probes=probes, ignored=sorted(ignore), loss=loss,
                               forward=forward, precision=precision, compile=compile) if persistence.compared else {}
        graphs = Graphs[Measured](device_of(eval_model), _why_eager(prepared, totals, graph, data.first), graph is True)
        run = Run(totals, same, data, persistence)
        passes = BatchPasses(model, forward, loss, probes, prepared, graphs,
                             at_once=persistence.checkpoint is not None or samples == "auto")
        total = None if sampling.limit is None else sampling.limit // run.size
        with prepared.taps, run, shown(progress and run.rank == 0), \
                bar("scoring", " samples", total, run.samples) as told:
            for totals, batch in run:
                told.update(passes.measure(totals, batch, run.number))
                if samples == "auto" and _settled(totals, agreement):
                    break
            passes.finish()
        if totals.together:
            warnings.warn(TOGETHER.format(type(model).__name__), stacklevel=3)
        return replace(run.totals().scores(), plan=replace(prepared.plan, graph=graphs.outcome))


def _why_eager(prepared: Prepared, totals: Totals, graph: bool | Literal["auto"], example: Batch) -> str:
    """Why passes are not recorded as graphs; empty where they may be."""
    axes = prepared.taps.axes
    reasons = ((graph is False, "graph=False"),
               (axes.flat, "a batch has as many backward passes as it has samples"),
               (any(map(axes.follows, axes.of_calls(prepared.taps.points))), "rows are followed from batch to batch"),
               (prepared.compiled, "compile=True"),
               (totals.criterion.filters, f"{totals.origin.importance} reads gradients of weights on the host"),
               (any(MASK in mapping for mapping in mappings(example)), "the padding of each batch is looked at"))
    return next((reason for holds, reason in reasons if holds), "")


def _check_flat(graph: ChannelGraph, sampling: Sampling, execution: Execution) -> None:
    """Raise ValueError for what cannot be done with batches whose samples lie one after the other."""
    flat, one = graph.samples.flat, graph.samples.one
    given = {"samples": sampling.limit is not None and (flat or one), "compile": execution.compile and flat}
    for argument in [argument for argument, holds in given.items() if holds]:
        why, how = ("so that a batch cannot be cut", "give fewer batches, or samples=\"auto\"") \
            if argument == "samples" else ("in no fixed number of rows", "use compile=False")
        raise ValueError(f"{argument}: samples of these batches lie one after the other, each with as many rows as it "
                         f"holds, {why}: {how}")


def _settled(totals: Totals, agreement: tuple[float, float]) -> bool:
    """Whether two halves of the samples would prune the same channels, but for a few."""
    fraction, share = agreement
    return totals.samples >= options.AUTO_LEAST and totals.scores().overlap(fraction) >= share


def _score_weights(model: nn.Module, graph: ChannelGraph, origin: Origin, ignore: Ignore) -> Scores:
    graph, origin = groups_to_score(model, graph, origin, ignore)
    importance = origin.importance
    totals: dict[str, Tensor] = {}
    unsaid: dict[str, str] = {}
    for group in graph.groups:
        values = WEIGHT_IMPORTANCES[importance](model, group, origin.seed)
        if values is None:
            unsaid[group.name] = f"{importance} says nothing about it"
        elif not torch.isfinite(values).all():
            raise FloatingPointError(f"{group.name}: NaN or infinity in the weights of its channels")
        else:
            totals[group.name] = values
    if not totals:
        raise ValueError(f"importance: {importance} says nothing about any layer of {type(model).__name__}")
    skipped = graph.less(unsaid).skipped
    return Scores(totals, origin, skipped=skipped, coverage=coverage(model, graph, totals, skipped))
