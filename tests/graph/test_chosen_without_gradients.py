"""Layers whose code runs under torch.no_grad() and chooses, as what picks the keys of a sparse attention does: they
lose what they read with all that go, and what they make stays."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from whole_way import check

from fastscore.graph.tracing import trace

X = torch.randint(0, 20, (3, 7), generator=torch.Generator().manual_seed(0))


class Indexer(nn.Module):
    """Which keys each query sees; it counts heads of its own."""

    def __init__(self, rank: int, heads: int) -> None:
        super().__init__()
        self.n_heads, self.head_dim = heads, 4
        self.wq, self.wk = nn.Linear(rank, 4 * heads, bias=False), nn.Linear(12, 4, bias=False)
        self.weigh = nn.Linear(12, heads, bias=False)

    @torch.no_grad()
    def forward(self, x: Tensor, latent: Tensor, mask: Tensor) -> Tensor:
        q = self.wq(latent).view(*x.shape[:2], self.n_heads, self.head_dim)
        each = torch.einsum("nqhd,nkd->nqhk", q, self.wk(x)).relu()
        score = torch.einsum("nqhk,nqh->nqk", each, self.weigh(x))
        score = score.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else \
            score + mask  # which no example runs
        return score.topk(3).indices


class Attention(nn.Module):
    """Latent queries, keys whose parts are copied into their place, and an indexer."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.num_heads = 4
        self.q_a, self.q_b, self.kv_b = nn.Linear(12, 6), nn.Linear(6, 24, bias=False), nn.Linear(12, 32, bias=False)
        self.turned, self.out = nn.Linear(12, 2, bias=False), nn.Linear(16, 12)
        self.norm, self.indexer = nn.LayerNorm(6), Indexer(6, heads)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        latent = self.norm(self.q_a(x))
        q = self.q_b(latent).view(n, t, -1, 6).transpose(1, 2)
        kv = self.kv_b(x).view(n, t, -1, 8).transpose(1, 2)
        shared = self.turned(x).view(n, 1, t, 2).expand(-1, kv.shape[1], -1, -1)
        k = kv.new_empty(*kv.shape[:-1], 6)
        k[..., :4].copy_(kv[..., :4])
        k[..., 4:].copy_(shared)
        seen = self.indexer(x, latent, torch.ones(t, t, dtype=torch.bool))
        unseen = torch.ones(n, t, t, dtype=torch.bool).scatter(-1, seen, False)[:, None]
        y = F.scaled_dot_product_attention(q, k, kv[..., 4:], attn_mask=~unseen)
        return self.out(y.transpose(1, 2).reshape(n, t, -1))


class Sparse(nn.Module):
    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        self.embed, self.before, self.between = nn.Embedding(20, 12), nn.LayerNorm(12), nn.LayerNorm(12)
        self.attention, self.up, self.down = Attention(heads), nn.Linear(12, 10), nn.Linear(10, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.attention(self.before(x))
        x = x + self.down(F.gelu(self.up(self.between(x))))
        return self.head(x).mean(1)


@pytest.mark.parametrize("heads", [2, 4])
def test_a_stream_goes_and_what_picks_keys_reads_less_of_it(tmp_path: Path, heads: int) -> None:
    result = check(lambda: Sparse(heads), X, ["embed", "attention.q_a", "attention.q_b", "up"], tmp_path)
    small = result.model
    assert small.attention.indexer.wk.in_features == 6
    assert small.attention.indexer.wq.in_features == 3
    assert small.attention.indexer.n_heads == heads
    assert small.attention.num_heads == 2


class Read(nn.Module):
    """What `first` makes is read by `apart` under torch.no_grad(), and that shows in the output, or nowhere."""

    def __init__(self, shown: float, writes: bool) -> None:
        super().__init__()
        self.first, self.apart, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.seen, self.shown, self.writes = nn.Parameter(torch.zeros(8)), shown, writes

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).tanh()
        with torch.no_grad():
            z = self.apart(y)
            if self.writes:
                self.seen.copy_(z.mean(0))
        return self.head(y + self.shown * z if self.shown else y)


@pytest.mark.parametrize("writes", [False, True])
@pytest.mark.parametrize("shown", [0.0, 1.0])
def test_what_is_read_without_gradients_and_shows_stays(shown: float, writes: bool) -> None:
    graph = trace(Read(shown, writes), torch.randn(3, 4))
    reason = graph.skipped.get("first", "")
    if writes:
        assert not graph.groups
    elif shown:
        assert reason == "apart reads its channels where no gradient comes back (torch.no_grad())"
    else:
        (group,) = graph.groups
        assert [(member.layer, member.role) for member in group.members] == [
            ("first", "producer"), ("apart", "reader"), ("head", "consumer")]
