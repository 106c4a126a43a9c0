"""Models that return as many numbers as they find, as detectors do."""

import pytest
import torch
import torch.nn.functional as F
from architectures import as_gates_say
from torch import Tensor, nn

import fastscore
from fastscore.batches.calls import call_model
from fastscore.graph.tracing import trace


class Detector(nn.Module):
    """[N, T, 5] -> what is found in all samples, one after another, [.., 4]."""

    def __init__(self, threshold: float = 0.0) -> None:
        super().__init__()
        self.threshold = threshold
        self.body, self.neck, self.box, self.score = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 1)

    def heads(self, x: Tensor) -> Tensor:
        y = F.relu(self.neck(F.relu(self.body(x))))
        return torch.cat([self.box(y), self.score(y)], -1)

    def forward(self, x: Tensor) -> Tensor:
        found = self.heads(x).flatten(0, 1)
        return found[found[:, 4] > self.threshold][:, :4]


@pytest.mark.parametrize("threshold", [-0.1, 100.0])
def test_the_way_out_works(threshold: float) -> None:
    """It is told, and followed; where nothing is found, too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = Detector(threshold).double().eval(), torch.randn(6, 7, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match="pass forward= that returns as many numbers for each sample") as error:
        fastscore.score(model, [x], progress=False)
    assert "as many numbers as it finds" in str(error.value)
    assert "transpose" not in str(error.value)
    scores = fastscore.score(model, [x], progress=False, forward=lambda model, batch: model.heads(batch))
    assert list(scores) == ["body", "neck"]


class Emptied(Detector):
    """What no gradient comes back from decides how much is found."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.neck(F.relu(self.body(x))))
        return self.box(y)[self.score(y)[..., 0].detach() > 0]


def test_a_size_that_an_idle_layer_decides() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = Emptied().double().eval(), torch.randn(1, 7, 5, dtype=torch.float64)
    graph = trace(model, x)
    assert [group.name for group in graph.groups] == ["body", "neck"]


class Speech(nn.Module):
    """As many frames of each token as a layer says, padded to those of the longest sample, as in text to speech."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.encode, self.lengths = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 1)
        self.decode, self.frames = nn.Linear(8, 12), nn.Linear(12, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = F.gelu(self.encode(self.embed(tokens)))
        times = (2 * self.lengths(x)[..., 0].sigmoid() + tokens % 3).round().long()
        x = nn.utils.rnn.pad_sequence([row.repeat_interleave(n, 0) for row, n in zip(x, times, strict=True)], True)
        return self.frames(F.gelu(self.decode(x)))


def test_samples_that_are_shorter_alone_have_the_scores_that_gates_say() -> None:
    """The frames that pad a sample beside a longer one are its own, too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model, x = Speech().double().eval(), torch.tensor([[0, 3, 6, 9], [2, 5, 8, 11]])
    assert model(x[:1]).shape[1:] != model(x[1:]).shape[1:]
    right, wrong = as_gates_say(model, x, x[:1], call_model)
    assert (right, wrong) == (3, [])
