"""score(): batches in, a score for every channel out; the model comes back as it went in."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from os import PathLike
from typing import Literal, NoReturn

import torch
from torch import Tensor, distributed, nn
from tqdm import tqdm

from fastscore.batches import Batch, Forward, call_model, first_input, first_samples
from fastscore.fastpath.prepare import Prepared, prepare
from fastscore.fingerprints import run_fingerprint
from fastscore.graph.groups import ChannelGraph, Ignore, Units, matching_layers
from fastscore.graph.tracing import trace
from fastscore.modules.evaluation_copy import evaluation_copy
from fastscore.modules.inspection import device_of
from fastscore.modules.wrappers import unwrapped, without_checkpoints
from fastscore.progress import shown
from fastscore.rng import fork_rng
from fastscore.scoring import gradients, options, tokens
from fastscore.scoring.coverage import coverage
from fastscore.scoring.diagnosis import first_nonfinite
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


def score(model: nn.Module, batches: Iterable[Batch], *, importance: str = "taylor-sq",
          gradient: Gradient = "random", normalize: bool = True, units: Units = "groups", reduction: str = "sum",
          ablation: str = "zero", layerwise: str = "none", probes: Probes = 1,
          samples: int | Literal["auto"] | None = None, agreement: tuple[float, float] = AGREEMENT, seed: int = 0,
          distribution: str = "normal", center: bool = False, sample_dims: int = 1, loss: gradients.Loss | None = None,
          forward: Forward = call_model, ignore: Ignore = (),
          resume: str | PathLike[str] | Checkpoint | None = None, process_group: distributed.ProcessGroup | None = None,
          fixed_order: bool = False, precision: Precision | None = None, compile: bool = False,
          progress: bool = True) -> Scores:
    """Score every channel of `model` on `batches`, without labels unless gradient="loss".

    The work is done on a copy of the model, in evaluation mode with frozen weights; of one in DistributedDataParallel,
    on the model inside. The model comes back as it went in.

    Args:
        model: Any module.
        batches: Tensors [N, ...], tuples (the first element is the input) or dicts (keyword arguments). They are moved
            to the model's device.
        importance: "taylor", "taylor-abs" or "taylor-sq" (activation x gradient); "molchanov-bn" or "molchanov-group",
            from the gradients of whole batches; or "magnitude-l1", "magnitude-l2", "bn-scale", "random", which read
            only weights.
        gradient: "random" (no labels) or "loss".
        normalize: Scale each sample's output gradient to length 1.
        units: "groups", channels that live and die together and can be pruned; "blocks", these and whole residual
            branches, one score each, which go for zeros; or "norms", a gate at the output of each BatchNorm, as in the
            paper, which can be masked.
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
        loss: loss(output, batch) -> scalar; default: cross entropy with the labels of (input, label) batches. Its
            gradient is taken as it stands when normalize=False.
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
    sampling, execution = Sampling(probes, samples, agreement), Execution(precision, compile, progress)
    persistence = Persistence(resume, process_group, fixed_order)
    check(batches, origin, sampling, execution, persistence)
    model = unwrapped(model)
    ignore = matching_layers(model, ignore)
    with fork_rng(device_of(model)), torch.inference_mode(False), torch.enable_grad(), without_checkpoints():
        eval_model = evaluation_copy(model)
        data = Batches(batches, device_of(eval_model), sampling.limit)
        # one sample is enough to trace with, where it is known how to take it
        example = first_samples(data.first, 1) if forward is call_model else data.first
        with shown(progress):
            graph = trace(model, example, forward, data.first)
        if origin.gradient == "none":
            return _score_weights(eval_model, graph, origin, ignore)
        totals = Totals(eval_model, graph, origin, ignore, several=len(first_input(data.first)) > 1)
        prepared = prepare(eval_model, totals.taps(traceable=True), graph.normalized_by, example, forward, precision,
                           compile)
        same = run_fingerprint(model, asdict(totals.origin), probes=probes, ignored=sorted(ignore), loss=loss,
                               forward=forward, precision=precision, compile=compile) if persistence.compared else {}
        run, passes = Run(totals, same, data, persistence), _Passes(model, forward, loss, probes, prepared)
        with prepared.taps, run, _bar(run, sampling, execution) as bar:
            for totals, batch in run:
                bar.update(passes.measure(totals, batch))
                if samples == "auto" and _settled(totals, agreement):
                    break
        return replace(run.totals().scores(), plan=prepared.plan)


