"""Numbers in sentences."""

import pytest
import torch

import fastscore
from fastscore.wording import counted, lasting


@pytest.mark.parametrize(("number", "said"), [(0, "0 passes"), (1, "1 pass"), (2, "2 passes"), (1024, "1,024 passes")])
def test_one_is_not_many(number: int, said: str) -> None:
    assert counted(number, "pass", "passes") == said
    assert counted(number, "row") == said.replace("passes", "rows").replace("pass", "row")


@pytest.mark.parametrize(("seconds", "said"), [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (5939, "99 min"),
                                               (9000, "2.5 h")])
def test_time_is_said_roughly(seconds: float, said: str) -> None:
    assert lasting(seconds) == said


def test_what_is_one_is_said_so() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    scores = fastscore.score(model, [torch.randn(1, 4)], progress=False)
    assert repr(scores) == "<Scores: taylor-sq (sum, zero ablation) of groups, random gradient, normalized, " \
        "1 sample, seed 0; 3 channels of 1 layer; 1 layer kept>"
    with pytest.warns(UserWarning, match="units: Sequential has no mixture of experts"):
        fastscore.score(model, [torch.randn(1, 4)], units="experts", progress=False)
    with torch.no_grad():
        model[2].weight.zero_()
    zero = fastscore.score(model, [torch.randn(1, 4)], progress=False)
    assert str(zero).splitlines()[-1].startswith("every score of 1 layer is 0: the order among them is arbitrary")
    with pytest.warns(UserWarning, match="every score of 1 layer is 0"):
        result = fastscore.prune(model, zero, torch.randn(1, 4), channels=0.7)
    assert "importances: every score of 1 layer is 0" in str(result.report)
    assert not scores.all_zero
    assert "1 tap reads" in repr(scores.plan)
    curve = fastscore.curve(model, scores, [torch.randn(64, 4)], macs=(0.9,), repair=None)
    assert repr(curve).startswith("<Curve: 1 row; ")
