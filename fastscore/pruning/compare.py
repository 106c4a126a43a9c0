"""compare(): which criterion ranks best, at equal budgets, all repaired alike."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastscore.arguments import check_callable
from fastscore.batches.calls import Forward, call_model
from fastscore.batches.not_finite import naming_samples
from fastscore.batches.parts import Batch
from fastscore.default_device import keeps_own_on_cpu
from fastscore.graph.groups import Ignore
from fastscore.pruning.curve import Curve, Drawn, Evaluate, budgets_of, check_options, curve
from fastscore.recovery.calibration import HELD_OUT
from fastscore.recovery.divergence import judged_by, mixed_of, names
from fastscore.recovery.held_out import split
from fastscore.recovery.reconstruct import Method
from fastscore.recovery.remembering_batches import RememberingBatches
from fastscore.scoring.engine import score
from fastscore.scoring.scores import Scores

Importances = Sequence[str] | Mapping[str, str | Mapping[str, Any] | Scores]


@dataclass(frozen=True, repr=False)
class Comparison(Mapping[str, Curve], Drawn):
    """What compare() found: criterion -> its Curve.

    Attributes:
        curves: in the order asked for.
        note: what all have in common.
    """

    curves: Mapping[str, Curve]
    note: str

    def __getitem__(self, name: str) -> Curve:
        return self.curves[name]

    def __iter__(self) -> Any:
        return iter(self.curves)

    def __len__(self) -> int:
        return len(self.curves)

    def __str__(self) -> str:
        width = max(map(len, self.curves))
        first = next(iter(self.curves.values()))
        own, (agreement, kl) = first.dense is not None, names(
            first.by_error, mixed_of(found.mixed for found in self.curves.values()))
        wide, narrow = max(10, len(agreement)), max(8, len(kl))
        head = f"{'':{width}} {first.resource:>8} {'MACs':>7} {agreement:>{wide}} {kl:>{narrow}}"
        head += f" {'metric':>8}" if own else ""
        lines = [head]
        if own:
            lines.append(f"{'dense':{width}} {'':>8} {1:>7.1%} {1:>{wide}.1%} {0:>{narrow}.3g} {first.dense:>8.4g}")
        for number in range(len(first.rows)):
            for name, found in self.curves.items():
                row = found.rows[number]
                point = row.repaired or row.cut
                lines.append(f"{name:{width}} {row.budget:>8g} {row.macs:>7.1%} {point.agreement:>{wide}.1%} "
                             f"{point.kl:>{narrow}.3g}" + ("" if point.metric is None else f" {point.metric:>8.4g}"))
        return "\n".join([*lines, "; ".join(self._remarks)])

    def records(self) -> list[dict[str, Any]]:
        """A flat dict for each criterion and budget."""
        return [{"criterion": name, **record} for name, found in self.curves.items() for record in found.records()]

    @property
    def _remarks(self) -> list[str]:
        return [self.note, f"outputs: {next(iter(self.curves.values())).decided}"]

    @property
    def _lines(self) -> Mapping[str, Curve]:
        return self.curves


@keeps_own_on_cpu
@naming_samples("batches", "held_out")
def compare(model: nn.Module, batches: Iterable[Batch],
            importances: Importances = ("taylor-sq", "magnitude-l2", "random"),
            macs: Sequence[float] | None = (0.8, 0.5), *, params: Sequence[float] | None = None,
            channels: Sequence[float] | None = None, evaluate: Evaluate | None = None,
            held_out: Iterable[Batch] | None = None, repair: Method | None = "auto", example_inputs: Batch = None,
            seed: int = 0, ignore: Ignore = (), forward: Forward = call_model, progress: bool = True,
            **options: Any) -> Comparison:
    """Score by each criterion, prune to each budget, repair all alike, and say how much each agrees with the dense
    network.

    Every repair is fitted to the same calibration samples by fastscore.reconstruct, which measures for itself what
    channels give on average: a criterion that reads weights alone is repaired as one that reads gradients is. With
    repair=None, nothing is given back to any.

    Args:
        model: the dense network; it stays as it is.
        batches: unlabelled batches, to score and repair with: a list, or a DataLoader that does not shuffle.
        importances: names that fastscore.score knows; or label -> a name, a dict of options of fastscore.score, or
            Scores of this model.
        macs, params, channels: one of them: shares that remain. macs is left out where another is given.
        evaluate: model -> a number, such as its accuracy.
        held_out: batches to judge by. Default: one of 4 samples of `batches`, told by content, which then neither score
            nor repair.
        repair: as fastscore.prune takes it; None: no repair.
        example_inputs: as fastscore.prune takes them; default: two samples of `batches`.
        seed: of the random gradients, and of the importance "random".
        ignore: layers to leave as they are.
        forward: forward(model, batch), for models that are called otherwise.
        progress: show bars.
        options: more of fastscore.prune's. cost_aware, where it is left out, is as fastscore.prune chooses it: norms of
            weights are not divided by costs, and importances that measure a change of the outputs are.

    Returns:
        Criterion -> curve, and a table of all: str() and notebooks show it, plot(path) draws it.

    Raises:
        ValueError: no criterion; whatever fastscore.score and fastscore.curve raise.
        TypeError: an option that there is none of.
    """
    check_options("compare", options)
    named = _named(importances)
    if evaluate is not None:
        check_callable("evaluate", evaluate, "evaluate(model)")
    macs = None if params is not None or channels is not None else macs
    budgets_of(macs, params, channels)  # before anything is scored
    fit, judges = split(batches, held_out, HELD_OUT, "batches")
    seen = RememberingBatches.of(fit)
    curves: dict[str, Curve] = {}
    for name, how in named.items():
        scores = how if isinstance(how, Scores) else score(
            model, fit, **{"seed": seed, "ignore": ignore, "forward": forward, "progress": progress,
                           **({"importance": how} if isinstance(how, str) else how)})
        curves[name] = curve(model, scores, seen, macs, params=params, channels=channels, evaluate=evaluate,
                             held_out=judges, repair=repair, example_inputs=example_inputs, ignore=ignore,
                             forward=forward, progress=progress, **options)
    decisions, mixed = next(iter(curves.values())).decisions, mixed_of(found.mixed for found in curves.values())
    given = any(isinstance(how, Scores) for how in named.values())
    note = (f"{'not repaired' if repair is None else f'all repaired alike ({repair})'}; "
            + judged_by(decisions, f"{'no repair has' if given else 'neither score nor repair have'} seen", mixed))
    return Comparison(curves, note)


def _named(importances: object) -> dict[str, Any]:
    """Name -> an importance, options of score(), or scores. Raises ValueError for none, or one alone, TypeError for
    something else."""
    if not isinstance(importances, Iterable) or isinstance(importances, Scores):
        raise TypeError(f"importances: {importances!r:.80}, where several are meant: names, such as ['taylor-sq'], or "
                        "a dict of names, options of fastscore.score or scores")
    named = dict(importances) if isinstance(importances, Mapping) else {name: name for name in importances}
    if isinstance(importances, str) or not named:
        raise ValueError(f"importances: {importances!r}; give a sequence of names, such as ['taylor-sq']")
    for name, how in named.items():
        if not isinstance(how, (str, Mapping, Scores)):
            raise TypeError(f"importances: {how!r:.80} for {name!r}, where a name, options of fastscore.score or "
                            "scores are meant")
        unknown = set(how) - inspect.signature(score).parameters.keys() if isinstance(how, Mapping) and \
            not isinstance(how, Scores) else ()
        if unknown:
            raise TypeError(f"importances: {min(unknown)!r} for {name!r} is none of the options of fastscore.score")
    return named