@dataclass(frozen=True)
class _Passes:
    """A batch through the prepared copy, and back. model: the user's, to tell where NaN comes from."""

    model: nn.Module
    forward: Forward
    loss: gradients.Loss | None
    probes: Probes
    prepared: Prepared

    def measure(self, totals: Totals, batch: Batch) -> int:
        """Add what the taps measure of a batch to `totals`; the number of its samples.

        Raises FloatingPointError, naming the layer, for NaN or infinity.
        """
        taps = self.prepared.taps
        with taps.one_pass(batch):
            output = self.prepared.run(batch).movedim(taps.axes.output, 0)
        assert taps.current is not None
        valid = taps.current.valid
        if self.prepared.compiled and valid is not None:
            raise ValueError("compile: the batch has padding, which compiled taps do not know of; use compile=False")
        if not torch.isfinite(output).all() and (culprit := self._first_nonfinite(batch)) is not None:
            raise FloatingPointError(culprit)
        if totals.origin.gradient == "loss":
            loss = _of_returned(self.loss, taps.axes.output)
            sent = tokens.loss_gradient(output, batch, loss, totals.origin, valid)
            sent = sent / len(sent) if totals.criterion.minibatch and totals.origin.normalize else sent
            totals.propagate(taps, output, sent, last=True)
        else:
            count = self.probes if isinstance(self.probes, int) else gradients.classes_of(output)
            for probe in range(count):
                totals.probe(taps, output, last=probe == count - 1)
        if (layer := totals.nonfinite) is not None:
            raise FloatingPointError(self._first_nonfinite(batch) or
                                     f"{layer}: NaN or infinity in the gradient that reaches its channels")
        return len(output)

    def _first_nonfinite(self, batch: Batch) -> str | None:
        return first_nonfinite(self.model, batch, self.forward)


def _of_returned(loss: gradients.Loss | None, dim: int) -> gradients.Loss | None:
    """A loss of the output with its samples first, from one of the output as the model returns it."""
    return loss if dim == 0 else lambda output, batch: (loss or gradients.cross_entropy)(output.movedim(0, dim), batch)


def _bar(run: Run, sampling: Sampling, execution: Execution) -> "tqdm[NoReturn]":
    total = None if sampling.limit is None else sampling.limit // run.size
    return tqdm(total=total, initial=run.samples, unit=" samples", desc="scoring",
                disable=not execution.progress or run.rank > 0)


def _settled(totals: Totals, agreement: tuple[float, float]) -> bool:
    """Whether two halves of the samples would prune the same channels, but for a few."""
    fraction, share = agreement
    return totals.samples >= options.AUTO_LEAST and totals.scores().overlap(fraction) >= share


def _score_weights(model: nn.Module, graph: ChannelGraph, origin: Origin, ignore: Ignore) -> Scores:
    graph, origin = groups_to_score(model, graph, origin, ignore)
    importance = origin.importance
    totals: dict[str, Tensor] = {}
    skipped = dict(graph.skipped)
    for group in graph.groups:
        values = WEIGHT_IMPORTANCES[importance](model, group, origin.seed)
        if values is None:
            skipped[group.name] = f"{importance} says nothing about it"
        elif not torch.isfinite(values).all():
            raise FloatingPointError(f"{group.name}: NaN or infinity in the weights of its channels")
        else:
            totals[group.name] = values
    if not totals:
        raise ValueError(f"importance: {importance} says nothing about any layer of {type(model).__name__}")
    return Scores(totals, origin, skipped=skipped, coverage=coverage(model, graph, totals, skipped))
