"""prune_iteratively(): to a budget in steps, each scored anew, with the user's fine-tuning in between."""

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastscore import files, rng
from fastscore.arguments import check_callable, check_path, check_whole
from fastscore.batches.calls import call_model
from fastscore.batches.parts import Batch
from fastscore.default_device import keeps_own_on_cpu
from fastscore.fingerprints import run_fingerprint
from fastscore.graph.groups import LayerNames, listed, matching_layers
from fastscore.graph.tracing import trace
from fastscore.modules.evaluation_copy import evaluation_copy, own_copies
from fastscore.modules.inspection import device_of
from fastscore.modules.wrappers import unwrapped
from fastscore.pruning.budgets import clocks, latency
from fastscore.pruning.curve import example_of
from fastscore.pruning.options import Budgets
from fastscore.pruning.prune import prune
from fastscore.pruning.report import GroupReport, PruneReport
from fastscore.pruning.result import PruneResult
from fastscore.pruning.saved import recipes
from fastscore.pruning.saved.checkpoint import load_state
from fastscore.recovery.held_out import check_batches
from fastscore.scoring.engine import score
from fastscore.scoring.scores import Scores

Schedule = Literal["geometric", "linear"]
Finetune = Callable[[nn.Module], None]
# (what remains at the end, how much of the way is gone) -> what remains there
SCHEDULES: Mapping[str, Callable[[float, float], float]] = {
    "geometric": lambda share, way: share ** way,  # every step takes the same share of what is left
    "linear": lambda share, way: 1 - (1 - share) * way,  # every step takes as much
}
FORM = "fastscore-iterative-1"
_OURS = {"model", "scores", "example_inputs", "batches", "channels", "params", "macs", "latency", "inplace",
         "resume"}
_QUALITY = {"agreement", "kl", "confidence", "held_out"}  # budgets of prune() in the place of those of a step
_SCORING = set(inspect.signature(score).parameters) - _OURS
_PRUNING = set(inspect.signature(prune).parameters) - _OURS - _QUALITY
_TRIES = 4  # at a latency that is measured anew


@dataclass(frozen=True, repr=False)
class IterativeResult(PruneResult):
    """A PruneResult, from the model that was given to the last one.

    Attributes:
        steps: the report of each step, from the model before it.
    """

    steps: tuple[PruneReport, ...]


@keeps_own_on_cpu
def prune_iteratively(model: nn.Module, batches: Iterable[Batch], example_inputs: Batch = None, *, steps: int,
                      channels: float | None = None, params: float | None = None, macs: float | None = None,
                      latency: float | None = None, finetune: Finetune | None = None,
                      schedule: Schedule = "geometric", resume: str | PathLike[str] | None = None,
                      **options: Any) -> IterativeResult:
    """Score, prune a little and fine-tune, `steps` times, until the budgets of the last step hold; `model` stays.

    Args:
        model: the dense model, which is left as it is.
        batches: what fastscore.score takes, read anew in every step: a list or a DataLoader, no generator.
        example_inputs: for prune (default: the first sample of the first batch).
        steps: how many, 1 or more.
        channels, params, macs, latency: one or more budgets, each what REMAINS of `model` at the end; every step is
            given budgets on the way there. A latency is measured against `model` again after the last step, and must
            hold there.
        finetune: finetune(model) trains the smaller model in place, after every step; it is in the mode that `model` is
            in.
        schedule: "geometric" (each step takes the same share of what is left) or "linear" (each takes as much).
        resume: a file written after every step. Where it is there already, the steps in it are not done again: killed
            and called again with the same arguments, the result is the one of an uninterrupted run, as far as
            `finetune` is a function of the model, the data and the random numbers of torch, Python and numpy; in step i
            these start from seed + i, and the caller's come back as they were.
        options: those of fastscore.score (importance, samples, seed, ...) and fastscore.prune (scope, round_to,
            compensate, ...); floor counts in channels of `model`; ignore and forward go to both.

    Returns:
        The last model, what was done from the first to the last, and the report of each step.

    Raises:
        TypeError: an option that neither score nor prune has, batches that are no iterable.
        ValueError: batches that can be read only once, a file of another model or other arguments, a budget that a step
            cannot reach, and whatever score and prune raise.
    """
    _check(batches, steps, schedule, options)
    if finetune is not None:
        check_callable("finetune", finetune, "finetune(model)")
    if resume is not None:
        check_path("resume", resume)
    shares = Budgets(channels, params, macs, latency).require_one("prune_iteratively").given
    model = unwrapped(model)
    device, seed = device_of(model), options.get("seed", 0)
    with rng.fork_rng(device):
        rng.seed(seed)
        example = example_of(batches, example_inputs, options.get("forward", call_model), device, samples=1)
    options["ignore"] = _ignored(model, example, options)
    same = run_fingerprint(model, {}, steps=steps, schedule=schedule, shares=shares,
                           **{**options, "ignore": sorted(options["ignore"])})
    run = _Run(model, example, options)
    if resume is not None and Path(resume).exists():
        run.load(resume, same)
    for step in range(len(run.reports) + 1, steps + 1):
        with rng.fork_rng(device):
            rng.seed(seed + step)
            targets = {name: SCHEDULES[schedule](share, step / steps) for name, share in shares.items()}
            try:
                run.step(batches, targets, last=step == steps)
            except ValueError as error:
                wanted = ", ".join(f"{name} {share:.4g} of the original" for name, share in targets.items())
                raise ValueError(f"step {step} of {steps} ({wanted}): {error}{run.lost()}") from error
            if finetune is not None:
                _finetuned(run.current, finetune)
        if resume is not None:
            run.save(resume, same)
    return run.result()


