"""Networks that return probabilities are judged, repaired and taught as those that return the logits of them."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastscore
from fastscore.recovery.decisions import Decisions

# of [N, 12]: by softmax last, of pixels, of tokens, as a mean, by division, in half precision
ENDS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: x.softmax(1), "of pixels": lambda x: x.view(-1, 6, 2, 1).softmax(1),
    "of tokens": lambda x: x.view(-1, 2, 6).softmax(-1), "mean": lambda x: (x.softmax(1) + x.cos().softmax(1)) / 2,
    "divided": lambda x: x.exp() / x.exp().sum(1, keepdim=True), "in half": lambda x: x.half().softmax(1)}
OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "logits": lambda x: x, "over samples": lambda x: x.softmax(0), "positive": lambda x: x.relu(),
    "logarithms": lambda x: x.log_softmax(1), "scaled": lambda x: 2 * x.softmax(1)}
X = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))


def _judging(end: Callable[[Tensor], Tensor], outputs: Any = None) -> tuple[str, Tensor]:
    """(what is said, what is judged)."""
    run = Decisions(lambda model, batch: end(batch), outputs)
    found = run(nn.Identity(), X)[""]
    return str(run), found


@pytest.mark.parametrize("end", ENDS)
def test_probabilities_are_known_and_logits_of_them_judged(end: str) -> None:
    said, found = _judging(ENDS[end])
    assert ", of probabilities" in said
    close = 1e-3 if end == "in half" else 1e-6
    torch.testing.assert_close(found.softmax(2 if end == "of tokens" else 1), ENDS[end](X).float(), rtol=close,
                               atol=close)
    said, found = _judging(ENDS[end], {"": "error"})
    assert "probabilities" not in said
    assert torch.equal(found, ENDS[end](X))


@pytest.mark.parametrize("columns", [1, 3])
def test_what_a_sigmoid_made_last_decides_by_its_logit(columns: int) -> None:
    """Where it is said to: a probability is never negative, and any network agreed."""
    x = X[:, :columns]
    said, found = _judging(lambda _: x.sigmoid(), {"": "decision"})
    assert said.startswith("by its sign, of probabilities" if columns == 1 else
                           "by the largest of 3 over dimension 1, of probabilities")
    torch.testing.assert_close(found, x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("end", OTHERS)
def test_what_is_none_stays_as_it_is(end: str) -> None:
    said, found = _judging(OTHERS[end])
    assert "probabilities" not in said
    assert torch.equal(found, OTHERS[end](X))


def _networks() -> tuple[nn.Module, nn.Module, list[Tensor]]:
    """One that returns logits, and one that returns their softmax."""
    torch.manual_seed(0)
    logits = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)).double().eval()
    with torch.no_grad():
        logits[2].weight *= 6
    model = nn.Sequential(*copy.deepcopy(logits), nn.Softmax(1)).eval()
    return logits, model, list(torch.randn(120, 6, dtype=torch.float64).split(30))


def test_repairs_are_judged_by_the_divergence_of_probabilities() -> None:
    logits, model, batches = _networks()
    scores = [fastscore.score(each, batches, importance="magnitude-l2", progress=False) for each in (logits, model)]
    results = [fastscore.prune(each, given, batches[0], channels=0.5, calibration=batches, repair="linear",
                               measured=False, progress=False)
               for each, given in zip((logits, model), scores, strict=True)]
    of_logits, of_model = (result.report.repairs for result in results)
    assert [row.kl for row in of_model] == pytest.approx([row.kl for row in of_logits])
    assert of_model[0].kl > 0.02


def test_a_budget_of_divergence_holds_of_probabilities() -> None:
    _, model, batches = _networks()
    scores = fastscore.score(model, batches, progress=False)
    judges = list(torch.randn(60, 6, dtype=torch.float64).split(30))
    small = fastscore.prune(model, scores, batches[0], kl=0.05, calibration=batches, held_out=judges, repair="linear",
                            progress=False)
    with torch.no_grad():
        p, q = (torch.cat([each(x) for x in judges]) for each in (model, small.model))
    kl = float((p * (p.log() - q.log())).sum(1).mean())
    assert kl <= 0.05
    chosen = next(row for row in small.report.judged if row.chosen)
    assert chosen.kl == pytest.approx(kl)


def test_taught_as_logits_are() -> None:
    logits, model, batches = _networks()
    taught = []
    for dense in (logits, model):
        small = copy.deepcopy(dense)
        with torch.no_grad():
            small[0].weight += torch.randn(16, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / 4
        fastscore.distill(dense, small, batches, steps=6, looks=2, progress=False)
        taught.append(small)
    torch.testing.assert_close(taught[1][0].weight, taught[0][0].weight)
