"""Outputs that are values rather than decisions, and decisions that are all alike: agreement says nothing of either."""

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastscore
from fastscore.cli import main
from fastscore.recovery.decisions import Decisions
from fastscore.recovery.divergence import divergence


class Regression(nn.Module):
    """A positive scalar far from zero (its sign never differs), four coordinates, and a class that is always the same.
    """

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU())
        self.depth, self.boxes, self.classes = nn.Linear(32, 1), nn.Linear(32, 4), nn.Linear(32, 3)
        with torch.no_grad():
            self.depth.bias += 50
            self.classes.bias += torch.tensor([0.0, 30.0, 0.0])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.body(x)
        return {name: getattr(self, name)(features) for name in ("depth", "boxes", "classes")}


def only(*names: str) -> Any:
    def forward(model: nn.Module, batch: Tensor) -> Any:
        found = model(batch)
        return found[names[0]] if len(names) == 1 else {name: found[name] for name in names}

    return forward


def made(forward: Any) -> tuple[nn.Module, list[Tensor], fastscore.Scores]:
    torch.manual_seed(0)
    model, batches = Regression().eval(), list(torch.randn(96, 12).split(16))
    return model, batches, fastscore.score(model, batches, ablation="mean", forward=forward, progress=False)


def share(dense: Tensor, smaller: Tensor) -> float:
    """E|y - y0|² / Var(y0), by its definition."""
    off = (smaller - dense).double().square().sum(1).mean()
    return float(off / dense.double().var(0, correction=0).sum())


@pytest.mark.parametrize("shape", [(40,), (40, 4), (10, 4, 3), (10, 3, 2, 2)])
def test_values_are_judged_by_their_squared_error(shape: tuple[int, ...]) -> None:
    p, q = 1e3 + torch.randn(shape, dtype=torch.float64), 1e3 + torch.randn(shape, dtype=torch.float64)
    rows = [x[:, None] if x.dim() == 1 else (x.movedim(1, -1) if x.dim() > 3 else x).flatten(0, -2) for x in (p, q)]
    for size in (1, 3, 40):
        found = divergence(p.split(size), q.split(size), errors=[""])
        assert found.kl == pytest.approx(share(*rows), rel=1e-9)
        assert found.agreement == pytest.approx(1 - share(*rows), rel=1e-9)
        assert (found.decisions, found.by_error) == (0, True)
    assert divergence([p], [torch.full_like(p, math.nan)], errors=[""]).kl == math.inf
    same = torch.full((5, 1), 2.0)  # which do not vary
    assert divergence([same], [same + 1], errors=[""]).kl == 0.25


def test_a_regression_is_repaired_by_its_error() -> None:
    """A sign never differs here: agreement was 100 %."""
    forward, names = only("depth", "boxes"), ("depth", "boxes")
    model, batches, scores = made(forward)
    given: Any = {"forward": forward, "outputs": dict.fromkeys(names, "error"), "repair": "linear", "progress": False}
    result = fastscore.prune(model, scores, batches[0], macs=0.5, calibration=batches, **given)
    rows = result.report.repairs
    chosen = next(row for row in rows if row.chosen)
    assert chosen.kl == min(row.kl for row in rows[1:])  # of "linear" and its ridges
    fresh = torch.randn(300, 12)
    with torch.no_grad():
        left, bare = (sum(share(model(fresh)[name], smaller(fresh)[name]) for name in names)
                      for smaller in (result.model, result.cut_again(model, {}, {}).model))
    assert left < 0.7 * bare
    text = str(result.report)
    assert "each by itself (R²: the least, error: the sum)" in text
    assert f"{chosen.name}, ridge {chosen.ridge:g}: R² {chosen.agreement:.1%}, error {chosen.kl:.3g}" in text
    assert "judged by the squared error, as a share of the dense outputs' variance, on samples" in text
    assert "decision" not in text
    with pytest.raises(ValueError, match=r"confidence: .*by squared error.*leave confidence out"):
        fastscore.prune(model, scores, batches[0], agreement=0.2, confidence=0.5, calibration=batches,
                        **{**given, "repair": "mean"})


def test_a_regression_is_distilled_by_its_error() -> None:
    model, batches, _ = made(only("depth"))
    smaller = copy.deepcopy(model)
    with torch.no_grad():
        smaller.depth.weight *= 0.5
    report = fastscore.distill(model, smaller, batches, steps=30, looks=3, forward=only("depth"), progress=False)
    assert report.best.kl < 0.5 * report.looks[0].kl
    assert report.best.by_error
    assert "R²" in str(report)
    assert "by squared error" in str(report)


