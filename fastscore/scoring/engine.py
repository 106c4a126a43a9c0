"""score(): batches in, a score for every channel out; the model comes back as it went in."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from os import PathLike
from typing import Literal

import torch
from torch import Tensor, distributed, nn
from tqdm import tqdm

from fastscore.batches import Batch, Forward, call_model, device_of, first_input, first_tensor, map_tensors
from fastscore.fastpath.precision import PRECISIONS
from fastscore.fastpath.prepare import prepare
from fastscore.graph.groups import ChannelGraph, Ignore, Units, matching_layers
from fastscore.graph.tracing import trace
from fastscore.modules.activation_checkpoints import without_checkpoints
from fastscore.modules.evaluation_copy import evaluation_copy
from fastscore.modules.wrappers import unwrapped
from fastscore.rng import fork_rng
from fastscore.scoring import gradients, tokens
from fastscore.scoring.diagnosis import first_nonfinite
from fastscore.scoring.fingerprints import run_fingerprint
from fastscore.scoring.runs import Checkpoint, Run, SliceableBatches, check
from fastscore.scoring.scorer import Gradient
from fastscore.scoring.scores import Origin, Scores
from fastscore.scoring.tap_points import groups_to_score
from fastscore.scoring.totals import Totals
from fastscore.scoring.weights import WEIGHT_IMPORTANCES

AUTO_LEAST = 32  # samples="auto" takes at least so many
AGREEMENT = (0.3, 0.95)  # and goes on until the halves agree on 95 % of the 30 % that each would prune


def score(model: nn.Module, batches: Iterable[Batch], *, importance: str = "taylor-sq",
          gradient: Gradient = "random", normalize: bool = True, units: Units = "groups", reduction: str = "sum",
          ablation: str = "zero", layerwise: str = "none", probes: int | Literal["exact"] = 1,
          samples: int | Literal["auto"] | None = None, agreement: tuple[float, float] = AGREEMENT, seed: int = 0,
          distribution: str = "normal", center: bool = False, sample_dims: int = 1, loss: gradients.Loss | None = None,
          forward: Forward = call_model, ignore: Ignore = (),
          resume: str | PathLike[str] | Checkpoint | None = None, process_group: distributed.ProcessGroup | None = None,
          fixed_order: bool = False, precision: Literal["float32", "bfloat16"] | None = None, compile: bool = False,
          progress: bool = True) -> Scores:
    """Score every channel of `model` on `batches`, without labels unless gradient="loss".

    The work is done on a copy of the model, in evaluation mode with frozen weights; of one in DistributedDataParallel,
    on the model inside.

    batches: tensors [N, ...], tuples (the first element is the input) or dicts (keyword arguments); moved to the
    model's device.
    importance: "taylor", "taylor-abs" or "taylor-sq" (activation x gradient); "molchanov-bn" or "molchanov-group", from
    the gradients of whole batches; or "magnitude-l1", "magnitude-l2", "bn-scale", "random", which read only weights.
    gradient: "random" (no labels) or "loss". normalize: scale each sample's output gradient to length 1.
    units: "groups", channels that live and die together and can be pruned, or "norms", a gate at the output of each
    BatchNorm, as in the paper, which can be masked. reduction: "sum" over a channel's positions before the absolute
    value or square, or "element". ablation: what a channel's absence is compared with: "zero", or "mean" (taylor-sq),
    the channel at its mean activation. layerwise: divide each layer's importances by their "l2" norm or "mean", or
    not ("none").
    probes: random gradients for each sample; or "exact": one for each output, in turn, whose mean for taylor-sq is the
    value that random gradients approach. samples: stop after so many; "auto": as soon as the even and the odd samples
    agree on 95 % of the 30 % of channels that each would prune (see Scores.overlap); agreement: (fraction, share) in
    place of 30 and 95 %. seed: of the random gradients,
    which depend on it, the sample's content and the probe alone, so that scores do not depend on batch size or order.
    distribution: "normal", "rademacher", or "orthogonal" (as many probes of a sample as it has outputs are orthogonal).
    center: take the all-ones direction out of the random gradients, which a softmax does not see.
    loss(output, batch) -> scalar (default: cross entropy with the labels of (input, label) batches); its gradient is
    taken as it stands when normalize=False. sample_dims: 2 where each token of an output [N, T, ...] is a sample, with
    a gradient and a length of its own, scored by what the channels do at that token; 1: a sample is one example of the
    batch. Tokens that an attention_mask [N, T], given to the model by that name, has at 0 are padding: they have no
    gradient and do not count. `samples` counts examples either way.
    forward(model, batch) -> output [N, ...], for models that are called otherwise. ignore: layer names (with `*`),
    types or modules to leave out.
    resume: a file that keeps the run, written now and then. Stopped at any moment and called again with the same
    arguments, score goes on from there, and ends with the scores, bit for bit on a CPU, that it would have given.
    Batches that are done are read again, and compared, but for a folder of images. The file stays.
    process_group: processes that share the work: each calls score with the same arguments (batches included), takes
    every size-th batch, and returns the scores of all. fixed_order: add up in an order that does not depend on the
    number of processes (at most 64), so that any number gives the same bits; it takes the memory of 64 totals.
    precision: of the passes: "float32", "bfloat16" (parameters, activations and their gradients; sums over positions
    and samples stay float32 and wider, and so does the output; faster where the processor has arithmetic for it, and
    slower where it has none), or as the model is (None).
    compile: through torch.compile, taps included: the same scores, for batches of the size of the first, others run as
    they are. It takes a while to start, and on a CPU it was at best as fast as without (see docs/speed.md).
    progress: show a bar. The result's `plan` tells what was done.

    Raises ValueError (no channel to score, no labels for a loss gradient, a loss that is not finite, a batch the model
    cannot take, a checkpoint that is damaged or of another run), TypeError (a model that returns no tensor),
    FloatingPointError (NaN or infinity, naming the layer).
    Source: arXiv 2310.20203; molchanov-*: arXiv 1906.10771.
    """
    reads_weights = importance in WEIGHT_IMPORTANCES and (reduction, ablation) == ("sum", "zero")
    distribution = "none" if reads_weights else "basis" if probes == "exact" else distribution
    origin = Origin(importance, reduction, "none" if reads_weights else gradient, normalize and not reads_weights,
                    seed, distribution, "", units, ablation, layerwise, center, sample_dims)
    tokens.check(sample_dims, probes, compile)
    _check(batches, origin, probes, samples, agreement, precision)
    check(origin, samples, resume=resume, process_group=process_group, fixed_order=fixed_order)
    if isinstance(samples, int) and isinstance(batches, SliceableBatches):
        batches = batches.first(samples)
    model = unwrapped(model)
    ignore = matching_layers(model, ignore)
    with fork_rng(device_of(model)), torch.inference_mode(False), torch.enable_grad(), without_checkpoints():
        eval_model = evaluation_copy(model)
        on_device = partial(_on_device, device=device_of(eval_model),
                            samples=samples if isinstance(samples, int) else None)
        stream = on_device(batches[:1] if isinstance(batches, SliceableBatches) else batches)
        example = next(stream, None)
        if example is None:
            raise ValueError("batches: there is none to score on, or none that holds a sample")
        # One sample is enough to trace with, where it is known how to take it.
        traced = _first_samples(example, len(first_input(example)), 1) if forward is call_model else example
        graph = trace(model, traced, forward)
        if reads_weights:
            return _score_weights(eval_model, graph, origin, ignore)
        totals = Totals(eval_model, graph, origin, ignore)
        taps = totals.taps(traceable=True)
        for weight in taps.weights.values():
            weight.requires_grad_()
        plan, run = prepare(eval_model, taps, graph.normalized_by, traced, forward, precision, compile)
        if isinstance(resume, (str, PathLike)):
            resume = Checkpoint(resume)
        known = run_fingerprint(model, asdict(totals.origin), probes=probes, ignored=sorted(ignore), loss=loss,
                         forward=forward, precision=precision, compile=compile) \
            if resume is not None or process_group is not None else {}
        work = Run(totals, known, example, batches if isinstance(batches, SliceableBatches) else stream, on_device,
                   resume, process_group, fixed_order)
        total = samples // work.size if isinstance(samples, int) else None
        with taps, work, tqdm(total=total, initial=work.samples, unit=" samples", desc="scoring",
                             disable=not progress or work.rank > 0) as bar:
            for totals, batch in work:
                with taps.one_pass(batch):
                    output = run(eval_model, batch)
                assert taps.current is not None
                valid = taps.current.valid
                if compile and valid is not None:
                    raise ValueError("compile: the batch has padding, which compiled taps do not know of; use "
                                     "compile=False")
                if not torch.isfinite(output).all() and (culprit := first_nonfinite(model, batch, forward)) is not None:
                    raise FloatingPointError(culprit)
                if gradient == "loss":
                    sent = tokens.loss_gradient(output, batch, loss, totals.origin, valid)
                    sent = sent / len(sent) if totals.criterion.minibatch and normalize else sent
                    totals.propagate(taps, output, sent, last=True)
                else:
                    count = probes if isinstance(probes, int) else gradients.classes_of(output)
                    for probe in range(count):
                        totals.probe(taps, output, last=probe == count - 1)
                if (layer := totals.nonfinite) is not None:
                    raise FloatingPointError(first_nonfinite(model, batch, forward) or
                                             f"{layer}: NaN or infinity in the gradient that reaches its channels")
                bar.update(len(output))
                del output  # and its graph, which would otherwise live on beside the next one
                if samples == "auto" and _settled(totals, *agreement):
                    break
        return replace(work.totals().scores(), plan=plan)


def _check(batches: object, origin: Origin, probes: object, samples: object, agreement: tuple[float, float],
           precision: object) -> None:
    for name, value, word in (("probes", probes, "exact"), ("samples", samples, "auto")):
        if (value != word) if isinstance(value, str) else (isinstance(value, int) and value < 1):
            raise ValueError(f"{name}: {value!r}; it must be {word!r}, or 1 or more")
    if not (0 < agreement[0] < 1 and 0 < agreement[1] <= 1):
        raise ValueError(f"agreement: {agreement}; it is (fraction, share): the halves agree on that share of the "
                         "channels that each would prune, 0 < fraction < 1 and 0 < share <= 1")
    if isinstance(batches, (Tensor, Mapping)) or not isinstance(batches, Iterable):
        shown = "one tensor" if isinstance(batches, Tensor) else type(batches).__name__
        raise TypeError(f"batches: {shown}, where an iterable of batches is meant; for a single one: [batch]")
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(f"precision: {precision!r} is neither None nor {' nor '.join(map(repr, PRECISIONS))}")
    if origin.gradient == "loss" and probes != 1:
        raise ValueError(f'probes: {probes}, but a loss has one gradient; use gradient="random" for more')
    if origin.distribution == "basis" and probes != "exact":
        raise ValueError('distribution: "basis" takes one probe for each output: use probes="exact"')
    if probes == "exact" and origin.importance != "taylor-sq":
        raise ValueError(f'probes: "exact" is the mean square over all outputs, and {origin.importance} is no mean '
                         'square: use importance="taylor-sq", or a number of probes')


def _settled(totals: Totals, fraction: float, share: float) -> bool:
    """Whether two halves of the samples would prune the same channels, but for a few."""
    return totals.samples >= AUTO_LEAST and totals.scores().overlap(fraction) >= share


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
    return Scores(totals, origin, skipped=skipped)


def _on_device(batches: Iterable[Batch], device: torch.device, samples: int | None) -> Iterator[Batch]:
    """The batches on `device`, cut off after `samples` samples."""
    left = samples
    for batch in batches:
        tensor = first_tensor(batch)
        if tensor is not None and tensor.dim() and not len(tensor):
            continue  # a loss over no sample is NaN
        batch = map_tensors(lambda tensor: _usable(tensor).to(device, non_blocking=True), batch)
        if left is not None:
            count = len(first_input(batch))
            if count > left:
                batch = _first_samples(batch, count, left)
            left -= min(left, count)
        yield batch
        if left == 0:
            return


def _usable(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_inference() else tensor  # autograd takes none made under inference_mode


def _first_samples(batch: Batch, count: int, keep: int) -> Batch:
    """The first `keep` of a batch's `count` samples."""
    return map_tensors(lambda tensor: tensor[:keep] if tensor.dim() and len(tensor) == count else tensor, batch)
