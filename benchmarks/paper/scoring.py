"""Many variants from shared passes: one forward pass, and one backward pass for each kind of output gradient."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from benchmarks.paper.data import Images
from benchmarks.paper.helped import torch_pruning_taylor
from benchmarks.paper.variants import HELPED, Variant
from fastscore import Scores, fingerprints
from fastscore.graph.scored_units import Units
from fastscore.graph.tracing import trace
from fastscore.modules.evaluation_copy import evaluation_copy
from fastscore.scoring import gradients
from fastscore.scoring.scores import Origin
from fastscore.scoring.tap_points import groups_to_score
from fastscore.scoring.totals import Totals
from fastscore.scoring.weights import WEIGHT_IMPORTANCES
from fastscore.taps.measures import Measure

BATCH = 32  # the paper's, for the molchanov criteria


def score_variants(model: nn.Module, images: Images, variants: Iterable[Variant], units: Units,
                   seed: int = 0) -> dict[str, Mapping[str, Tensor]]:
    """Variant's name -> importances of `model`'s units on all of `images`, as fastscore.score gives them on batches of
    32 (Scores), or as Torch-Pruning does (a dict)."""
    variants = list(variants)
    helped: dict[str, Mapping[str, Tensor]] = {}
    for variant in (variant for variant in variants if variant in HELPED):
        labels = images.labels if variant.gradient == "loss" else None
        helped[variant.name] = torch_pruning_taylor(model, images.images, labels, BATCH, seed)
    return helped | _own(model, images, [variant for variant in variants if variant not in HELPED], units, seed)


def _own(model: nn.Module, images: Images, variants: Iterable[Variant], units: Units, seed: int) -> dict[str, Scores]:
    eval_model = evaluation_copy(model).to(memory_format=torch.channels_last)
    graph = trace(eval_model, images.images[:1], units=units)
    families: dict[Measure, dict[Variant, Totals]] = {}
    found: dict[str, Scores] = {}
    for variant in variants:
        if variant.importance in WEIGHT_IMPORTANCES:
            origin = Origin(variant.importance, "sum", "none", False, seed, "none", "", units)
            groups, origin = groups_to_score(eval_model, graph, origin, ())
            values = {group.name: WEIGHT_IMPORTANCES[variant.importance](eval_model, group, seed)
                      for group in groups.groups}
            found[variant.name] = Scores({name: value for name, value in values.items() if value is not None}, origin)
        else:
            origin = Origin(variant.importance, variant.reduction, variant.gradient, variant.normalize, seed, "normal",
                            "", units, variant.ablation, variant.layerwise)
            totals = Totals(eval_model, graph, origin)
            families.setdefault(totals.criterion.measure, {})[variant] = totals
    for family in families.values():
        _measure(eval_model, images, family, seed)
        found |= {variant.name: totals.scores() for variant, totals in family.items()}
    means = next((scores.means for scores in found.values() if scores.means), {})
    return {name: scores if scores.means else replace(scores, means=means) for name, scores in found.items()}


def _measure(model: nn.Module, images: Images, family: Mapping[Variant, Totals], seed: int) -> None:
    """Fill the totals, which all read the same measure."""
    # those that measure most: weight gradients, or a channel's whole input where a convolution strides over part of it
    taps = max(family.values(), key=lambda totals: (totals.criterion.filters, totals.criterion.edges)).taps()
    for weight in taps.weights.values():
        weight.requires_grad_()
    with taps, torch.enable_grad():
        for x, labels in zip(images.images.split(BATCH), images.labels.split(BATCH), strict=True):
            output = model(x.contiguous(memory_format=torch.channels_last))
            for kind in ("loss", "random"):
                if any(variant.gradient == kind for variant in family):
                    v = gradients.loss_and_gradient(output, (x, labels), None, False)[1] if kind == "loss" else \
                        gradients.random_gradient(output, fingerprints.sample_ids(x), seed, 0, "normal", False)
                    _send(taps.propagate, output, v, {variant: totals for variant, totals in family.items()
                                                      if variant.gradient == kind})


def _send(propagate: object, output: Tensor, v: Tensor, family: Mapping[Variant, Totals]) -> None:
    """One backward pass for all; further ones, of other gradients, for criteria that read filters."""
    assert callable(propagate)
    samples, length = len(output), v.double().norm(dim=1)
    sums, weights = propagate(output, v)
    scaled: dict[bool, dict[str, Tensor]] = {}  # normalised? -> weight gradients of the minibatch's mean
    for variant, totals in family.items():
        if totals.criterion.filters and (variant.normalize or variant.gradient == "random"):
            if variant.normalize not in scaled:
                mean = v / samples / (length[:, None] if variant.normalize else 1)
                scaled[variant.normalize] = propagate(output, mean.to(v))[1]
            totals.add(sums, samples, weight_gradients=scaled[variant.normalize])
        elif totals.criterion.minibatch and variant.gradient == "random" and not variant.normalize:
            totals.add(sums, samples, torch.ones_like(length), weight_gradients=weights)  # the mean of the minibatch
        else:
            totals.add(sums, samples, length if variant.normalize else None, weight_gradients=weights)
