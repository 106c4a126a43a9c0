"""Experts that nothing in the example chooses lose the channels that those beside them do."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from whole_way import loads, noisy, sums

import fastscore
from fastscore.graph.tracing import trace


class Expert(nn.Module):
    def __init__(self, inner: int = 6) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, inner), nn.Linear(inner, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


class Mixture(nn.Module):
    """Each token's expert is the most probable, which the last is for none that is not large."""

    def __init__(self, last: Callable[[], nn.Module] = Expert, names: bool = False) -> None:
        super().__init__()
        self.embed, self.router, self.head = nn.Linear(3, 8), nn.Linear(8, 4), nn.Linear(8, 2)
        experts = [Expert(), Expert(), Expert(), last()]
        self.experts = nn.ModuleDict({f"expert_{number}": expert for number, expert in enumerate(experts)}) if names \
            else nn.ModuleList(experts)
        self.router.bias.data = torch.tensor([0.0, 0, 0, -30])
        self.router.weight.data[3, 0], self.embed.weight.data[0] = 2.0, 3 * torch.eye(3)[0]

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, 3] -> [N, 2]."""
        x = self.embed(x)
        tokens = x.flatten(0, 1)
        best, chosen = self.router(tokens).softmax(-1).max(-1)
        made = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts.children()):
            rows = (chosen == number).nonzero()[:, 0]
            if len(rows):
                made = made.index_add(0, rows, expert(tokens[rows]) * best[rows, None])
        return self.head((x + made.view_as(x)).mean(1))


X = torch.randn(3, 5, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def _chosen(model: nn.Module, x: Tensor) -> set[str]:
    ran = set[str]()
    handles = [expert.register_forward_hook(lambda module, args, output, name=name: ran.add(name))
               for name, expert in model.experts.named_children()]
    model(x)
    for handle in handles:
        handle.remove()
    return ran


@pytest.mark.parametrize("names", [False, True])
def test_they_go_the_whole_way(names: bool, tmp_path: Path) -> None:
    last = "expert_3" if names else "3"
    model = noisy(lambda: Mixture(names=names))
    assert last not in _chosen(model, X)
    assert last in _chosen(model, 99 * X)
    options = {"scope": "layer", "compensate": False}
    scores = fastscore.score(model, [X], progress=False)
    assert "embed" in scores
    result = fastscore.prune(model, scores, X, channels=0.5, **options)
    small, expert = result.model, result.model.get_submodule(f"experts.{last}")
    assert len(result.removed["embed"]) == 4
    assert (expert.up.weight.shape, expert.down.weight.shape) == ((6, 4), (4, 6))
    assert f"experts.{last}.down" not in scores.skipped
    with torch.no_grad(), fastscore.mask(model, scores, 0.5, X, **options):
        for x in X, 99 * X:
            torch.testing.assert_close(small(x), model(x))
    loads(small, lambda: Mixture(names=names), 99 * X, tmp_path)
    fastscore.prune(model, scores, X, channels=0.5, scope="layer")  # with means, of which the last expert has none


def test_what_they_read_where_a_batch_chooses_them_counts() -> None:
    """Scores by brute force, of batches that choose the last expert and of others."""
    model = noisy(Mixture)
    batches = [X, 99 * X]
    graph = trace(model, X)
    group = next(group for group in graph.groups if group.name == "embed")
    assert "experts.3.up" in {member.layer for member in group.role("consumer")}
    v = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores = fastscore.score(model, batches, gradient="loss", normalize=False, progress=False,
                             loss=lambda output, batch: (output * v).sum())
    exact = torch.cat([sums(model, group, batch, v) for batch in batches]).square().mean(0)
    torch.testing.assert_close(scores["embed"].double(), exact, rtol=1e-5, atol=1e-9 * float(exact.max()))
    fastscore.prune(model, scores, X, channels=0.5, scope="layer")  # with means


@pytest.mark.parametrize("last", [lambda: Expert(7), lambda: nn.Sequential(nn.Linear(8, 8))])
def test_others_than_those_beside_them_are_left_alone(last: Callable[[], nn.Module]) -> None:
    graph = trace(noisy(lambda: Mixture(last)), X)
    assert not any(member.layer.startswith("experts.3") for group in graph.groups for member in group.members)
    assert any(layer.startswith("experts.3") for layer in graph.skipped)
