"""Batches that go past what a layer has done ahead of the module behind it: an error, never wrong scores."""

import pytest
import torch
from torch import Tensor, nn

import fastscore


class Gated(nn.Module):
    """A clamp, or a BatchNorm, that only batches of a positive mean go through."""

    def __init__(self, gated: str) -> None:
        super().__init__()
        self.first, self.norm, self.clamp = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU()
        self.second, self.head, self.gated = nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 4), gated

    def forward(self, x: Tensor) -> Tensor:
        def maybe(kind: str, y: Tensor) -> Tensor:
            return getattr(self, kind)(y) if self.gated != kind or x.mean() > 0 else y

        y = maybe("clamp", maybe("norm", self.first(x)))
        y = y + self.second(y)
        return self.head((self.clamp(y) if self.gated != "sum" or x.mean() > 0 else y).mean((2, 3)))


def batches() -> list[Tensor]:
    x = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return list(x - x.mean((1, 2, 3, 4), keepdim=True) + torch.tensor([0.1, -0.1]).view(2, 1, 1, 1, 1))


@pytest.mark.parametrize(("gated", "layer"), [("clamp", "first"), ("norm", "first"), ("sum", "second")])
def test_a_batch_that_skips_what_was_done_ahead_is_refused_by_name(gated: str, layer: str) -> None:
    torch.manual_seed(0)
    model = Gated(gated).eval()
    with pytest.raises(RuntimeError, match=f"{layer}: the (clamp|BatchNorm) behind it.*merge"):
        fastscore.score(model, batches(), progress=False, precision="bfloat16" if gated == "sum" else None)


def scored(model: nn.Module, given: list[Tensor]) -> fastscore.Scores:
    return fastscore.score(model, given, gradient="loss", loss=lambda output, batch: output.square().sum(),
                           progress=False)


def test_each_way_apart_is_the_way_out_and_skipping_first_is_no_matter() -> None:
    torch.manual_seed(0)
    model, (late, early) = Gated("clamp").eval(), batches()
    with pytest.warns(UserWarning, match="depends on which others"):
        both, apart = scored(model, [early, late]), scored(model, [early]).merge(scored(model, [late]))
    assert list(both) == list(apart)
    for layer in both:
        torch.testing.assert_close(both[layer], apart[layer], rtol=1e-4, atol=1e-6 * float(apart[layer].max()))
