"""curve(): how much can go? Budget against agreement, KL and the user's own metric, of the cut and of the repair."""

import inspect
import itertools
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any

import torch
from torch import nn

from fastscore.arguments import check_callable, check_number
from fastscore.batches.calls import Forward, call_model
from fastscore.batches.checks import check_batch
from fastscore.batches.not_finite import naming_samples
from fastscore.batches.parts import Batch, few_samples, map_tensors
from fastscore.default_device import keeps_own_on_cpu
from fastscore.modules.evaluation_copy import evaluation_copy
from fastscore.modules.inspection import device_of
from fastscore.modules.wrappers import unwrapped
from fastscore.progress import bar, shown
from fastscore.pruning import plots
from fastscore.pruning.budgets.quality import Judge
from fastscore.pruning.prune import prune
from fastscore.pruning.result import PruneResult
from fastscore.recovery.calibration import HELD_OUT
from fastscore.recovery.divergence import Divergence, Mixed, judged_by, mixed_of, names
from fastscore.recovery.held_out import split
from fastscore.recovery.reconstruct import Method
from fastscore.recovery.remembering_batches import RememberingBatches
from fastscore.rng import fork_rng
from fastscore.scoring.scores import Scores
from fastscore.tables import Table

Evaluate = Callable[[nn.Module], float]
RESOURCES = ("macs", "params", "channels", "latency")
_PRUNING = set(inspect.signature(prune).parameters) - {"calibration", "inplace"}  # which are for curve() to give


@dataclass(frozen=True)
class Point:
    """A network, beside the dense one.

    Attributes:
        agreement: the share of decisions that are the dense network's; of outputs judged by their error, R².
        kl: the mean KL divergence from it, in nats, or the squared error as a share of the dense output's variance.
        metric: what the user's own `evaluate` says of it; None without one.
    """

    agreement: float
    kl: float
    metric: float | None = None


@dataclass(frozen=True)
class CurveRow:
    """One budget.

    Attributes:
        budget: what was asked to remain, a share.
        macs, params, channels: shares that remain.
        cut: the network whose channels are gone, and nothing else done.
        repaired: the one that prune() returns; None where no repair was asked for.
        repair: what the repair was.
    """

    budget: float
    macs: float
    params: float
    channels: float
    cut: Point
    repaired: Point | None
    repair: str


