"""score(): batches in, a score for every channel out; the model comes back as it went in."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastscore import gradients
from fastscore.batches import Batch, Forward, checked, device_of, fork_rng, map_tensors
from fastscore.batches import forward as call_model
from fastscore.evaluation import evaluation_copy, fold_batchnorms, to_channels_last
from fastscore.groups import ChannelGraph, Ignore, matching_layers
from fastscore.importance import WEIGHT_IMPORTANCES
from fastscore.scorer import Gradient, Scorer, scorable
from fastscore.scores import Origin, Scores
from fastscore.tracing import trace


def score(model: nn.Module, batches: Iterable[Batch], *, importance: str = "taylor-sq",
          gradient: Gradient = "random", normalize: bool = True, reduction: Literal["sum", "element"] = "sum",
          probes: int = 1, samples: int | None = None, seed: int = 0, distribution: str = "normal",
          loss: gradients.Loss | None = None, forward: Forward = call_model, ignore: Ignore = (),
          progress: bool = True) -> Scores:
    """Score every channel of `model` on `batches`, without labels unless gradient="loss".

    The work is done on a copy of the model, in evaluation mode with frozen weights.

    batches: tensors [N, ...], tuples (the first element is the input) or dicts (keyword arguments); moved to the
    model's device. importance: "taylor", "taylor-abs" or "taylor-sq" (activation x gradient), or "magnitude-l1",
    "magnitude-l2", "bn-scale", "random", which read only the weights. gradient: "random" (no labels) or "loss".
    normalize: scale each sample's output gradient to length 1. reduction: "sum" over a channel's positions before the
    absolute value or square, or "element". probes: random gradients for each sample. samples: stop after so many.
    seed: of the random gradients, which depend on it, the sample's content and the probe alone, so that scores do not
    depend on batch size or order. distribution: "normal" or "rademacher". loss(output, batch) -> scalar (default:
    cross entropy with the labels of (input, label) batches); its gradient is taken as it stands when normalize=False.
    forward(model, batch) -> output [N, ...], for models that are called otherwise. ignore: layer names (with `*`),
    types or modules to leave out. progress: show a bar.

    Raises ValueError (no channel to score, no labels for a loss gradient, a loss that is not finite, a batch the model
    cannot take), TypeError (a model that returns no tensor), FloatingPointError (NaN or infinity, naming the layer).
    Source: arXiv 2310.20203.
    """
    for name, value in (("probes", probes), ("samples", samples)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: {value}; it must be 1 or more")
    if isinstance(batches, (Tensor, Mapping)) or not isinstance(batches, Iterable):
        shown = "one tensor" if isinstance(batches, Tensor) else type(batches).__name__
        raise TypeError(f"batches: {shown}, where an iterable of batches is meant; for a single one: [batch]")
    if gradient == "loss" and probes != 1:
        raise ValueError(f'probes: {probes}, but a loss has one gradient; use gradient="random" for more')
    ignore = matching_layers(model, ignore)
    twin = evaluation_copy(model)
    with fork_rng(device_of(twin)), torch.inference_mode(False), torch.enable_grad():
        stream = _on_device(batches, device_of(twin), samples)
        example = next(stream, None)
        if example is None:
            raise ValueError("batches: there is none to score on")
        # One sample is enough to trace with, where it is known how to take it.
        traced = _first_samples(example, len(gradients.first_input(example)), 1) if forward is call_model else example
        if importance in WEIGHT_IMPORTANCES and reduction == "sum":
            return _score_weights(twin, traced, importance, seed, forward, ignore)
        graph = trace(twin, traced, forward)
        scorer = Scorer(twin, graph, importance=importance, gradient=gradient, normalize=normalize,
                        reduction=reduction, seed=seed, distribution=distribution, ignore=ignore)
        run = checked(_fast(twin, graph, forward))
        with scorer, tqdm(total=samples, unit=" samples", desc="scoring", disable=not progress) as bar:
            for batch in itertools.chain([example], stream):
                with scorer.joined(batch):
                    output = run(twin, batch)
                if not torch.isfinite(output).all() and (culprit := _blame(model, batch, forward)) is not None:
                    raise FloatingPointError(culprit)
                if gradient == "loss":
                    scorer.propagate(output, gradients.loss_gradient(output, batch, loss, normalize))
                else:
                    for _ in range(probes):
                        scorer.probe(output)
                if (layer := scorer.nonfinite_layer()) is not None:
                    raise FloatingPointError(_blame(model, batch, forward) or
                                             f"{layer}: NaN or infinity in the gradient that reaches its channels")
                bar.update(len(output))
                del output  # and its graph, which would otherwise live on beside the next one
        return scorer.scores()


def _fast(twin: nn.Module, graph: ChannelGraph, forward: Forward) -> Forward:
    """Make the evaluation copy fast, in place; the `forward` to call it with."""
    fold_batchnorms(twin, graph.normalized_by)
    if not any(isinstance(module, nn.Conv2d) for module in twin.modules()):
        return forward
    twin.to(memory_format=torch.channels_last)
    return lambda model, batch: forward(model, to_channels_last(batch))


def _score_weights(model: nn.Module, example: Batch, importance: str, seed: int, forward: Forward,
                   ignore: Ignore) -> Scores:
    graph = trace(model, example, forward)
    origin = Origin(importance, "sum", "none", False, seed, "none", graph.fingerprint)
    graph = scorable(model, graph, ignore)
    totals: dict[str, Tensor] = {}
    skipped = dict(graph.skipped)
    for group in graph.groups:
        values = WEIGHT_IMPORTANCES[importance](model, group, seed)
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
        batch = map_tensors(lambda tensor: _usable(tensor).to(device, non_blocking=True), batch)
        if left is not None:
            count = len(gradients.first_input(batch))
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


def _blame(model: nn.Module, batch: Batch, forward: Forward) -> str | None:
    """The first layer, in the order they run, that turns finite input into NaN or infinity; None if none does."""
    found: list[str] = []
    model = evaluation_copy(model)

    def look(name: str, module: nn.Module) -> None:
        def hook(module: nn.Module, args: tuple[object, ...], output: object) -> None:
            if isinstance(output, Tensor) and not torch.isfinite(output).all():
                weights = any(not torch.isfinite(parameter).all() for parameter in module.parameters())
                found.append(f"{name}: NaN or infinity in its {'weights' if weights else 'output'}")

        module.register_forward_hook(hook)

    tensor = gradients.first_input(batch)
    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
        return "batches: NaN or infinity in the input"
    for name, module in model.named_modules():
        if not any(module.children()):
            look(name, module)
    with torch.no_grad():
        forward(model, batch)
    return found[0] if found else None
