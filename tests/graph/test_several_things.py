"""Layers of a class whose forward returns several things: Linears are followed; of convolutions it is said that they
are kept, with what comes to them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from whole_way import check, noisy

import fastscore


class Unbiased(nn.Linear):
    """Megatron's: what it makes, and the bias, which is added later."""

    def forward(self, x: Tensor) -> Any:
        return nn.functional.linear(x, self.weight), self.bias


class Router(nn.Linear):
    """Of a mixture, as Llama 4 has it: the scores of experts, which are zero but for the best, and what they are of."""

    def forward(self, x: Tensor) -> Any:
        logits = super().forward(x)
        best, chosen = logits.topk(2, -1)
        return torch.full_like(logits, -torch.inf).scatter(-1, chosen, best).sigmoid(), logits


class Partial(nn.Conv2d):
    """Of an image with holes: what it makes, and where there are still some."""

    def forward(self, x: Tensor, mask: Tensor) -> Any:
        with torch.no_grad():
            seen = nn.functional.conv2d(mask, torch.ones(1, 1, 3, 3).to(mask), padding=1)
        return super().forward(x * mask) * 9 / (seen + 1e-8) * seen.clamp(0, 1), seen.clamp(0, 1)


class Pooled(nn.Conv2d):
    """What it makes, and its means."""

    def forward(self, x: Tensor) -> Any:
        y = super().forward(x)
        return y, y.mean((2, 3))


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.one, self.two = nn.Linear(3, 8), nn.LayerNorm(8), Unbiased(8, 12), Unbiased(12, 8)
        self.mid, self.last = nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.flatten(2).mT)
        h, bias = self.one(self.norm(x))
        h, bias = self.two((h + bias).relu())
        return self.last(self.mid(x + h + bias).relu()).mean(1)


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.router, self.last = nn.Linear(3, 8), Router(8, 4), nn.Linear(8, 4)
        self.up, self.down = nn.ModuleList(nn.Linear(8, 6) for _ in range(4)), nn.ModuleList(
            nn.Linear(6, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.flatten(2).mT)
        scores, logits = self.router(x)
        for number, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            x = x + down(up(x).relu()) * scores[..., number, None]
        return self.last(x).mean(1) + logits.mean((1, 2))[:, None]


class Holes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 4, 1)
        self.one, self.two = Partial(8, 8, 3, padding=1), Partial(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones_like(x[:, :1])
        mask[:, :, 1:3, 1:3] = 0
        x, mask = self.one(self.stem(x).relu(), mask)
        x, mask = self.two(x.relu(), mask)
        return self.last(self.mid(x.relu()).relu())


class Beside(Holes):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Pooled(8, 8, 3), Pooled(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, mean = self.one(self.stem(x).relu())
        x, more = self.two(x.relu())
        return self.last(self.mid(x.relu()).relu()).mean((2, 3)) + (mean + more).mean(1, keepdim=True)


INNER = [f"up.{number}" for number in range(4)]


@pytest.mark.parametrize(("build", "groups"), [(Tokens, ["stem", "one.weight", "mid"]), (Mixture, ["stem", *INNER])])
def test_linears_go_the_whole_way(build: Callable[[], nn.Module], groups: list[str], tmp_path: Path) -> None:
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0)).double()
    small = check(build, x, groups, tmp_path, only=False).model
    for layer in small.modules():
        assert not isinstance(layer, nn.Linear) or layer.weight.shape == (layer.out_features, layer.in_features)
    second = fastscore.prune(small, fastscore.score(small, [x], progress=False), x, channels=0.7, scope="layer")
    assert len(second.removed["stem"])


@pytest.mark.parametrize("build", [Holes, Beside])
def test_they_are_kept_and_the_rest_goes(build: Callable[[], nn.Module]) -> None:
    model, x = noisy(build), torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0)).double()
    scores = fastscore.score(model, [x], progress=False)
    kind = type(model.one).__name__
    several = f"the forward of its class ({kind}) returns several things, where one tensor can be followed"
    assert list(scores) == ["mid"]
    assert scores.skipped == {"one": several, "two": several, "last": "its channels are the model's output",
                              "stem": "its channels come to one, the forward of whose class returns several things"}
    small = fastscore.prune(model, scores, x, channels=0.5, scope="layer", compensate=False).model
    with torch.no_grad(), fastscore.mask(model, scores, 0.5, x, scope="layer", compensate=False):
        torch.testing.assert_close(small(x), model(x))
