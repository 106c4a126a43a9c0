"""prune(agreement=), curve() and compare() on a network trained on real digits."""

import copy
import dataclasses
import html
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastscore
from fastscore.cli import digits
from fastscore.pruning.budgets import quality
from fastscore.pruning.report import PruneReport
from fastscore.recovery.held_out import Part

QUIET: dict[str, Any] = {"progress": False}
CHEAP: dict[str, Any] = {"repair": "mean"}


@dataclasses.dataclass(frozen=True)
class Trained:
    model: nn.Module
    scores: fastscore.Scores
    calibration: list[Tensor]
    held_out: list[Tensor]
    labels: Tensor


@pytest.fixture(scope="module")
def trained() -> Trained:
    split = digits.Digits.split(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
                              nn.Conv2d(16, 24, 3, stride=2, bias=False), nn.BatchNorm2d(24), nn.ReLU(),
                              nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10))
        digits.train(model, *split.train, 8, 0.1, lambda: None)
    images = split.train[0]
    scores = fastscore.score(model, [images[:256]], **QUIET)
    return Trained(model, scores, list(images[256:512].split(64)), list(split.test[0].split(200)), split.test[1])


def agreement(one: nn.Module, other: nn.Module, batches: Any) -> float:
    with torch.no_grad():
        same = [one.eval()(x).argmax(1) == other.eval()(x).argmax(1) for x in batches]
    return float(torch.cat(same).double().mean())


