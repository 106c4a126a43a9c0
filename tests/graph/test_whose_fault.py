"""Channels stay where a run without them fails; the reason says whether the model's code or fastscore is to blame."""

import pytest
import torch
from torch import Tensor, nn

import fastscore
from fastscore.graph.trials import recording

X = torch.ones(1, 4)


class Looking(nn.Module):
    """Its code looks at what the first layer gave, and takes nothing else."""

    def __init__(self, looks: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3)
        self.seen: Tensor | None = None
        self.looks = looks

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if self.looks:
            self.seen = y.detach().clone() if self.seen is None else self.seen
            if not y.detach().allclose(self.seen):
                raise LookupError("something else")
        out: Tensor = self.c(torch.relu(self.b(torch.relu(y))))
        return out


def test_of_the_models_code() -> None:
    model = Looking(looks=True).eval()
    model(X)
    scores = fastscore.score(model, [X], progress=False)
    assert list(scores) == ["b"]
    assert "the model's own code (LookupError)" in scores.skipped["a"]
    assert "report" not in scores.skipped["a"]


def test_of_fastscore(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: object) -> bool:
        raise ZeroDivisionError("a mistake of fastscore's")

    monkeypatch.setattr(recording, "differ", wrong)
    with pytest.raises(ValueError, match="no channel that can be scored") as caught:
        fastscore.score(Looking(looks=False).eval(), [X], progress=False)
    reasons = str(caught.value)
    assert "no fault of the model's: please report ZeroDivisionError(\"a mistake of fastscore's\")" in reasons
    assert "own code" not in reasons
    assert "cannot follow" not in reasons
