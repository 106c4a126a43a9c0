"""Layers to which no gradient comes, of the samples that were tried first: two others are tried."""

import pytest
import torch
from torch import Tensor, nn

from fastscore.graph.samples import sample_axes
from fastscore.graph.samples.sample_axes import find
from fastscore.graph.trials.sample_trials import Watched
from fastscore.modules.sample_axis import SampleAxis, Untold


class Gated(nn.Module):
    """A layer that weighs the one key that there is, so that it makes no difference; and one whose output counts where
    a number is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.key, self.gated, self.last = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        weight = self.key(y).sum(-1)[..., None].softmax(-1)
        return self.last(y * weight + self.gated(y) * (x[..., :1] > 0))


def test_two_samples_more_tell_what_is_reached_and_what_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    ways, one = [], sample_axes._find
    monkeypatch.setattr(sample_axes, "_find", lambda *args: ways.append(args[-1].exact) or one(*args))
    model, x = Gated().eval(), torch.randn(5, 3, 4)
    x[:, :, 0] = torch.tensor([-1.0, -1.0, 1.0, 1.0, 1.0])[:, None]
    found = find(model, {name: Watched(-1) for name, _ in model.named_children()},
                 lambda model, batch: [model(batch)], x, x[:1])
    assert ways == [False]
    assert found.calls["first"] == found.calls["gated"] == found.calls["last"] == (SampleAxis(),)
    (key,) = found.calls["key"]
    assert isinstance(key, Untold)
    assert not key.reached
    assert "no sample that was tried sends a gradient back" in key.reason
