"""Code that writes in place to what layers made or read: scored as the same code that does not, or told so."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastscore
from fastscore.graph.scored_units import Units
from fastscore.graph.tracing import trace


class Branch(nn.Module):
    """A feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        """[..., 8] -> the same. What `up` makes is a view, if x has three dimensions."""
        return self.down(F.gelu(self.up(x)))


class Stream(nn.Module):
    """Two residual branches, which are scaled and added in place, or not."""

    def __init__(self, in_place: str) -> None:
        super().__init__()
        self.embed, self.head, self.in_place = nn.Linear(5, 8), nn.Linear(8, 3), in_place
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))
        self.branches = nn.ModuleList(Branch() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, 5] -> [N, T, 3]."""
        x = self.embed(x)
        for norm, branch in zip(self.norms, self.branches, strict=True):
            y = branch(norm(x))
            if self.in_place == "branch":
                y.mul_(2)
                y += x
                x = y
            elif self.in_place == "stream" or (self.in_place == "evaluating" and not self.training):
                x += y * 2
            else:
                x = x + y * 2
        return self.head(x)


@pytest.mark.parametrize("units", ["groups", "blocks"])
def test_what_a_layer_made_is_written_to(units: Units) -> None:
    """Groups and scores are those of code that writes nothing in place."""
    x = torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    scores = []
    for in_place in ("branch", ""):
        torch.manual_seed(0)
        scores.append(fastscore.score(Stream(in_place).double().eval(), [x], units=units, progress=False))
    assert list(scores[0]) == list(scores[1])
    assert {"embed", "branches.0.up"} <= set(scores[0])
    assert ("branches.1" in scores[0]) == (units == "blocks")
    for layer, values in scores[1].items():
        torch.testing.assert_close(scores[0][layer], values)


def test_what_a_norm_has_read_is_written_to() -> None:
    """PyTorch has no gradient then; the error names the norm, and what to write."""
    with pytest.raises(ValueError, match=r"writes in place to what norms.0 has read.*write `x = x \+ branch\(x\)`"):
        fastscore.score(Stream("stream").eval(), [torch.randn(3, 4, 5)], progress=False)


def test_what_is_written_to_in_evaluation_mode_alone() -> None:
    """As RWKV's states are, in a cache: training has a gradient, and the way out goes by it."""
    model, x = Stream("evaluating").eval(), torch.randn(3, 4, 5)

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        model.training = True
        try:
            return model(batch)
        finally:
            model.training = False

    with pytest.raises(ValueError, match=r"norms.0 has read.*in evaluation mode.*forward= that.*as training does"):
        fastscore.score(model, [x], progress=False)
    assert {"embed", "branches.0.up"} <= set(fastscore.score(model, [x], forward=forward, progress=False))


class Assigned(nn.Module):
    """A part of the channels is written over by what a layer makes of them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.part, self.mid, self.last = (nn.Conv2d(3, 8, 1), nn.Conv2d(3, 3, 1), nn.Conv2d(8, 6, 1),
                                                     nn.Conv2d(6, 2, 1))
        self.width = 3

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        out = torch.empty_like(x)
        out[:, :self.width] = self.part(x[:, :self.width]).relu()
        out[:, self.width:] = x[:, self.width:]
        return self.last(self.mid(out).relu())


def test_parts_that_are_written_to_say_so() -> None:
    graph = trace(Assigned().eval(), torch.randn(2, 3, 4, 4))
    assert [group.name for group in graph.groups] == ["mid"]
    assert graph.skipped["stem"] == \
        "a part of its channels is written to in place (x[:, :k] = ...), which cannot be followed"
