"""One piece of the experiment: a trained network, scored once with several variants, and their curves."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.paper import data, scoring, training
from benchmarks.paper.evaluation import Evaluator
from benchmarks.paper.variants import ABLATION, BASELINES, ELEMENT, HELPED, LAYERWISE, PAPER, Variant

FIELDS = ("dataset", "network", "training_seed", "scoring_seed", "samples", "units", "variant", "compensated",
          "removed", "total", "right", "images")
KEY = FIELDS[:8]
# what is compared -> (units, variants, with and without compensation)
EXPERIMENTS: dict[str, tuple[str, tuple[Variant, ...], tuple[bool, ...]]] = {
    "paper": ("norms", (*PAPER, *ELEMENT, *LAYERWISE), (False,)),
    "compensation": ("groups", (*ABLATION, *BASELINES, *ELEMENT[1::2], *LAYERWISE), (False, True)),
    "helped": ("groups", HELPED, (False,)),
}


@dataclass(frozen=True)
class Work:
    """One trained network, scored once with the variants of an experiment, and their curves."""

    options: argparse.Namespace
    experiment: str
    samples: str
    scoring_seed: int
    training_seed: int
    network: str

    def key(self, variant: Variant, compensated: bool) -> tuple[str, ...]:
        """What tells a curve from others in the CSV."""
        return tuple(map(str, (self.options.dataset, self.network, self.training_seed, self.scoring_seed, self.samples,
                               EXPERIMENTS[self.experiment][0], variant.name, int(compensated))))


def curves(job: tuple[Work, list[tuple[Variant, bool]]]) -> list[dict[str, object]]:
    """The CSV rows of the curves that are wanted."""
    work, wanted = job
    options = work.options
    torch.set_num_threads(max(1, torch.get_num_threads() // options.jobs))
    images = data.load(options.dataset, options.data, device=options.device)
    model = training.trained(work.network, images, work.training_seed, options.epochs, Path(options.networks_folder))
    order = torch.randperm(len(images.train.labels), generator=torch.Generator().manual_seed(work.scoring_seed))
    chosen = order if work.samples == "all" else order[:int(work.samples)]
    chosen = chosen.to(images.train.images.device)
    units, variants, _ = EXPERIMENTS[work.experiment]
    needed = {variants[0], *(variant for variant, _ in wanted)}  # the first lends its means to those that measure none
    scores = scoring.score_variants(model, data.Images(images.train.images[chosen], images.train.labels[chosen]),
                                    [variant for variant in variants if variant in needed], units, work.scoring_seed)
    evaluator = Evaluator(model, images.test, units)
    return [dict(zip(KEY, work.key(variant, compensated), strict=True), **row) for variant, compensated in wanted
            for row in evaluator.curve(scores[variant.name], compensated, options.stride)]