def test_values_and_decisions_are_each_judged_in_their_way() -> None:
    model, batches, _ = made(only("depth"))
    other, x = Regression().eval(), batches[0]
    run = Decisions(only("depth", "boxes", "classes"), {"depth": "error", "classes": "decision"})
    with torch.no_grad():
        dense, smaller = run(model, x), run(other, x)
        found = divergence([dense], [smaller], errors=run.errors)
        assert found.outputs["['depth']"].kl == pytest.approx(share(model(x)["depth"], other(x)["depth"]), rel=1e-4)
    assert tuple(found.outputs) == ("['depth']", "['classes']")
    assert found.outputs["['classes']"].decisions == found.decisions == len(x)
    assert found.agreement == found.outputs["['depth']"].agreement
    assert not found.by_error
    assert "['classes'] by the largest of 3" in str(run)
    sign = Decisions(only("depth"), {"": "decision"})
    sign(model, x)
    assert str(sign).startswith("by its sign")
    with pytest.raises(ValueError, match="outputs: 'largest' for 'classes' is none of 'decision', 'error'"):
        Decisions(only("depth"), {"classes": "largest"})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match='one tensor alone, whose name is ""'):
        Decisions(only("depth"), {"depth": "error"})(model, x)


def test_a_network_that_always_decides_alike_is_said() -> None:
    forward = only("classes")
    model, batches, scores = made(forward)
    said = "the dense network decides alike on 100.0% of these samples, so that agreement says nothing"
    given: Any = {"repair": "mean", "forward": forward, "progress": False}
    assert said in str(fastscore.curve(model, scores, batches, (0.7,), **given))
    result = fastscore.prune(model, scores, batches[0], macs=0.7, calibration=batches, **given)
    assert said in str(result.report)
    assert said in str(fastscore.distill(model, result.model, batches, steps=1, looks=1, forward=forward,
                                         progress=False))
    logits = torch.eye(3).repeat(40, 1)
    for rows, alike in ((logits, False), (torch.cat([logits, logits[:1].expand(8000, 3)]), True)):
        assert bool(divergence(rows.split(7), rows.split(7)).one_sided) == alike
    assert not divergence([logits[:1]], [logits[:1]]).one_sided  # a single decision is always like itself


def test_values_of_few_samples_are_said() -> None:
    """Two that lie close together have next to no variance, of which any error is a large share."""
    values, errors = torch.tensor([[1.0], [1.001]]), torch.tensor([[1.01], [1.0]])
    found = divergence([values], [errors], errors=[""])
    assert found.kl > 100
    assert found.one_sided == "; the variance is that of 2 samples alone"
    assert not divergence([values.repeat(10, 1)], [errors.repeat(10, 1)], errors=[""]).one_sided


def test_a_curve_of_values_says_so() -> None:
    model, batches, scores = made(only("depth"))
    found = fastscore.curve(model, scores, batches, (0.7,), repair=None, forward=only("depth"), progress=False)
    assert found.by_error
    assert "cut: R²    error" in str(found)


class Broken(Regression):
    """Whose depth is NaN, or infinite, where x[:, 0] is above 1."""

    def __init__(self, value: float = math.nan) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = super().forward(x)
        return {**found, "depth": torch.where(x[:, :1] > 1, self.value, found["depth"])}


