"""The contestants: which channels go, and what is done for the network afterwards. All get the same unlabelled images.

fastscore's methods are a choice and a repair, "CHOICE / REPAIR"; Torch-Pruning's a criterion and a scope,
"tp CRITERION SCOPE", as they come and, with " / recalibrated", with their BatchNorms measured anew.
"""

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

import fastscore
from benchmarks.recovery import peers
from benchmarks.recovery.networks import Task
from fastscore.graph.tracing import trace

# choice -> (importance, what scores replace a channel by, importance per MAC or not)
CHOICES = {"per MAC": ("taylor-sq", "mean", True), "per MAC, zero ablation": ("taylor-sq", "zero", True),
           "importance alone": ("taylor-sq", "zero", False), "L2 norm": ("magnitude-l2", "zero", False),
           "random": ("random", "zero", False)}
FASTSCORE = {"per MAC": ("mean", "recalibrated", "linear", "linear, recalibrated", "asymmetric", "default"),
             "per MAC, zero ablation": ("mean", "default"),
             "importance alone": ("mean", "default"),
             "L2 norm": ("default",),
             "random": ("default",)}
PEERS = tuple(f"tp {criterion} {scope}" for criterion in ("magnitude", "taylor", "bn-scale")
              for scope in ("local", "global"))
FILTER_NORM = "tp filter-norm local"  # for the fine-tuning study alone
DEFAULT, MEAN, FORMER = "per MAC / default", "per MAC / mean", "importance alone / mean"
METHODS = (*(f"{choice} / {repair}" for choice, repairs in FASTSCORE.items() for repair in repairs),
           *(name for peer in PEERS for name in (peer, f"{peer} / recalibrated")))


@dataclass(frozen=True)
class Smaller:
    """A smaller network, and the seconds that choosing, cutting and repairing took (scoring apart)."""

    method: str
    budget: float
    model: nn.Module
    seconds: float
    note: str = ""


def smaller(task: Task, images: Tensor, wanted: Mapping[float, Sequence[str]], seed: int, kept: Path
            ) -> Iterator[Smaller]:
    """The networks of one choice or peer: budget -> methods, whose names all begin alike.

    fastscore's scores are kept in, and read from, files `kept`-*.
    """
    head = next(iter(wanted.values()))[0].split(" / ")[0]
    if head.startswith("tp "):
        return _peer(task, images, head, wanted)
    return _fastscore(task, images, head, wanted, seed, kept)


def _fastscore(task: Task, images: Tensor, choice: str, wanted: Mapping[float, Sequence[str]], seed: int,
               kept: Path) -> Iterator[Smaller]:
    importance, ablation, per_mac = CHOICES[choice]
    batches = images.split(task.batch)
    path = kept.with_name(f"{kept.name}-{ablation if importance == 'taylor-sq' else importance}.safetensors")
    scores = _kept_scores(path, trace(task.model, images[:1]).fingerprint)
    if scores is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        scores = fastscore.score(task.model, batches, importance=importance, ablation=ablation, seed=seed,
                                 progress=False)
        scores.save(path)
    for budget, methods in wanted.items():
        start = time.perf_counter()
        cut = fastscore.prune(task.model, scores, images[:1], macs=budget, cost_aware=per_mac)
        cutting = time.perf_counter() - start
        for method in methods:
            start = time.perf_counter()
            result, note = cut, ""
            repair = method.split(" / ")[1]
            if repair == "default":
                result = fastscore.prune(task.model, scores, images[:1], macs=budget, cost_aware=per_mac,
                                         calibration=batches, measured=None if per_mac else False)
                note = next((str(row) for row in result.report.repairs if row.chosen), "")
            elif repair.split(", ")[0] in ("linear", "asymmetric"):
                result = fastscore.reconstruct(task.model, cut, batches, repair.split(", ")[0])
            model = _recalibrated(result.model, batches) if "recalibrated" in repair else result.model
            yield Smaller(method, budget, model, time.perf_counter() - start + cutting, note)


def _kept_scores(path: Path, fingerprint: str) -> fastscore.Scores | None:
    """Those of a file, if it is of this version and of a model that is connected alike."""
    try:
        scores = fastscore.Scores.load(path)
    except (FileNotFoundError, ValueError):
        return None
    return scores if scores.origin.fingerprint == fingerprint else None


def _peer(task: Task, images: Tensor, peer: str, wanted: Mapping[float, Sequence[str]]) -> Iterator[Smaller]:
    _, criterion, scope = peer.split(" ")
    start = time.perf_counter()
    for budget, model in peers.smaller(task.model, criterion, scope, images, task.batch, tuple(wanted), task.ignored):
        cutting = time.perf_counter() - start
        for method in wanted[budget]:
            start = time.perf_counter()
            found = _recalibrated(model, images.split(task.batch)) if "recalibrated" in method else model
            yield Smaller(method, budget, found, cutting + time.perf_counter() - start)
        start = time.perf_counter() - cutting


def has_batch_norm(model: nn.Module) -> bool:
    """Whether there are statistics to recalibrate."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def _recalibrated(model: nn.Module, batches: Sequence[Tensor]) -> nn.Module:
    return fastscore.recalibrate(copy.deepcopy(model), batches) if has_batch_norm(model) else model


def applicable(task: Task, methods: Sequence[str]) -> list[str]:
    """Those of `methods` that say something of the network: without BatchNorms there is none to recalibrate or read."""
    if has_batch_norm(task.model):
        return list(methods)
    return [method for method in methods if "recalibrated" not in method and "bn-scale" not in method]
