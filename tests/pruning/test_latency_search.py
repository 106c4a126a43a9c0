"""How many steps are taken on a clock: the fewest that meet a budget of time, found by measuring a few networks."""

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastscore.pruning.budgets import latency
from fastscore.pruning.budgets.latency import TOLERANCE, search_steps
from fastscore.pruning.budgets.selection import rounded_up

QUICK = settings(max_examples=150, deadline=None, derandomize=True)
SHARES = st.integers(1, 99).map(lambda percent: percent / 100)


def descending(drops: list[int]) -> list[float]:
    """MACs that remain after each step."""
    return [float(left) for left in itertools.accumulate(reversed(drops), initial=10)][::-1]


@QUICK
@given(st.lists(st.integers(1, 50), min_size=1, max_size=300), SHARES, st.integers(0, 50), st.integers(1, 60))
def test_on_an_exact_clock_the_fewest_steps_within_the_tolerance(drops: list[int], share: float, start: int,
                                                                 grain: int) -> None:
    """The clock moves in grains, as kernels do; the oracle looks at every candidate."""
    macs, start, tried = descending(drops), min(start, len(drops)), []

    def clock(steps: int) -> float:
        return 0.1 + 0.9 * math.ceil(macs[steps] / grain) * grain / macs[0] if steps else 1.0

    def measure(steps: int, patience: int) -> float:
        tried.append((steps, patience))
        return clock(steps)

    first = next((steps for steps in range(start, len(macs)) if clock(steps) <= share), None)
    if first is None:
        least = rounded_up(clock(len(drops)))
        with pytest.raises(ValueError, match=f"^latency: {share:g} cannot be .* {least} of the"):
            search_steps(macs, start, share, measure)
        return
    found = search_steps(macs, start, share, measure)
    assert found >= start
    assert clock(found) <= share
    assert found == first or clock(found) >= share - TOLERANCE or macs[first] - macs[found] <= TOLERANCE * macs[0]
    assert tried[-1] == (found, 2)
    assert len(tried) <= 5 + 2 * math.log2(len(macs))


@QUICK
@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), SHARES, st.integers(0, 10), st.integers(0, 99),
       st.sampled_from([0.01, 0.1, 0.5]))
def test_on_a_noisy_clock_the_budget_holds_where_it_was_measured_last(drops: list[int], share: float, start: int,
                                                                      seed: int, noise: float) -> None:
    macs, start, last = descending(drops), min(start, len(drops)), {}
    generator, counted = random.Random(seed), 0

    def measure(steps: int, patience: int) -> float:
        nonlocal counted
        counted += 1
        last[steps] = macs[steps] / macs[0] * generator.uniform(1 - noise, 1 + noise), patience
        return last[steps][0]

    try:
        found = search_steps(macs, start, share, measure)
    except ValueError as error:
        assert f"{rounded_up(last[len(drops)][0])} of the dense" in str(error)  # noqa: PT017
        assert last[len(drops)][0] > share
        return
    assert last[found][0] <= share
    assert last[found][1] == 2
    assert counted <= 24  # and far fewer, mostly


@pytest.mark.parametrize(("vector", "few"), [(1, 5), (7, 6)])
def test_a_few_candidates_do(vector: int, few: int) -> None:
    """Time is what was foreseen, but for a constant, vectors of channels (1 or 7 % of the time) and 1 % of noise: so
    many candidates are measured half of the time, and never more than a dozen."""
    tried, generator = [], random.Random(vector)
    for share in [0.5, 0.6, 0.68, 0.75, 0.9] * 8:
        drops = [generator.randint(1, 50) for _ in range(2000)]
        foreseen, counts = descending(drops), []
        grain, fixed = foreseen[0] * vector / 100, generator.uniform(0, 0.3)

        def measure(steps: int, patience: int, foreseen: list[float] = foreseen, grain: float = grain,
                    fixed: float = fixed, counts: list[int] = counts) -> float:
            counts.append(steps)
            exact = fixed + (1 - fixed) * math.ceil(foreseen[steps] / grain) * grain / foreseen[0]
            return exact * generator.uniform(0.99, 1.01)

        search_steps(foreseen, 0, share, measure)
        tried.append(len(counts))
    assert sorted(tried)[len(tried) // 2] <= few
    assert max(tried) <= 12


def test_a_clock_that_says_how_unsteady_it_is_needs_fewer_networks() -> None:
    """With 12 % of noise, told or not: half of the networks, and the budget holds where it was measured last."""
    networks: dict[float, list[int]] = {0.0: [], 0.12: []}
    for told, counts in networks.items():
        generator = random.Random(1)
        for share in [0.5, 0.6, 0.68, 0.75, 0.9] * 20:
            foreseen = descending([generator.randint(1, 50) for _ in range(500)])
            last: dict[int, float] = {}

            def measure(steps: int, patience: int, foreseen: list[float] = foreseen,
                        last: dict[int, float] = last, generator: random.Random = generator) -> float:
                last[steps] = foreseen[steps] / foreseen[0] * generator.gauss(1, 0.06 / patience ** 0.5)
                return last[steps]

            found = search_steps(foreseen, 0, share, measure, lambda steps, told=told: told)  # type: ignore[misc]
            assert last[found] <= share
            assert foreseen[found] / foreseen[0] >= share - 0.3
            counts.append(len(last))
    assert sum(networks[0.12]) < 0.65 * sum(networks[0.0])
    assert sum(networks[0.12]) / 100 < 3.2


@pytest.mark.parametrize(("uncertainty", "said"), [
    (0.02, "0.9 of the dense model's time was measured; ask for more"),
    (0.3, r"0.9 of the dense model's time was measured \(± 30.0%: the clock was unsteady; time on a machine that does "
          "nothing else\\); ask for more")])
def test_a_budget_out_of_reach_says_what_the_clock_is_worth(uncertainty: float, said: str) -> None:
    with pytest.raises(ValueError, match=f"^latency: 0.5 cannot be reached: with every removable channel gone, {said}"):
        latency.search_steps([1.0, 0.8, 0.6, 0.4], 0, 0.5, lambda steps, patience: 0.9, lambda steps: uncertainty)
