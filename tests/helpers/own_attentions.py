"""Attentions that do more between their projections than the plain one, and a residual network around any."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from attention_layouts import (
    EMBED,
    HEADS,
    INNER,
    TOKENS,
    WIDTH,
    Apart,
    Differential,
    Filled,
    OneKey,
    OneProjection,
    Pointwise,
    Rotary,
    Thin,
    Woven,
    join,
    split,
)
from torch import Tensor, nn


class Capped(Apart):
    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return 5 * torch.tanh(super().scores(q, k) / 5)


class Sinks(Apart):
    """Each head has a key of its own that nothing is read at."""

    names = ("q_proj", "k_proj", "v_proj", "o_proj")

    def __init__(self) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.randn(HEADS))

    def between(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sinks = self.sinks.view(1, -1, 1, 1).expand(len(q), -1, q.shape[2], -1)
        return torch.cat([self.scores(q, k), sinks], -1).softmax(-1)[..., :-1] @ v


class SharedSinks(Sinks):
    """Keys and values shared by two heads each, and no number of heads."""

    def __init__(self) -> None:
        super().__init__()
        self.k_proj, self.v_proj = (nn.Linear(EMBED, INNER // 2) for _ in range(2))
        del self.h

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(2, (-1, WIDTH)).transpose(1, 2)
                   for layer in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(join(self.between(q, *(y.repeat_interleave(2, 1) for y in (k, v)))))


class HeadGate(Apart):
    """A layer makes a number for each head, by which its output is multiplied."""

    names = ("q_proj", "k_proj", "v_proj", "o_proj")

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(EMBED, HEADS)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return join(y * self.gate(x).sigmoid().mT[..., None])


class Gate(Apart):
    """A layer makes a number for each channel of each head."""

    names = ("q_proj", "k_proj", "v_proj", "o_proj")

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(EMBED, INNER)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return join(y) * self.gate(x).sigmoid()


class Sigmoid(Apart):
    """No softmax, and two numbers for each head, in different shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.tau = nn.Parameter(torch.randn(HEADS, 1, 1)), nn.Parameter(torch.rand(1, HEADS, 1, 1) + 0.5)

    def between(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (self.scores(q, k) * self.tau + self.shift).sigmoid() @ v


class Slopes(Apart):
    """A slope for each head, in a buffer, and a bias for each head and distance."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("slopes", 2.0 ** -torch.arange(1.0, HEADS + 1).view(1, HEADS, 1, 1))
        self.distances = nn.Embedding(2 * TOKENS - 1, HEADS)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        place = torch.arange(q.shape[2])
        away = place - place[:, None]
        bias = self.distances(away + TOKENS - 1).permute(2, 0, 1)
        return super().scores(q, k) + self.slopes * away + bias


class Retention(Apart):
    """A decay for each head, a GroupNorm of a group a head, and a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.gate = nn.GroupNorm(HEADS, INNER), nn.Linear(EMBED, INNER, bias=False)
        self.register_buffer("decay", torch.log(1 - 2 ** (-2 - torch.arange(float(HEADS)))))

    def between(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        place = torch.arange(q.shape[2])
        away = place[:, None] - place
        return (q @ k.mT * torch.exp(away.clamp(min=0) * self.decay[:, None, None]) * (away >= 0)) @ v

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        y = join(y)
        return F.silu(self.gate(x)) * self.norm(y.flatten(0, 1)).view_as(y)


class Normed(Apart):
    """Queries are normalised over all heads, keys over each with weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.all_heads, self.weight = nn.RMSNorm(INNER, eps=1e-6), nn.Parameter(torch.rand(HEADS, 1, WIDTH) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = split(self.all_heads(self.ask(x)), self.h), split(self.key(x), self.h), split(self.val(x), self.h)
        k = k * (k.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * self.weight
        return self.mix(join(self.between(q, k, v)))


class Across(Apart):
    """Whose heads lie across the rows of the projections, and what they make across columns."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(2, (-1, self.h)).permute(0, 3, 1, 2) for layer in (self.ask, self.key, self.val))
        return self.mix(self.between(q, k, v).permute(0, 2, 3, 1).flatten(2))


class AcrossRows(Apart):
    """Whose heads lie across the rows of the projections alone, as many as there are when each has two."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(2, (WIDTH, -1)).permute(0, 3, 1, 2) for layer in (self.ask, self.key, self.val))
        return self.mix(join(self.between(q, k, v)))


class Kernel(Apart):
    """Linear attention, with features of queries and keys."""

    def between(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = F.elu(q) + 1, F.elu(k) + 1
        state = torch.einsum("nhtd,nhte->nhde", k, v)
        return torch.einsum("nhtd,nhde->nhte", q, state) / torch.einsum("nhtd,nhd->nht", q, k.sum(2))[..., None]


class Memory(Apart):
    """Keys and values of other tokens, from one layer."""

    def __init__(self) -> None:
        super().__init__()
        del self.key, self.val
        self.context, self.both = nn.Linear(EMBED, 6), nn.Linear(6, 2 * INNER)

    def forward(self, x: Tensor) -> Tensor:
        k, v = (split(y, self.h) for y in self.both(self.context(x[:, :3]).tanh()).chunk(2, -1))
        return self.mix(join(self.between(split(self.ask(x), self.h), k, v)))


class Talking(Apart):
    """Whose heads read each other before and behind a softmax, through layers."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.behind = nn.Linear(HEADS, HEADS), nn.Linear(HEADS, HEADS)

    def between(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = self.before(self.scores(q, k).movedim(1, -1)).softmax(-2)
        return self.behind(weights).movedim(-1, 1) @ v


class TalkingOnce(Apart):
    """Through a convolution, behind the softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.talk, self.norm = nn.Conv2d(HEADS, HEADS, 1), nn.BatchNorm2d(HEADS)

    def between(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.norm(self.talk(self.scores(q, k).softmax(-1))) @ v


class _Places(nn.Module):
    """A number for each head and pair of places, looked up in a table."""

    def __init__(self) -> None:
        super().__init__()
        self.shape = (TOKENS, TOKENS, HEADS)
        self.table = nn.Parameter(torch.randn(2 * TOKENS - 1, HEADS))
        at = torch.arange(TOKENS)
        self.register_buffer("places", (at[:, None] - at + TOKENS - 1).flatten(), persistent=False)

    def forward(self, scores: Tensor) -> Tensor:
        return scores + self.table[self.places].view(self.shape).permute(2, 0, 1).contiguous()


class TableBias(Apart):
    """Whose biases are shaped by a tuple that another module keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.where = _Places()

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return self.where(super().scores(q, k))


class RowBias(Apart):
    """Whose biases have a row for each head, and are kept from one call to the next."""

    def __init__(self) -> None:
        super().__init__()
        self.biases = nn.Parameter(torch.randn(HEADS, TOKENS))
        at = torch.arange(TOKENS)
        self.register_buffer("places", (at[:, None] - at).abs(), persistent=False)
        self.cache: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> nn.Module:
        self.cache = {}
        return super().train(mode)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        if self.training:
            return super().scores(q, k) + self.biases[:, self.places]
        return super().scores(q, k) + self.cache.setdefault(str(q.device), self.biases[:, self.places])


class NetBias(Apart):
    """Whose biases a network makes of places."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.shape = HEADS, (TOKENS, TOKENS, HEADS)
        self.net = nn.Sequential(nn.Linear(1, 7), nn.ReLU(), nn.Linear(7, HEADS))
        at = torch.arange(TOKENS)
        self.register_buffer("places", (at[:, None] - at + TOKENS - 1).flatten(), persistent=False)
        self.register_buffer("far", torch.linspace(-1, 1, 2 * TOKENS - 1)[:, None], persistent=False)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        bias = self.net(self.far).view(-1, self.num_heads)[self.places].view(self.shape)
        return super().scores(q, k) + 16 * bias.permute(2, 0, 1).sigmoid()


class Convolved(nn.Module):
    """A state space's dual, as Mamba 2 has it: one projection for gates, values, what all heads read and write by, and
    steps; a convolution over those of them that are filtered. The last product is what it would go on from."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.inner, self.state, self.mixed = HEADS, INNER, 3, INNER + 2 * 3
        self.into, self.mix = nn.Linear(EMBED, 2 * INNER + 2 * 3 + HEADS), nn.Linear(INNER, EMBED)
        self.filters = nn.Conv1d(self.mixed, self.mixed, 3, padding=1, groups=self.mixed)
        self.decay = nn.Parameter(torch.rand(HEADS))

    def forward(self, x: Tensor) -> Tensor:
        gate, mixed, step = self.into(x).split([self.inner, self.mixed, self.count], -1)
        v, read, write = self.filters(mixed.mT).mT.tanh().split([self.inner, self.state, self.state], -1)
        v = v.unflatten(-1, (self.count, -1)) * F.softplus(step * self.decay)[..., None]
        y = torch.einsum("nij,njhd->nihd", (read @ write.mT).tril(), v).flatten(2) * gate.sigmoid()
        _ = torch.einsum("njs,njhd->nhsd", write, v)
        return self.mix(y)


class Network(nn.Module):
    """A stream through one attention and one MLP."""

    def __init__(self, attention: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embed, self.norm1, self.norm2 = nn.Linear(3, EMBED), nn.LayerNorm(EMBED), nn.LayerNorm(EMBED)
        self.attn = attention()
        self.mlp, self.head = nn.Sequential(nn.Linear(EMBED, 6), nn.GELU(), nn.Linear(6, EMBED)), nn.Linear(EMBED, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.attn(self.norm1(x))
        return self.head((x + self.mlp(self.norm2(x))).mean(1))


# attention -> the first layer that its heads are of
KINDS: dict[type[nn.Module], str] = {
    OneProjection: "into", Filled: "ask", Rotary: "wq", Apart: "ask", Capped: "ask", Sinks: "q_proj",
    SharedSinks: "q_proj",
    HeadGate: "q_proj", Gate: "q_proj", Sigmoid: "ask", Slopes: "ask", Retention: "ask", Normed: "ask",
    Differential: "ask", OneKey: "ask", Kernel: "ask", Pointwise: "into", Memory: "ask",
    Across: "ask", AcrossRows: "ask", TableBias: "ask", RowBias: "ask", NetBias: "ask",
    Talking: "ask", TalkingOnce: "ask", Convolved: "into", Woven: "into", Thin: "into"}