class Drawn(Table):
    """A table that has a picture: a line for each curve."""

    @property
    @abstractmethod
    def _lines(self) -> Mapping[str, "Curve"]:
        """Label -> curve."""

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw agreement, KL and the metric against what remains, to an image file.

        Raises:
            ImportError: without matplotlib (pip install 'torch-fastscore[plot]').
            ValueError: an unknown suffix.
        """
        plots.curves(self._lines, path)


@dataclass(frozen=True, repr=False)
class Curve(Drawn):
    """What curve() found.

    Attributes:
        resource: what the budgets count.
        rows: one for each budget, in the order asked for.
        dense: the user's metric of the dense network.
        decisions: how many were compared; no repair has seen their samples.
        note: how it was ranked and repaired.
        decided: what was taken for decisions.
        by_error: whether all outputs are judged by their error.
        mixed: where only some are, whether the agreements are of decisions ("decision"), R² ("error"), or "both".
    """

    resource: str
    rows: tuple[CurveRow, ...]
    dense: float | None
    decisions: int
    note: str
    decided: str = ""
    by_error: bool = False
    mixed: Mixed = ""

    def __str__(self) -> str:
        own, (agreement, kl) = self.dense is not None, names(self.by_error, self.mixed)
        repaired = any(row.repaired for row in self.rows)
        wide, narrow = max(20, len(f"repaired: {agreement}") * repaired), max(8, len(kl))
        head = f"{self.resource:>8} {'MACs':>7} {'params':>7}"
        for title in ("cut", "repaired")[:1 + repaired]:
            head += f"   {f'{title}: {agreement}':>{wide}} {kl:>{narrow}}" + (f" {'metric':>8}" if own else "")
        lines = [head]
        if own:
            lines.append(f"{'dense':>8} {1:>7.1%} {1:>7.1%}"
                         + f"   {1:>{wide}.1%} {0:>{narrow}.3g} {self.dense:>8.4g}" * (1 + repaired))
        for row in self.rows:
            line = f"{row.budget:>8g} {row.macs:>7.1%} {row.params:>7.1%}"
            for point in (row.cut, row.repaired)[:1 + repaired]:
                if point is not None:
                    line += f"   {point.agreement:>{wide}.1%} {point.kl:>{narrow}.3g}"
                    line += "" if point.metric is None else f" {point.metric:>8.4g}"
            lines.append(line)
        return "\n".join([*lines, *reversed(self._remarks)])

    def records(self) -> list[dict[str, Any]]:
        """A flat dict for each budget."""
        flat = []
        for row in self.rows:
            record = {name: value for name, value in asdict(row).items() if not isinstance(value, dict)}
            record.pop("repaired", None)
            for name, point in (("cut", row.cut), ("repaired", row.repaired)):
                if point is not None:
                    record |= {f"{name}_{key}": value for key, value in asdict(point).items() if value is not None}
            flat.append(record)
        return flat

    @property
    def _remarks(self) -> list[str]:
        return [self.note, f"{judged_by(self.decisions, 'no repair has seen', self.mixed)}; outputs: {self.decided}"]

    @property
    def _lines(self) -> dict[str, "Curve"]:
        return {"": self}


@keeps_own_on_cpu
@naming_samples("batches", "held_out")
def curve(model: nn.Module, scores: Scores, batches: Iterable[Batch], macs: Sequence[float] | None = None, *,
          params: Sequence[float] | None = None, channels: Sequence[float] | None = None,
          latency: Sequence[float] | None = None, evaluate: Evaluate | None = None,
          held_out: Iterable[Batch] | None = None, repair: Method | None = "auto", example_inputs: Batch = None,
          forward: Forward = call_model, progress: bool = True, **options: Any) -> Curve:
    """Prune to each budget in turn and say how much each network still agrees with the dense one.

    Args:
        model: the dense network; it stays as it is.
        scores: of this model, by fastscore.score.
        batches: calibration batches, without labels: a list, or a DataLoader that does not shuffle.
        macs, params, channels, latency: one of them: shares that remain, each a budget of fastscore.prune. Default:
            macs=(0.9, 0.8, 0.7, 0.6, 0.5).
        evaluate: model -> a number, such as its accuracy; also asked about the dense network. The model is in
            evaluation mode.
        held_out: batches to judge by. Default: one of 4 samples of `batches`, told by content, which then do not
            repair. Where scores have seen them too, networks look a little better than they are.
        repair: as fastscore.prune takes it; None: the cut alone.
        example_inputs: as fastscore.prune takes them; default: two samples of `batches`.
        forward: forward(model, batch), for models that are called otherwise.
        progress: show a bar.
        options: more of fastscore.prune's.

    Returns:
        A table: str() and notebooks show it, plot(path) draws it, to_pandas() gives a DataFrame.

    Raises:
        ValueError: no budget, or budgets of two kinds; whatever fastscore.prune raises.
        TypeError: batches that are none, an option that there is none of.
    """
    check_options("curve", options)
    if evaluate is not None:
        check_callable("evaluate", evaluate, "evaluate(model)")
    resource, budgets = budgets_of(macs, params, channels, latency)
    fit, judges = split(batches, held_out, HELD_OUT, "batches")
    if repair is None:
        options.setdefault("compensate", False)
    else:
        options |= {"calibration": RememberingBatches.of(fit), "repair": repair}
    dense, device = evaluation_copy(unwrapped(model), plain=False), device_of(model)
    with fork_rng(device), shown(progress), bar("curve", " networks", len(budgets)) as told:
        example = example_of(batches, example_inputs, forward, device)
        judge = Judge(dense, judges, forward, options.get("outputs"))
        rows, found, kinds = list[CurveRow](), Divergence(1, 0, 0), set[Mixed]()
        for budget in budgets:
            result = prune(model, scores, example, forward=forward, **options | {resource: budget})
            bare = result.cut_again(model, {}, {}) if repair is not None else result
            cut, found = _point(judge, bare, evaluate)
            kinds.add(found.mixed)
            repaired = None
            if repair is not None:
                repaired, other = _point(judge, result, evaluate)
                kinds.add(other.mixed)
            report = result.report
            left = {name: after / max(before, 1) for name, (before, after) in
                    (("macs", report.macs), ("params", report.params), ("channels", report.channels))}
            chosen = next((row for row in report.repairs if row.chosen), None)
            rows.append(CurveRow(budget, left["macs"], left["params"], left["channels"], cut, repaired,
                                 "none" if chosen is None else _named(chosen)))
            told.update()
        own = _metric(evaluate, dense)
    origin = scores.origin
    note = (f"ranked by {origin.importance}" + (f" ({origin.ablation} ablation)" if origin.ablation != "zero" else "")
            + (f"; repaired: {repair}" if repair is not None else "; not repaired"))
    return Curve(resource, tuple(rows), own, found.decisions, note, judge.decided, found.by_error,
                 mixed_of(kinds))


def check_options(call: str, options: Iterable[str]) -> None:
    """Raise TypeError, naming the function that was called, for an option that fastscore.prune does not take."""
    for name in options:
        if name not in _PRUNING:
            raise TypeError(f"{call}: {name!r} is none of its options, nor one of fastscore.prune that it passes on")


def budgets_of(*shares: Sequence[float] | None) -> tuple[str, tuple[float, ...]]:
    """(what the budgets count, the budgets) of what was given for each of RESOURCES.

    Raises TypeError for one share where several are meant, ValueError for none, or for those of two kinds.
    """
    given = {name: values for name, values in zip(RESOURCES, shares, strict=False) if values is not None} or \
        {"macs": (0.9, 0.8, 0.7, 0.6, 0.5)}
    for name, values in given.items():
        if isinstance(values, str) or not isinstance(values, Iterable):
            raise TypeError(f"{name}: {values!r:.80}, where several shares are meant, such as (0.9, 0.7)")
    if len(given) > 1:
        raise ValueError(f"{', '.join(given)}: a curve has budgets of one kind: give one of them")
    (resource, values), = given.items()
    budgets = tuple(values)
    if not budgets:
        raise ValueError(f"{resource}: there is no share; give one or more, such as (0.9, 0.7)")
    return resource, budgets


def example_of(batches: Iterable[Batch], given: Batch, forward: object, device: torch.device, samples: int = 2
               ) -> Batch:
    """What to trace and count MACs with, on `device`: `given`, or so many samples of the first batch; all of it where
    only the user's `forward` knows what a sample is."""
    example = given
    if example is None:
        if not (first := list(itertools.islice(iter(batches), 1))):
            raise ValueError("batches: there is none")
        example, = first
        if forward is call_model:
            check_batch(example, "batches")
            example = few_samples(example, samples)
    return map_tensors(lambda tensor: tensor.to(device), example)


def _named(repair: Any) -> str:
    ridge = "" if repair.ridge is None or math.isinf(repair.ridge) else f" {repair.ridge:g}"
    return f"{repair.name}{ridge}{' + BatchNorms' if repair.recalibrated else ''}"


def _point(judge: Judge, result: PruneResult, evaluate: Evaluate | None) -> tuple[Point, Divergence]:
    found = judge(result.model)
    own = None if evaluate is None else _metric(evaluate, evaluation_copy(result.model))
    return Point(found.agreement, found.kl, own), found


def _metric(evaluate: Evaluate | None, model: nn.Module) -> float | None:
    """What the user's own function says of a model. Raises TypeError where that is no number."""
    if evaluate is None:
        return None
    value = evaluate(model)
    check_number("evaluate(model)", value, "0.76")
    return float(value)
