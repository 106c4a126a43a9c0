"""Heads of which a parameter has a matrix for each, by which code multiplies: positions of relative attention."""

from pathlib import Path

import pytest
import torch
from attention_layouts import EMBED, HEADS, INNER, TOKENS, WIDTH, Apart, tokens
from own_attentions import Network
from torch import Tensor, nn
from whole_way import check, noisy

import fastscore
from fastscore.graph.tracing import trace


class Relative(Apart):
    """Queries meet keys that code makes of places, by a matrix for each head, and whether a token is in the first half
    of its text, by a vector of each kind for each head (Funnel, Transformer-XL)."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.kinds = (nn.Parameter(torch.randn(size, HEADS, WIDTH)) for size in (6, 2))
        self.content, self.place = (nn.Parameter(torch.randn(HEADS, WIDTH)) for _ in range(2))

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        at = torch.arange(TOKENS, dtype=q.dtype)
        waves = torch.cat([torch.sin(at[:, None] / 3 ** torch.arange(3.0)), torch.cos(at[:, None] / 2)], 1)
        waves = torch.cat([waves, waves[:, :2] ** 2], 1).to(q)
        of_places = torch.einsum("bnid,jnd->bnij", q + self.place[:, None],
                                 torch.einsum("jw,wnd->jnd", waves, self.places))
        one, other = torch.einsum("bnid,snd->bnis", q, self.kinds).unbind(-1)
        of_kinds = torch.where((at < TOKENS // 2)[None, None, None], one[..., None], other[..., None])
        return (q + self.content[:, None]) @ k.mT + of_places + of_kinds


class OfTheStream(Apart):
    """Each head has a matrix of its own by which it reads the stream once more."""

    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Parameter(torch.randn(EMBED, HEADS, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        self.again = torch.einsum("bte,enw->bntw", x, self.more)
        return super().forward(x)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return (q + self.again) @ k.mT


@pytest.mark.parametrize("attention", [Relative, OfTheStream])
def test_heads_go(attention: type[nn.Module], tmp_path: Path) -> None:
    """Everything from data to a file, by brute force."""
    result = check(lambda: Network(attention), tokens(), ["embed", "attn.ask", "mlp.0"], tmp_path)
    held = result.model.attn
    assert {name: tuple(getattr(held, name).shape) for name in ("places", "kinds", "more") if hasattr(held, name)} == (
        {"places": (6, HEADS // 2, WIDTH), "kinds": (2, HEADS // 2, WIDTH)} if attention is Relative else
        {"more": (EMBED // 2, HEADS // 2, WIDTH)})


def test_they_count_and_nothing_is_said_to_stay() -> None:
    model = noisy(lambda: Network(Relative))
    graph = trace(model, tokens())
    (group,) = (group for group in graph.groups if any(group.role("heads")))
    assert group.unit.tolist() == [c // WIDTH for c in range(INNER)]
    assert not {"attn.places", "attn.kinds"} & graph.skipped.keys()
    scores = fastscore.score(model, [tokens()], progress=False)
    assert not {"attn.places", "attn.kinds"} & scores.coverage.kept.keys()
    before, after = fastscore.prune(model, scores, tokens(), channels=0.5, scope="layer", compensate=False,
                                    ignore=["embed", "mlp.*"]).report.macs
    of_places = TOKENS * 6 * HEADS * WIDTH
    assert before - after >= of_places // 2
