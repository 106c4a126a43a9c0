"""Residual branches whose code makes more, or less, of channels between their layers: scored by a gate, and gone."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from whole_way import noisy

import fastscore
from fastscore.modules.zero_branch import ZeroBranch


class Net(nn.Module):
    """[N, T, 3] -> [N, T, 2]. inner: what the code makes of what `up` and `beside` make of the stream."""

    def __init__(self, up: int, down: int, inner: "Callable[[Net, Tensor], Tensor]") -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 2)
        self.up, self.beside, self.down, self.inner = nn.Linear(8, up), nn.Linear(8, 5), nn.Linear(down, 8), inner
        self.middle = nn.LayerNorm(down)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.down(self.inner(self, self.norm(x))))


class Pixels(Net):
    """The same of convolutions."""

    def __init__(self, up: int, down: int, inner: "Callable[[Net, Tensor], Tensor]") -> None:
        super().__init__(up, down, inner)
        self.stem, self.head, self.norm = nn.Conv1d(3, 8, 1), nn.Conv1d(8, 2, 1), nn.BatchNorm1d(8)
        self.up, self.down, self.middle = nn.Conv1d(8, up, 1), nn.Conv1d(down, 8, 1), nn.Conv1d(down, down, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mT).mT


def _gated(net: Net, x: Tensor) -> Tensor:
    one, other = net.up(x).chunk(2, -1)
    return net.middle(F.silu(one) * other)


KINDS: dict[str, Callable[[], Net]] = {
    "a gate": lambda: Net(20, 10, _gated),
    "glu": lambda: Net(20, 10, lambda net, x: F.glu(net.up(x))),
    "three parts": lambda: Net(15, 5, lambda net, x: torch.stack(net.up(x).chunk(3, -1)).tanh().sum(0)),
    "of images": lambda: Pixels(20, 10, lambda net, x: net.middle(F.glu(net.up(x), 1))),
    "concatenated": lambda: Net(6, 11, lambda net, x: torch.cat([net.up(x), net.beside(x)], -1).relu()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_branches_go(kind: str, tmp_path: Path) -> None:
    model, x = noisy(KINDS[kind]), torch.randn(3, 4, 3, generator=torch.Generator().manual_seed(0)).double()
    v = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(1)).double()
    scores = fastscore.score(model, [x], units=("groups", "blocks"), gradient="loss", normalize=False, progress=False,
                             loss=lambda output, _: (output * v).sum())
    assert not [name for name in scores.skipped if "whole branch" in name]
    (branch,) = (name for name in scores if len(scores[name]) == 1)
    gates = torch.ones(3, 1, 1, dtype=torch.float64, requires_grad=True)
    handle = model.down.register_forward_hook(lambda module, args, output: output * gates)
    (s,) = torch.autograd.grad((model(x) * v).sum(), gates)
    torch.testing.assert_close(scores[branch].double(), s.square().mean()[None], rtol=1e-6, atol=1e-20)
    handle.remove()
    totals = {name: total * torch.arange(len(total)) if name == "stem" else total * (name != branch)
              for name, total in scores.totals.items()}
    first = replace(scores, totals={name: totals[name] for name in ("stem", branch)})
    result = fastscore.prune(model, first, x, channels=0.56, scope="global", compensate=False)  # an odd number goes
    assert set(result.removed) == {"stem", branch}
    assert len(result.removed["stem"]) % 2
    assert type(result.model.down) is type(result.model.up) is ZeroBranch
    with torch.no_grad(), fastscore.mask(model, first, result, x, compensate=False):
        torch.testing.assert_close(result.model(x), model(x), rtol=1e-9, atol=1e-9)
    fastscore.save_pruned(result, tmp_path / "small.safetensors")
    loaded = fastscore.load_pruned(noisy(KINDS[kind], seed=1), tmp_path / "small.safetensors").eval()
    assert torch.equal(loaded(x), result.model(x))