@pytest.mark.parametrize(("value", "names"), [(math.nan, ("depth",)), (math.inf, ("depth", "boxes"))])
def test_what_is_not_finite_in_the_dense_network_is_named(value: float, names: tuple[str, ...]) -> None:
    """A repair was "chosen" at R² nan; budgets returned the whole network."""
    torch.manual_seed(0)
    model, batches, forward = Broken(value).eval(), list(torch.randn(96, 12).split(16)), only(*names)
    scores = fastscore.score(model, batches, importance="magnitude-l2", forward=forward, progress=False)
    before = copy.deepcopy(model.state_dict())
    said = (r"outputs\['depth'\]" if len(names) > 1 else "outputs") + r": the dense network returns NaN or infinity " \
        r"there for \d+ of \d+ samples.*leave those samples out" + (".*outputs=" if len(names) > 1 else "")
    given: Any = {"forward": forward, "progress": False}
    for options in ({"channels": 0.7, "inplace": True}, {"agreement": 0.5}, {"kl": 0.5}):
        with pytest.raises(FloatingPointError, match=said):
            fastscore.prune(model, scores, batches[0], calibration=batches, repair="linear", **options, **given)
    with pytest.raises(FloatingPointError, match=said):
        fastscore.curve(model, scores, batches, (0.7,), repair=None, **given)
    smaller = Regression()
    weights = copy.deepcopy(smaller.state_dict())
    with pytest.raises(FloatingPointError, match=said):
        fastscore.distill(model, smaller, batches, steps=1, looks=1, **given)
    for one, other in ((model.state_dict(), before), (smaller.state_dict(), weights)):
        assert all(torch.equal(each, other[name]) for name, each in one.items())
    if len(names) > 1:  # the ways out
        fastscore.prune(model, scores, batches[0], channels=0.7, calibration=batches, repair="mean", outputs=["boxes"],
                        **given)
    finite = [batch[batch[:, 0] <= 1] for batch in batches]
    fastscore.prune(model, scores, batches[0], channels=0.7, calibration=finite, repair="mean", **given)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_smaller_network_that_is_not_finite_loses(value: float) -> None:
    dense = torch.randn(6, 3)
    for errors in ([], [""]):
        broken = divergence([dense, dense], [torch.where(dense > 10, dense, value), dense], errors=errors)
        assert broken.kl == math.inf
        assert broken.agreement < 1
        with pytest.raises(FloatingPointError, match=r"outputs: .*for 1 of 12 samples"):
            divergence([dense.index_fill(0, torch.tensor(2), value), dense], [dense, dense], errors=errors)
    model, batches, _ = made(only("depth"))
    looks = iter([value, 1.0])

    def loss(got: Tensor, wanted: Tensor) -> Tensor:
        return (got - wanted).square().mean() if torch.is_grad_enabled() else torch.tensor(next(looks))

    report = fastscore.distill(model, copy.deepcopy(model), batches, held_out=batches[:1], steps=1, looks=1, loss=loss,
                               forward=only("depth"), progress=False)
    assert (report.best.step, report.best.judged) == (1, 1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_values_that_vary_by_rounding_alone_are_constant(dtype: torch.dtype) -> None:
    """One of seven in the last place: the error was 1.47e9."""
    dense = torch.full((7, 2), 0.1, dtype=dtype)
    dense[3, 0] = torch.nextafter(dense[3, 0], dense.new_tensor(1.0))
    smaller = dense.double() * 1.5
    for size in (1, 7):
        assert divergence(dense.split(size), smaller.split(size), errors=[""]).kl == pytest.approx(0.25, rel=1e-2)
    varied = torch.stack([dense[:, 0].double(), torch.arange(7.0).double()], 1).to(dtype)  # of which the second does
    off = varied + torch.tensor([0.0, 1.0], dtype=dtype)
    assert divergence([varied], [off], errors=[""]).kl == pytest.approx(1 / 4, rel=1e-2)


def test_what_the_least_agreement_is_of_is_said() -> None:
    """Of a class and boxes together: decisions where they bind, R² where that does, and headings true for both."""
    forward = only("depth", "classes")
    model, batches, scores = made(forward)
    given: Any = {"forward": forward, "outputs": {"depth": "error", "classes": "decision"}, "progress": False}
    result = fastscore.prune(model, scores, batches[0], agreement=0.3, calibration=batches, repair="mean", **given)
    assert result.report.judged
    assert {row.mixed for row in (*result.report.judged, *result.report.repairs)} == {"error"}  # classes never differ
    text = str(result.report)
    assert f"R² {result.report.judged[-1].agreement:.1%}, KL + error" in text
    assert "networks, judged by the squared error" in text
    assert " decision" not in text.replace("the dense network decides", "")
    assert "2 outputs, each by itself (agreement or R²: the least, KL and error: the sum)" in text
    assert "agreement" not in result.report.notes
    found = fastscore.curve(model, scores, batches, (0.9, 0.5), repair=None, **given)
    head, row, *_ = str(found).splitlines()
    assert head.endswith("cut: R² KL + error")
    assert len(head) == len(row)
    both = replace(found, mixed="both")
    assert "cut: agreement / R² KL + error" in str(both)
    assert "decisions or, where an output of values is further off, by its R²," in str(both)
    assert "the true share of decisions may be up to" in str(both)
    compared = str(fastscore.compare(model, batches, ["magnitude-l2"], (0.7,), repair=None, **given)).splitlines()
    assert compared[0].endswith("R² KL + error")
    assert len(compared[0]) == len(compared[1])
    looked = str(fastscore.distill(model, result.model, batches, steps=1, looks=1, **given)).splitlines()
    assert looked[0].endswith("R² KL + error")
    assert len(looked[0]) == len(looked[1])
    p, q = torch.eye(3), torch.randn(3, 3)
    decided = divergence([{"a": p, "b": q}], [{"a": -p, "b": q}], errors=["b"])
    assert (decided.mixed, decided.decisions) == ("decision", 3)
    assert str(decided).startswith("agreement 0.0%, KL + error")


def test_files_and_notes_of_values_say_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    forward = only("depth")
    model, batches, scores = made(forward)
    given: Any = {"forward": forward, "progress": False}
    result = fastscore.prune(model, scores, batches[0], channels=0.6, calibration=batches, repair="linear",
                             measured=True, **given)
    assert ": repaired linearly, error " in result.report.notes["choice"]
    fastscore.distill(model, result.model, batches, steps=1, looks=1, resume=tmp_path / "run", **given)
    assert main(["info", str(tmp_path / "run")]) == 0
    told = capsys.readouterr().out
    assert "R² on held-out samples" in told
    assert "error on held-out samples" in told
    assert "agreement" not in told
    assert "kl" not in told
