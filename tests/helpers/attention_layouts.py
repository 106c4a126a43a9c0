"""Attentions as people write them, each with names and a layout of its own."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EMBED, HEADS, WIDTH, TOKENS = 12, 4, 2, 5
INNER = HEADS * WIDTH


def split(x: Tensor, heads: int) -> Tensor:
    """[N, T, H·D] -> [N, H, T, D]."""
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


def join(x: Tensor) -> Tensor:
    """[N, H, T, D] -> [N, T, H·D]."""
    return x.transpose(1, 2).flatten(2)


class OneProjection(nn.Module):
    """A causal one of one projection, whose heads fill what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(EMBED, 3 * EMBED), nn.Linear(EMBED, EMBED)
        self.nh, self.dim = HEADS, EMBED

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.into(x).split(self.dim, dim=2)
        q, k, v = (y.view(B, T, self.nh, C // self.nh).transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).contiguous().view(B, T, C))


class Woven(OneProjection):
    """Whose heads lie across what is read, as NesT's do."""

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.into(x).view(B, T, 3, self.nh, C // self.nh).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.permute(0, 2, 3, 1).reshape(B, T, C))


class Filled(nn.Module):
    """Queries, keys and values apart, whose heads fill what they read."""

    def __init__(self) -> None:
        super().__init__()
        self.ask, self.key, self.val, self.mix = (nn.Linear(EMBED, EMBED) for _ in range(4))
        self.n_head = HEADS

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (layer(x).view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
                   for layer in (self.ask, self.key, self.val))
        weights = (q @ k.mT * (C // self.n_head) ** -0.5).softmax(-1)
        return self.mix((weights @ v).transpose(1, 2).reshape(B, T, C))


class Rotary(nn.Module):
    """Keys and values shared by two heads each, expanded; queries and keys turned by complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.n_local_heads, self.n_local_kv_heads, self.n_rep, self.head_dim = HEADS, HEADS // 2, 2, WIDTH
        self.wq, self.wo = nn.Linear(EMBED, INNER, bias=False), nn.Linear(INNER, EMBED, bias=False)
        self.wk, self.wv = (nn.Linear(EMBED, INNER // 2, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q = self.wq(x).view(n, t, self.n_local_heads, self.head_dim)
        k, v = (layer(x).view(n, t, self.n_local_kv_heads, self.head_dim) for layer in (self.wk, self.wv))
        angles = torch.arange(t, dtype=x.dtype)[:, None, None]
        turn = torch.polar(torch.ones_like(angles), angles)
        q, k = (torch.view_as_real(torch.view_as_complex(y.unflatten(-1, (-1, 2))) * turn).flatten(3) for y in (q, k))
        k, v = (y[:, :, :, None].expand(n, t, self.n_local_kv_heads, self.n_rep, self.head_dim)
                .reshape(n, t, self.n_local_heads, self.head_dim) for y in (k, v))
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        return self.wo(join((q @ k.mT / self.head_dim ** 0.5).softmax(-1) @ v))


class Apart(nn.Module):
    """The plain one: what `between` makes of queries, keys and values is the only thing that others change."""

    names = ("ask", "key", "val", "mix")

    def __init__(self) -> None:
        super().__init__()
        self.h = HEADS
        ask, key, val, mix = self.names
        for name in (ask, key, val):
            self.add_module(name, nn.Linear(EMBED, INNER))
        self.add_module(mix, nn.Linear(INNER, EMBED))

    def forward(self, x: Tensor) -> Tensor:
        ask, key, val, mix = (getattr(self, name) for name in self.names)
        return mix(self.after(x, self.between(*(split(layer(x), self.h) for layer in (ask, key, val)))))

    def between(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (self.scores(q, k)).softmax(-1) @ v

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.mT * WIDTH ** -0.5

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return join(y)


class Differential(nn.Module):
    """Two maps of attention a head, one taken off the other, and a norm that all heads share."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.half = HEADS, 1
        self.ask, self.key, self.val = (nn.Linear(EMBED, INNER, bias=False) for _ in range(3))
        self.mix, self.norm, self.share = nn.Linear(INNER, EMBED), nn.RMSNorm(WIDTH, 1e-5), nn.Parameter(torch.rand(()))

    def forward(self, x: Tensor) -> Tensor:
        q, k = (split(layer(x), 2 * self.count) for layer in (self.ask, self.key))
        v = split(self.val(x), self.count)
        both = (q @ k.mT).softmax(-1).unflatten(1, (self.count, 2))
        return self.mix(join(self.norm((both[:, :, 0] - self.share * both[:, :, 1]) @ v)))


class OneKey(nn.Module):
    """All heads share one head of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.h, self.ask, self.both = HEADS, nn.Linear(EMBED, INNER), nn.Linear(EMBED, 2 * WIDTH)
        self.mix = nn.Linear(INNER, EMBED)

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.both(x).chunk(2, -1)
        weights = torch.einsum("nhtd,nsd->nhts", split(self.ask(x), self.h), k).softmax(-1)
        return self.mix(join(torch.einsum("nhts,nsd->nhtd", weights, v)))


class Pointwise(nn.Module):
    """Of convolutions over a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.groups_of, self.into, self.mix = HEADS, nn.Conv1d(EMBED, 3 * INNER, 1), nn.Conv1d(INNER, EMBED, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(1, (self.groups_of, -1)) for y in self.into(x.mT).chunk(3, 1))
        weights = torch.einsum("nhdi,nhdj->nhij", q, k).softmax(-1)
        return self.mix(torch.einsum("nhij,nhdj->nhdi", weights, v).flatten(1, 2)).mT


class Thin(nn.Module):
    """Whose heads have one dimension each."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.into, self.mix = HEADS, nn.Linear(EMBED, 3 * HEADS), nn.Linear(HEADS, EMBED)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.into(x).unflatten(-1, (3, self.heads, 1)).permute(2, 0, 3, 1, 4)
        return self.mix(join((q @ k.mT).softmax(-1) @ v))


def tokens() -> Tensor:
    """What models here read: [3, TOKENS, 3]."""
    return torch.randn(3, TOKENS, 3, generator=torch.Generator().manual_seed(1)).double()
