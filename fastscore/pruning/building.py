"""From channels that go to the smaller model: cut, tried, repaired and reported."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

from fastscore.batches.calls import Forward
from fastscore.batches.outputs import checked_forward
from fastscore.batches.parts import Batch
from fastscore.graph.groups import ChannelGraph
from fastscore.pruning.budgets.costs import Costs
from fastscore.pruning.refusal import checked, does
from fastscore.pruning.report import Candidate, PruneReport, new_report
from fastscore.pruning.result import PruneResult
from fastscore.pruning.surgery import Surgery, macs_without, plan_surgery, verify
from fastscore.recovery.compensation import say_what_takes_no_mean
from fastscore.scoring.scores import Scores

_SAVED = ("its config.json tells the dense widths, by which from_pretrained does not load what it writes: keep this "
          "model with fastscore.save_pruned, or, of transformers' models whose config can tell the widths, with "
          "fastscore.integrations.transformers.save_pretrained")


class Cut(NamedTuple):
    """What was done, the smaller model, its MACs."""

    surgery: Surgery
    smaller: nn.Module
    macs: int


class Builder:
    """Makes smaller models of a dense one, which stays as it is, as `eval_model` does, its evaluation copy.

    costs: of the whole model now; without the channels that go when `build` is called. means: whether those of `scores`
    are compensated with. repair: makes of the result of a cut that of a repaired one. notes, compensation: of all
    reports; the latter says in a line what stands in for channels that go.
    """

    def __init__(self, model: nn.Module, eval_model: nn.Module, graph: ChannelGraph, costs: Costs, scores: Scores,
                 means: bool, example_inputs: Batch, forward: Forward,
                 repair: Callable[[PruneResult], PruneResult] | None, notes: Mapping[str, str],
                 compensation: str) -> None:
        self.eval_model, self.costs, self.example_inputs, self.forward = eval_model, costs, example_inputs, forward
        self._model, self._graph, self._means, self._scores = model, graph, means, scores
        self._repair, self._notes, self._compensation = repair, notes, compensation
        self._dense = costs.by_group()
        self._plan: Callable[[Mapping[str, Tensor]], Surgery] = partial(
            plan_surgery, model, eval_model, graph, scores if means else None, example_inputs, forward)
        self.macs_without: Callable[[Mapping[str, Tensor]], int] = partial(
            macs_without, eval_model, graph.groups, example_inputs, checked_forward(forward), graph.samples.batch)

    def run(self, smaller: nn.Module) -> int:
        """MACs of a smaller model, as it is; see `verify` for what it raises."""
        return verify(smaller, self.example_inputs, self.forward, self.costs.returned.shape, self._graph.samples.batch)

    def cut(self, removed: Mapping[str, Tensor]) -> Cut:
        """A smaller model, without `removed`, group -> int64 [R].

        Raises RuntimeError where it does not run, with the layers to ignore.
        """
        surgery = self._plan(removed)  # not in the attempt: what it raises is said as it is

        def attempt(gone: Mapping[str, Tensor]) -> tuple[nn.Module, int]:
            smaller = (surgery if gone is removed else self._plan(gone)).copy()
            return smaller, self.run(smaller)

        return Cut(surgery, *checked(attempt, removed))

    def build(self, removed: Mapping[str, Tensor], candidates: tuple[Candidate, ...] = (), cut: Cut | None = None
              ) -> PruneResult:
        """The result of a cut, repaired; `costs` are without what was removed. candidates: for the report. cut: the
        one without `removed`, where it was made already."""
        surgery, smaller, macs = cut or self.cut(removed)
        made = PruneResult(smaller, self._report(surgery, smaller, macs, removed, candidates),
                           self.costs.with_others(removed), surgery.removed_indices, surgery.new_biases)
        if self._repair is None or not removed:
            return made
        made = self._repair(made)
        try:
            self.run(made.model)
        except Exception as error:  # of the model's code, which ran before
            raise RuntimeError(f"the pruned model {does(error)} once it is repaired, and did before: leave "
                               "calibration= out") from error
        return made

    def _report(self, surgery: Surgery, smaller: nn.Module, macs: int, removed: Mapping[str, Tensor],
                candidates: tuple[Candidate, ...]) -> PruneReport:
        notes, compensation = dict(self._notes), self._compensation
        if removed and callable(getattr(self._model, "save_pretrained", None)):
            notes["save_pretrained"] = _SAVED
        bare = say_what_takes_no_mean(self._model, self._graph.groups, removed)
        if bare:
            notes["means"] = bare
        if tied := self._ties(removed):
            notes["ties"] = tied
        if self._means and self._repair is None and removed and not surgery.takes_means:
            compensation = "removed channels: read as zero (no bias can take what they gave on average)"
        elif self._means and self._repair is None and bare:
            compensation += ", but for what the note on means names"
        return new_report(self._graph, self._dense, self.costs, macs, smaller, removed, candidates, notes, compensation,
                          self._scores.origin.units, surgery.made_plain, surgery.of_own_class)

    def _ties(self, removed: Mapping[str, Tensor]) -> str:
        """What to say where some channels of importance 0 went and others stay; empty where they did alike."""
        zero = {group.name: self._scores[group.name] == 0 for group in self._graph.groups
                if group.name in self._scores and len(group.unit.unique()) == group.channels}
        every = sum(int(each.sum()) for each in zero.values())
        gone = sum(int(zero[name][index].sum()) for name, index in removed.items() if name in zero)
        return "" if gone in (0, every) else (f"of {every} channels whose importance is 0, {gone} went, and which is "
                                              "arbitrary: by their scores the others may go, too")