def _finetuned(model: nn.Module, finetune: Callable[[nn.Module], object]) -> None:
    """Raises TypeError where a function returns another model than the one that it was to train: nobody would see it.
    """
    returned = finetune(model)
    if isinstance(returned, nn.Module) and unwrapped(returned) is not model:
        raise TypeError(f"finetune: it returned another {type(returned).__name__}, where it is meant to train the one "
                        "that it is given, in place: load what was trained into that, model.load_state_dict(...), and "
                        "return nothing")


def _ignored(model: nn.Module, example: Batch, options: Mapping[str, Any]) -> LayerNames:
    """The names of what is ignored, which hold for every step. Some are found by tracing the model."""
    ignore = listed(options.get("ignore", ()))
    if any(isinstance(entry, str) for entry in (ignore if isinstance(ignore, tuple) else (ignore,))):
        trace(model, example, options.get("forward", call_model), units=options.get("units", "groups"))
    return matching_layers(model, ignore)


class _Run:
    """A model on its way from `dense` down."""

    def __init__(self, dense: nn.Module, example: Batch, options: Mapping[str, Any]) -> None:
        self.dense, self.current, self._example = dense, dense, example
        self._scoring = {name: value for name, value in options.items() if name in _SCORING}
        self._pruning = {name: value for name, value in options.items() if name in _PRUNING}
        self.reports: list[PruneReport] = []
        self.removed: dict[str, Tensor] = {}
        self.removed_indices: dict[Any, Tensor] = {}
        self.new_biases: tuple[str, ...] = ()
        self._skipped: Mapping[str, str] = {}  # when it was last scored

    def lost(self) -> str:
        """Which groups that an earlier step knew can lose no more, and why; empty where there are none."""
        return "".join(f"; {name} can lose no more: {self._skipped[name]}" for name in self._rows()
                       if name in self._skipped)

    def step(self, batches: Iterable[Batch], targets: Mapping[str, float], last: bool) -> None:
        """One step down to `targets`, shares of the dense model; none where they hold already."""
        if self.reports and self._hold(targets):
            self.reports.append(_unchanged(self.reports[-1]))
            return
        scores = score(self.current, batches, **self._scoring)
        self._skipped = scores.skipped
        budgets: dict[str, Any] = {
            name: self._of_current(name, share, scores) for name, share in targets.items()
            if name != "latency"}
        pruning = {**self._pruning, "floor": self._floors(scores)}
        if "latency" in targets:
            result = self._to_latency(scores, budgets, targets["latency"], last, pruning)
        else:
            result = prune(self.current, scores, self._example, **budgets, **pruning)
        self.current = result.model
        self.reports.append(result.report)
        self.removed = recipes.compose(self.removed, result.removed)
        self.removed_indices = recipes.compose(self.removed_indices, result.removed_indices)
        self.new_biases += result.new_biases

    def _hold(self, targets: Mapping[str, float]) -> bool:
        first, last = self.reports[0], self.reports[-1]
        before, after = self._channels()
        left = {"macs": last.macs[1] / first.macs[0], "params": last.params[1] / first.params[0],
                "channels": after / before}
        return all((self._time_of(self.current) if name == "latency" else left[name]) <= share
                   for name, share in targets.items())

    def _of_current(self, unit: str, share: float, scores: Scores) -> float:
        """A share of the dense model's `unit` as one of the current model's (of the channels that can still go)."""
        if not self.reports:
            return share
        before: int = getattr(self.reports[0], unit)[0]
        after: int = getattr(self.reports[-1], unit)[1]
        if unit == "channels":
            before, left = self._channels()
            after = sum(map(len, scores.values()))
            known = self._rows()
            new = sum(len(values) for layer, values in scores.items() if layer not in known)
            before, left = before + new, left + new
            return max(min(1.0, (share * before - (left - after)) / after), 1e-9)
        return min(1.0, share * before / after)

    def _rows(self) -> dict[str, GroupReport]:
        """Of each group, as the first step that knew it had it, such as one that fine-tuning let go, and what the last
        one left."""
        rows: dict[str, GroupReport] = {}
        for report in self.reports:
            for row in report.groups:
                first = rows.get(row.layer, row)
                rows[row.layer] = GroupReport(row.layer, (first.channels[0], row.channels[1]),
                                              (first.macs[0], row.macs[1]), (first.params[0], row.params[1]))
        return rows

    def _channels(self) -> tuple[int, int]:
        """Of all groups that a step knew, before it and now."""
        before, after = zip(*(row.channels for row in self._rows().values()), strict=True)
        return sum(before), sum(after)

    def _floors(self, scores: Scores) -> float | Mapping[str, float]:
        """The floors of the dense model as shares of the current model's channels."""
        floor: float | Mapping[str, float] = self._pruning.get("floor", 0.0)
        if not self.reports:
            return floor
        floors = {}
        for layer, values in scores.items():
            share = floor.get(layer, 0.0) if isinstance(floor, Mapping) else floor
            floors[layer] = min(1.0, share * (len(values) + len(self.removed.get(layer, ()))) / len(values))
        return floors

    def _to_latency(self, scores: Scores, budgets: Mapping[str, Any], target: float, last: bool,
                    pruning: Mapping[str, Any]) -> PruneResult:
        share = target / self._time_of(self.current)
        for _ in range(_TRIES):
            result = prune(self.current, scores, self._example, latency=min(1.0, share), **budgets, **pruning)
            reached = self._time_of(result.model) if last else 0.0
            if reached <= target:
                return result
            share *= 0.99 * target / reached
        raise ValueError(f"latency: {target:g} of the dense model's time was asked for, and {reached:.4g} is what the "
                         f"last of {_TRIES} tries measured; ask for more, or measure on a machine with less to do")

    def _time_of(self, model: nn.Module) -> float:
        """What remains of the dense model's time."""
        if model is self.dense:
            return 1.0
        dense, model = evaluation_copy(self.dense), evaluation_copy(model)
        forward, clock = self._pruning.get("forward", call_model), self._pruning.get("clock", "torch")
        one, two = (clocks.runner(clock, each, self._example, forward) for each in (dense, model))
        return latency.time_pair(one, two, device_of(dense), 2).share

    def save(self, path: str | PathLike[str], same: Mapping[str, Any]) -> None:
        recipe = recipes.new_recipe(self.dense, self.removed_indices, self.new_biases)
        header = {"same": same, "recipe": recipe, "reports": [asdict(report) for report in self.reports],
                  "training": [name for name, module in self.current.named_modules() if module.training],
                  "removed": {layer: index.tolist() for layer, index in self.removed.items()}}
        files.write(path, FORM, header, self.current.state_dict())

    def load(self, path: str | PathLike[str], same: Mapping[str, Any]) -> None:
        """Go on from a checkpoint. Raises ValueError for one that is damaged, or of another run."""
        header, state = files.read(path, FORM, "checkpoint of prune_iteratively", "delete it to start again")
        differing = [name for name in same if header["same"].get(name) != same[name]]
        if differing:
            raise ValueError(f"resume: {path} is of another run, which differs in {', '.join(differing)}; give "
                             "the same model and arguments, or delete it to start again")
        self.reports = [PruneReport.of(report) for report in header["reports"]]
        self.removed = {layer: torch.tensor(index) for layer, index in header["removed"].items()}
        self.removed_indices = dict(recipes.indices_of(header["recipe"]))
        self.new_biases = tuple(header["recipe"]["biases"])
        model = recipes.apply(copy.deepcopy(self.dense, own_copies(self.dense)), header["recipe"])
        recipes.attach(model, recipes.extend(self.dense, self.removed_indices, self.new_biases))
        self.current = load_state(model, state)
        for name, module in self.current.named_modules():
            module.training = name in header["training"]

    def result(self) -> IterativeResult:
        first, last = self.reports[0], self.reports[-1]
        report = replace(last, groups=tuple(self._rows().values()),
                         channels=self._channels(),
                         macs=(first.macs[0], last.macs[1]), params=(first.params[0], last.params[1]),
                         skipped=first.skipped)
        return IterativeResult(self.current, report, self.removed, self.removed_indices, self.new_biases,
                               tuple(self.reports))


def _unchanged(report: PruneReport) -> PruneReport:
    """The report of a step after that of `report`, in which nothing went."""
    def still(pair: tuple[int, int]) -> tuple[int, int]:
        return pair[1], pair[1]

    groups = tuple(GroupReport(row.layer, still(row.channels), still(row.macs), still(row.params))
                   for row in report.groups)
    return PruneReport(groups, still(report.channels), still(report.macs), still(report.params), report.skipped)


def _check(batches: Iterable[Batch], steps: int, schedule: str, options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        if name in _QUALITY - _SCORING or (name == "agreement" and isinstance(value, (int, float))):
            raise TypeError(f"prune_iteratively: {name}= is of prune(), which finds the smallest network by it; steps "
                            "go to channels=, params=, macs= or latency=: name one of these, or call prune()")
        if name not in _SCORING | _PRUNING:
            raise TypeError(f"prune_iteratively: {name!r} is an option of neither fastscore.score nor fastscore.prune")
    check_batches(batches, "batches")
    check_whole("steps", steps, "3")
    if steps < 1:
        raise ValueError(f"steps: {steps}; it must be 1 or more")
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule: {schedule!r} is none of {', '.join(SCHEDULES)}")
