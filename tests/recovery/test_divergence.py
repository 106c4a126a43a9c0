"""How far a network is from the dense one, and what is said of it."""

import math

import pytest
import torch
from scipy import stats

from fastscore.recovery.divergence import divergence, judged_by, most_off
from fastscore.recovery.repairs import Repair


def test_divergence_is_agreement_and_kl_for_every_kind_of_output() -> None:
    p, q = torch.randn(6, 5, 4), torch.randn(6, 5, 4)
    expected = torch.distributions.kl_divergence(torch.distributions.Categorical(logits=p),
                                                 torch.distributions.Categorical(logits=q)).mean()
    share = (p.argmax(-1) == q.argmax(-1)).float().mean()
    for a, b in ((p, q), (p.flatten(0, 1), q.flatten(0, 1)),
                 (p.movedim(-1, 1)[..., None], q.movedim(-1, 1)[..., None])):
        found = divergence(a.split(2), b.split(2))
        assert found.kl == pytest.approx(float(expected), rel=1e-5)
        assert found.agreement == pytest.approx(float(share))
        assert found.decisions == 30
    one = divergence([torch.tensor([[2.0], [-1.0]])], [torch.tensor([[1.0], [1.0]])])
    assert one.agreement == 0.5
    broken = divergence([p], [torch.full_like(p, math.nan)])
    assert (broken.agreement, broken.kl) == (0, math.inf)
    with pytest.raises(ValueError, match="held_out: the batches that judge hold no sample"):
        divergence([], [])
    with pytest.raises(ValueError, match="returns"):
        divergence([p], [q[:, :, :2]])


def test_a_repair_says_what_it_was() -> None:
    assert str(Repair("linear", 0.01, True, 0.9, 0.12, True)) == \
        "chosen: linear, ridge 0.01, BatchNorms recalibrated: agreement 90.0%, KL 0.12"


@pytest.mark.parametrize(("decisions", "said"), [
    (1, "judged by 1 decision about samples that are new: the true share may be up to 98 points off (95 % confidence)"),
    (25, "judged by 25 decisions about samples that are new: the true share may be up to 22 points off "
         "(95 % confidence)"),
    (1000, "judged by 1,000 decisions about samples that are new")])
def test_figures_say_how_many_decisions_they_rest_on(decisions: int, said: str) -> None:
    assert judged_by(decisions, "are new") == said


@pytest.mark.parametrize("decisions", [1, 2, 10, 25, 99])
def test_how_far_a_share_may_be_off(decisions: int) -> None:
    """With SciPy's exact binomial interval as the oracle, of every share."""
    intervals = [(agreed / decisions, stats.binomtest(agreed, decisions).proportion_ci(0.95, "exact"))
                 for agreed in range(decisions + 1)]
    expected = max(max(share - each.low, each.high - share) for share, each in intervals)
    assert most_off(decisions) == pytest.approx(expected, abs=1e-9)
