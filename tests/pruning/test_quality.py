"""A quality budget: the search against brute force, the bound against SciPy and by resampling."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta

from fastscore.pruning.budgets.quality import Quality, choose_steps, samples_needed, search
from fastscore.pruning.budgets.selection import MacsLeft
from fastscore.pruning.report import Judged, PruneReport
from fastscore.recovery import held_out
from fastscore.recovery.divergence import Divergence, least_share, most_off


@given(st.integers(1, 3000), st.data(), st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_the_bound_is_clopper_and_pearsons(trials: int, data: Any, confidence: float) -> None:
    successes = data.draw(st.integers(0, trials))
    expected = 0.0 if successes == 0 else beta.ppf(1 - confidence, successes, trials - successes + 1)
    assert least_share(successes, trials, confidence) == pytest.approx(expected, abs=1e-9)


@given(st.floats(0.5, 0.999), st.floats(0.5, 0.99))
def test_so_many_samples_are_needed(agreement: float, confidence: float) -> None:
    needed = samples_needed(agreement, confidence)
    assert least_share(needed, needed, confidence) >= agreement - 1e-9
    if needed > 1:
        assert least_share(needed - 1, needed - 1, confidence) < agreement + 1e-9


def counted(macs: Sequence[float], foreseen: Sequence[float] | None = None) -> MacsLeft:
    return MacsLeft(foreseen or macs, macs.__getitem__)


@pytest.mark.parametrize(("decisions", "differ", "said"), [
    (11, 0, "of 11 decisions it is 100% or 90.9% at most"), (49, 0, "0.98 lets none differ"),
    (1, 0, "of 1 decision it is 100%, so"), (50, 1, "49 of 50 decisions agree"), (148, 2, "146 of 148 decisions agree"),
    (149, 2, "")])
def test_where_few_samples_judge_it_is_said_what_they_show(decisions: int, differ: int, said: str) -> None:
    """Few are those that could not show the agreement even if all of them agreed: fewer than 149, for 0.98."""
    share = (decisions - differ) / decisions
    row = Judged(0.6, share, 0.1, share, decisions, True, samples=decisions)
    asked = Quality(agreement=0.98)
    assert said in asked.few([row])
    assert bool(said) == bool(asked.few([row]))
    if said:
        at_least = beta.ppf(0.05, decisions - differ, differ + 1)
        assert f"at least {at_least:.1%} of others do (95 % confidence)" in asked.few([row])
        assert "confidence=0.95 (--confidence 0.95) holds it beyond them" in asked.few([row])
        assert "298 held_out, or 1,192 calibration" in asked.few([row])
    assert not Quality(kl=0.1).few([row])
    assert not Quality(agreement=0.98, confidence=0.9).few([row])
    report = PruneReport((), (1, 1), (1, 1), (1, 1), {}, judged=(row,))
    off = math.ceil(100 * most_off(decisions))
    assert f"networks, judged by {decisions} decision" in str(report)
    assert decisions >= 100 or f"the true share may be up to {off} points off" in str(report)
    bounded = str(replace(report, judged=(replace(row, bound=share - 0.25),)))
    assert f"agreement {share:.1%} (at least {share - 0.25:.1%})" in bounded
    assert "points off" not in bounded


def test_decisions_about_one_sample_are_no_samples() -> None:
    """27 texts of 100 tokens each show nothing that a binomial bound could count; values are no decisions at all."""
    row = Judged(0.6, 0.99, 0.1, 0.99, 2700, True, samples=27)
    said = Quality(agreement=0.98).few([row])
    assert "2,700 decisions about 27 samples" in said
    assert "at least" not in said
    assert "confidence=" not in said
    assert "more held_out or calibration samples" in said
    for values in (Judged(0.6, 0.99, 0.1, 0.99, 0, True, by_error=True, samples=27),
                   Judged(0.6, 0.99, 0.1, 0.99, 27, True, mixed="error", samples=27)):
        assert not Quality(agreement=0.98).few([values])


@given(st.lists(st.floats(0.01, 5.0), min_size=1, max_size=60), st.data())
def test_a_number_of_steps_is_found_by_what_is_counted(steps: list[float], data: Any) -> None:
    """However far off what was foreseen is; and in a few looks where it is near."""
    macs = [sum(steps) - sum(steps[:count]) for count in range(len(steps) + 1)]
    wrong = sorted(data.draw(st.lists(st.floats(-9.0, 9.0), min_size=len(macs), max_size=len(macs))), reverse=True)
    low = data.draw(st.integers(0, len(steps) - 1))
    high = data.draw(st.integers(low + 1, len(steps)))
    limit = data.draw(st.floats(macs[high], macs[low], exclude_max=True))
    expected = next(count for count, left in enumerate(macs) if left <= limit)
    assert counted(macs, wrong).steps_to(limit, low, high) == expected
    left = counted(macs, [0.9 * each for each in macs])
    assert left.steps_to(limit, low, high) == expected
    looks = list[int]()
    held = MacsLeft(macs, lambda count: (looks.append(count), macs[count])[1], sums_hold=True)
    assert held.steps_to(limit, low, high) == expected
    assert len(looks) <= 1  # as foreseen: the step before it is not looked at


@given(st.lists(st.floats(0.01, 5.0), min_size=1, max_size=60), st.data())
def test_the_search_finds_what_trying_all_finds(steps: list[float], data: Any) -> None:
    macs = [sum(steps) - sum(steps[:count]) for count in range(len(steps) + 1)]
    last_good = data.draw(st.integers(0, len(steps)))
    tried = search(counted(macs), lambda count: count <= last_good, tolerance=0.0)
    good = [count for count in tried if count <= last_good]
    assert max(good, default=0) == last_good  # what is best of all, where a smaller network never agrees better
    assert len(tried) == len(set(tried))
    assert 0 not in tried
    coarse = search(counted(macs), lambda count: count <= last_good, tolerance=0.1)
    found = max([0, *(count for count in coarse if count <= last_good)])
    assert macs[found] - macs[last_good] <= 0.1 * macs[0] + 1e-9
    assert len(coarse) <= len(tried)


@pytest.mark.parametrize("last_good", [0, 1, 333, 1022, 1023])
def test_it_halves_what_is_left(last_good: int) -> None:
    macs = list(range(1024, 0, -1))
    assert len(search(counted(macs), lambda count: count <= last_good, tolerance=0.0)) <= 11
    assert len(search(counted(macs), lambda count: count <= last_good)) <= 8  # to half a percent of the MACs


def population(seed: int) -> tuple[torch.Tensor, list[float]]:
    """bool [candidates, samples]: whether each agrees; the harder samples fail first, with some noise."""
    generator = torch.Generator().manual_seed(seed)
    hardness = torch.rand(20000, generator=generator)
    shares = torch.linspace(0, 0.12, 41)
    noise = torch.rand(41, 20000, generator=generator)
    agrees = (hardness[None] > 0.8 * shares[:, None]) & (noise > 0.2 * shares[:, None])
    return agrees, [1 - 0.02 * step for step in range(41)]


@pytest.mark.parametrize(("target", "judges"), [(0.95, 400), (0.98, 1000)])
def test_violations_over_200_resampled_splits_are_at_most_5_percent(target: float, judges: int) -> None:
    """What is drawn again and again with replacement has the population's own share as its truth."""
    agrees, macs = population(int(100 * target))
    truth = agrees.double().mean(1)
    quality = Quality(agreement=target, confidence=0.95)
    violations, without, removed = 0, 0, []
    for split in range(200):
        drawn = torch.randint(agrees.shape[1], (2, judges // 2), generator=torch.Generator().manual_seed(split))

        def found(steps: int, part: int, drawn: torch.Tensor = drawn) -> Divergence:
            share = float(agrees[steps, drawn[part]].double().mean())
            return Divergence(share, 0.0, drawn.shape[1])

        best, _ = choose_steps(counted(macs), quality, lambda steps: found(steps, 0), lambda steps: found(steps, 1))
        violations += bool(truth[best] < target)
        removed.append(best)
        loose, _ = choose_steps(counted(macs), Quality(agreement=target), lambda steps: found(steps, 0),
                                lambda steps: found(steps, 1))
        without += bool(truth[loose] < target)
    print(f"agreement {target}, {judges} samples: {violations} violations of 200, {without} without the bound; "
          f"{sum(removed) / 200:.1f} of {int((truth >= target).nonzero().max())} steps go")
    assert violations <= 10
    assert without > 40  # the share found alone is no bound
    assert sum(removed) / 200 > 0.2 * int((truth >= target).nonzero().max())  # and yet something goes


def test_the_test_stops_at_the_first_that_fails() -> None:
    """Else one of many would pass by chance."""
    macs, asked = [1.0, 0.8, 0.6, 0.4, 0.2], list[int]()

    def test(steps: int) -> Divergence:
        asked.append(steps)
        return Divergence(0.5 if steps == 3 else 1.0, 0.0, 1000)

    best, rows = choose_steps(counted(macs), Quality(agreement=0.9, confidence=0.95),
                              lambda steps: Divergence(1.0, 0.0, 1000), test, tolerance=0.0)
    assert asked == [*range(asked[0], 4)][-len(asked):]
    assert 4 not in asked
    assert best < 3
    assert rows[3].agreement == 0.5


def test_where_the_other_half_says_otherwise_a_larger_network_is_returned() -> None:
    """Bisection's candidates soon lie side by side, and fail together; the dense network is not all that is left."""
    macs = [1.0 - 0.01 * step for step in range(101)]
    best, rows = choose_steps(counted(macs), Quality(agreement=0.85, confidence=0.95),
                              lambda steps: Divergence(0.95 if steps <= 40 else 0.5, 0.0, 250),
                              lambda steps: Divergence(1.0 if steps <= 12 else 0.5, 0.0, 250))
    assert 0 < best <= 12
    assert [steps for steps, found in sorted(rows.items()) if found.agreement == 1.0] == [best]


@pytest.mark.parametrize(("options", "message"), [
    ({"agreement": 1.0}, r"agreement: 1\.0 is outside \(0, 1\)"), ({"kl": 0.0}, r"kl: 0\.0; it must be above 0"),
    ({"kl": math.inf}, "kl: inf"), ({"agreement": 0.9, "confidence": 1.0}, r"confidence: 1\.0 is outside"),
    ({"kl": 0.1, "confidence": 0.9}, "confidence: the bound is one of the agreement")])
def test_what_makes_no_sense(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Quality(**options)


def test_where_all_samples_are_alike_and_judge_it_is_said() -> None:
    """Which samples judge is told by what they hold: of the same, all or none."""
    parts = [held_out.split([torch.full((4, 3), float(value))] * 2, None, 4, "calibration") for value in range(40)]
    judged = [(fit, judges) for fit, judges in parts if sum(len(batch) for batch in judges) == 8]
    assert 0 < len(judged) < len(parts)
    with pytest.raises(ValueError, match=r"^calibration: 8 samples, of which all are held out to judge by"):
        list(judged[0][0])
    assert all(sum(map(len, fit)) == 8 for fit, judges in parts if not list(judges))