def test_the_smallest_network_that_agrees_is_the_one_that_trying_all_finds(trained: Trained,
                                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, step by step of the removal order."""
    seen: dict[str, Any] = {}
    own = quality.select_by_quality

    def watched(macs: Any, build: Any, *rest: Any, finer: Any) -> Any:
        seen.update(macs=macs, build=build)
        found = own(macs, build, *rest, tolerance=0.0)
        seen["agreements"] = [agreement(trained.model, build(steps).model, trained.held_out)
                              for steps in range(len(macs))]
        return found

    monkeypatch.setattr("fastscore.pruning.prune.select_by_quality", watched)
    before = copy.deepcopy(trained.model.state_dict())
    result = fastscore.prune(trained.model, trained.scores, trained.calibration[0][:1], agreement=0.95,
                             calibration=trained.calibration, held_out=trained.held_out, **CHEAP)
    (chosen,) = [row for row in result.report.judged if row.chosen]
    assert chosen.agreement == agreement(trained.model, result.model, trained.held_out) >= 0.95
    assert chosen.macs == pytest.approx(result.report.macs[1] / result.report.macs[0], abs=1e-6)
    assert chosen.macs < 0.95
    steps = [round(left / seen["macs"][0], 9) for left in seen["macs"]].index(round(chosen.macs, 9))
    assert seen["agreements"][steps] == chosen.agreement
    assert seen["agreements"][steps + 1] < 0.95  # the next one fails
    best = max(count for count, found in enumerate(seen["agreements"]) if found >= 0.95)
    assert best - steps <= 2  # where networks do not only get worse, step by step, bisection may miss a few
    assert all(torch.equal(value, before[name]) for name, value in trained.model.state_dict().items())
    assert f"chosen: {chosen.macs:.1%} of the MACs: agreement {chosen.agreement:.1%}" in str(result.report)
    again = PruneReport.of(json.loads(json.dumps(dataclasses.asdict(result.report))))
    assert again.judged == result.report.judged


def test_by_divergence(trained: Trained) -> None:
    loose, strict = (fastscore.prune(trained.model, trained.scores, trained.calibration[0][:1], kl=kl,
                                     calibration=trained.calibration, **CHEAP).report for kl in (0.5, 0.01))
    for report, kl in ((loose, 0.5), (strict, 0.01)):
        assert all((row.kl <= kl) >= row.chosen for row in report.judged)
    assert loose.macs[1] < strict.macs[1]


def test_with_confidence_the_samples_are_halved_and_more_stays(trained: Trained) -> None:
    reports = [fastscore.prune(trained.model, trained.scores, trained.calibration[0][:1], agreement=0.9,
                               confidence=confidence, calibration=trained.calibration, held_out=trained.held_out,
                               **CHEAP).report for confidence in (None, 0.95)]
    assert reports[0].macs[1] < reports[1].macs[1] < reports[1].macs[0]
    (chosen,) = [row for row in reports[1].judged if row.chosen]
    assert chosen.bound >= 0.9
    assert chosen.bound < chosen.agreement
    assert 240 < chosen.decisions < 360  # of 599
    assert f"(at least {chosen.bound:.1%})" in str(reports[1])
    parts = [torch.cat([x.flatten(1) for x in Part(trained.held_out, 2, judges, 8)]) for judges in (True, False)]
    assert len(torch.cat(parts).unique(dim=0)) == 599 == sum(map(len, parts))


def test_an_agreement_that_few_samples_judge_is_warned_of(trained: Trained, recwarn: pytest.WarningsRecorder) -> None:
    """Once, and not where enough judge, or where a bound was asked for."""
    x = trained.calibration[0][:1]
    few, many = (fastscore.prune(trained.model, trained.scores, x, agreement=0.95, calibration=trained.calibration,
                                 held_out=held_out, **CHEAP)
                 for held_out in ([trained.held_out[0][:27]], trained.held_out))
    (said,) = [str(each.message) for each in recwarn if str(each.message).startswith("agreement: ")]
    (chosen,) = [row for row in few.report.judged if row.chosen]
    assert f"{round(27 * chosen.agreement)} of 27 decisions agree" in said
    assert said == f"agreement: {few.report.notes['agreement']}"
    assert said in str(few.report)
    assert "agreement" not in many.report.notes
    assert [each.filename for each in recwarn if str(each.message) == said] == [__file__]


def test_where_nothing_agrees_well_enough_nothing_goes(trained: Trained) -> None:
    result = fastscore.prune(trained.model, trained.scores, trained.calibration[0][:1], kl=1e-9,
                             calibration=trained.calibration, **CHEAP)
    assert result.report.macs[1] == result.report.macs[0]
    assert not any(row.chosen for row in result.report.judged)
    assert agreement(trained.model, result.model, trained.held_out) == 1


@pytest.mark.parametrize(("options", "message"), [
    ({"agreement": 0.9, "macs": 0.5}, "agreement, kl: they are budgets of their own, .* leave macs= out, or them"),
    ({"agreement": 0.9, "calibration": None}, "agreement, kl: they are judged on samples: give calibration=batches"),
    ({"confidence": 0.9, "macs": 0.5}, "confidence: the bound is one of the agreement"),
    ({"agreement": 0.99, "confidence": 0.95}, r"held_out: half of the samples to judge by are \d+, and agreement=0.99 "
                                             "with confidence=0.95 takes 299: .* 598 held_out, or 2,392 calibration")])
def test_what_cannot_be_asked_for(trained: Trained, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fastscore.prune(trained.model, trained.scores, trained.calibration[0][:1],
                        **{"calibration": trained.calibration, **options})


def test_a_curve_says_what_is_left_and_how_well_it_decides(trained: Trained, tmp_path: Path) -> None:
    x = torch.cat(trained.held_out)

    def accuracy(model: nn.Module) -> float:
        return digits.accuracy(model, x, trained.labels)

    found = fastscore.curve(trained.model, trained.scores, trained.calibration, (0.7, 0.4), evaluate=accuracy,
                            held_out=trained.held_out, repair="linear", **QUIET)
    assert found.dense == accuracy(trained.model)
    assert found.decisions == 599
    for row in found.rows:
        result = fastscore.prune(trained.model, trained.scores, trained.calibration[0][:2], macs=row.budget,
                                 calibration=trained.calibration, repair="linear")
        assert row.repaired is not None
        assert row.repaired.agreement == agreement(trained.model, result.model, trained.held_out)
        assert row.repaired.metric == accuracy(result.model)
        assert row.macs == result.report.macs[1] / result.report.macs[0]
        bare = fastscore.prune(trained.model, trained.scores, trained.calibration[0][:2], macs=row.budget,
                               compensate=False, cost_aware=True)
        if bare.removed.keys() == result.removed.keys() and all(
                torch.equal(bare.removed[name], result.removed[name]) for name in bare.removed):
            assert row.cut.agreement == agreement(trained.model, bare.model, trained.held_out)
        assert row.repaired.kl < row.cut.kl
        assert row.repair.startswith("linear 0.")
    table = str(found)
    assert f"{found.rows[0].cut.agreement:.1%}" in table
    assert "judged by 599 decisions about samples that no repair has seen" in table
    assert "ranked by taylor-sq; repaired: linear" in table
    found.plot(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 5000
    assert repr(found) == "<Curve: 2 rows; ranked by taylor-sq; repaired: linear>"
    shown = found._repr_html_()
    assert "judged by 599 decisions" in shown
    assert shown.count("<tr>") == 3
    assert html.unescape(shown).count("linear") == 3
    assert found.records()[1]["repaired_kl"] == found.rows[1].repaired.kl  # type: ignore[union-attr]


def test_a_curve_without_repair_or_samples_of_ones_own(trained: Trained) -> None:
    found = fastscore.curve(trained.model, trained.scores, trained.calibration, params=(0.8,), repair=None, **QUIET)
    (row,) = found.rows
    assert row.repaired is None
    assert row.params <= 0.8
    assert row.repair == "none"
    assert found.decisions == sum(len(x) for x in Part(trained.calibration, 4, True))
    assert "; not repaired" in str(found)


def test_criteria_are_compared_at_equal_budgets_and_with_equal_repair(trained: Trained, tmp_path: Path) -> None:
    found = fastscore.compare(trained.model, trained.calibration, {
        "ours": {"importance": "taylor-sq", "ablation": "mean"}, "L2": "magnitude-l2", "given": trained.scores},
        (0.6,), held_out=trained.held_out, **CHEAP, **QUIET)
    assert list(found) == ["ours", "L2", "given"]
    for name, curve in found.items():
        (row,) = curve.rows
        assert 0.5 < row.macs <= 0.6
        assert row.repair == "mean"  # the weights' criterion too, whose scores hold no means
        assert row.repaired is not None
        assert row.repaired.kl < row.cut.kl
        assert f"{name:5} " in str(found)
    assert "all repaired alike (mean); judged by 599 decisions about samples that no repair has seen" in str(found)
    found.plot(tmp_path / "compared.png")
    assert len(found.records()) == 3
    bare = fastscore.compare(trained.model, trained.calibration, ["taylor-sq", "magnitude-l2"], (0.6,), repair=None,
                             **QUIET)
    assert "not repaired; judged by" in str(bare)
    assert "neither score nor repair have seen" in str(bare)
    for curve in bare.values():
        assert curve.rows[0].repaired is None


def test_the_same_channels_are_repaired_alike_whatever_ranked_them(trained: Trained) -> None:
    """Weights alone, whose scores hold no means, or gradients."""
    norms = fastscore.score(trained.model, trained.calibration, importance="magnitude-l2", **QUIET)
    ranked = dataclasses.replace(trained.scores, totals=dict(norms.totals))
    assert ranked.means
    assert not norms.means
    found = fastscore.compare(trained.model, trained.calibration, {"norms": norms, "gradients": ranked}, (0.6,),
                              held_out=trained.held_out, cost_aware=False, **CHEAP, **QUIET)
    assert found["norms"].rows == found["gradients"].rows


@pytest.mark.parametrize(("means", "options", "said"), [
    (True, {}, "removed channels: what they gave on average is in biases"),
    (True, {"compensate": False}, "removed channels: read as zero (compensate=False)"),
    (False, {}, "removed channels: read as zero (scores by magnitude-l2 hold no means; calibration=batches measures "
                "them)")])
def test_the_report_says_what_stands_in_for_what_went(trained: Trained, means: bool, options: dict[str, Any],
                                                      said: str) -> None:
    scores = trained.scores if means else \
        fastscore.score(trained.model, trained.calibration, importance="magnitude-l2", **QUIET)
    result = fastscore.prune(trained.model, scores, trained.calibration[0][:1], macs=0.6, **options)
    assert said in str(result.report).splitlines()
    assert PruneReport.of(json.loads(json.dumps(dataclasses.asdict(result.report)))) == result.report
    if not options:
        repaired = fastscore.reconstruct(trained.model, result, trained.calibration, "mean")
        assert "removed channels" not in str(repaired.report)  # its repairs say it


def test_tables_for_pandas(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    found = fastscore.curve(trained.model, trained.scores, trained.calibration, (0.9,), repair=None, **QUIET)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"to_pandas needs pandas .*: pip install pandas"):
        found.to_pandas()
    monkeypatch.undo()
    assert found.to_pandas().to_dict("records") == found.records()


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"macs": (0.5,), "params": (0.5,)}, ValueError, "^macs, params: a curve has budgets of one kind"),
    ({"macs": 0.5}, TypeError, "^macs: 0.5, where several shares are meant"),
    ({"macs": ()}, ValueError, "^macs: there is no share"),
    ({"macs": (1.5,)}, ValueError, r"macs: 1\.5 is outside \(0, 1\]"),
    ({"batches": torch.zeros(3, 1, 8, 8)}, TypeError, "batches: one tensor, where an iterable"),
    ({"batches": iter([])}, ValueError, "batches: it can be read only once"),
    ({"batches": []}, ValueError, "batches: there is none"),
    ({"held_out": []}, ValueError, "held_out: there is no sample to judge by; give more batches")])
def test_curves_of_nothing(trained: Trained, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fastscore.curve(trained.model, trained.scores, **{"batches": trained.calibration, **options}, **QUIET)
    with pytest.raises(ValueError, match="importances: 'taylor-sq'; give a sequence of names"):
        fastscore.compare(trained.model, trained.calibration, "taylor-sq", **QUIET)
