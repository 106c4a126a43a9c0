"""Attentions of every layout whose heads are found, and a network around each."""

import copy
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from networks import Group
from torch import Tensor, nn

from fastscore.batches.calls import call_model
from fastscore.graph import cache
from fastscore.graph.groups import ChannelGraph
from fastscore.graph.tracing import trace

EMBED, HEADS, WIDTH, TOKENS = 10, 4, 3, 5  # heads x width differs from the embedding
EMBEDDING = ("embed",)  # the layer that makes it: a group of its own


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """[N, H, T, D] each -> [N, T, H·D]."""
    weights = (q @ k.mT / q.shape[-1] ** 0.5 + bias).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


class Fused(nn.Module):
    """One projection for queries, keys and values, with a bias for each head; then what `layout` makes of its rows."""

    def __init__(self, layout: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(EMBED, 3 * HEADS * WIDTH), nn.Linear(HEADS * WIDTH, EMBED)
        self.num_heads, self.head_dim = HEADS, WIDTH
        self.relative_position_bias_table = nn.Parameter(torch.randn(TOKENS, HEADS))
        self.layout = layout

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.layout(self.qkv(x))
        return self.proj(attend(q, k, v, self.relative_position_bias_table.t()[:, None]))


class Apart(nn.Module):
    """A projection each, keys and values shared by `repeats` heads; no count of heads is written down."""

    def __init__(self, repeats: int = 1, tiled: bool = False) -> None:
        super().__init__()
        self.head_dim, self.repeats, self.tiled = WIDTH, repeats, tiled
        self.q_proj = nn.Linear(EMBED, HEADS * WIDTH)
        self.k_proj, self.v_proj = (nn.Linear(EMBED, HEADS // repeats * WIDTH, bias=False) for _ in range(2))
        self.o_proj = nn.Linear(HEADS * WIDTH, EMBED, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(2, (-1, WIDTH)).transpose(1, 2)
                   for layer in (self.q_proj, self.k_proj, self.v_proj))
        k, v = ((y.repeat(1, self.repeats, 1, 1) if self.tiled else y.repeat_interleave(self.repeats, 1))
                for y in (k, v))
        return self.o_proj(attend(q, k, v))


class ByFunctions(Apart):
    """Whose code calls no projection, and runs functions of their weights."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (F.linear(x, layer.weight, layer.bias).unflatten(2, (-1, WIDTH)).transpose(1, 2)
                   for layer in (self.q_proj, self.k_proj, self.v_proj))
        return F.linear(attend(q, k, v), self.o_proj.weight)


class Nested(nn.Module):
    """The projections in one child, the output in another."""

    def __init__(self) -> None:
        super().__init__()
        self.self, self.output = nn.Module(), nn.Module()
        for name in ("query", "key", "value"):
            self.self.add_module(name, nn.Linear(EMBED, HEADS * WIDTH))
        self.self.num_attention_heads, self.self.attention_head_size = HEADS, WIDTH
        self.output.dense = nn.Linear(HEADS * WIDTH, EMBED)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(2, (self.self.num_attention_heads, WIDTH)).transpose(1, 2)
                   for layer in self.self.children())
        return self.output.dense(attend(q, k, v))


class Multihead(nn.Module):
    """PyTorch's own module, whose heads fill the embedding."""

    def __init__(self, embed: int = EMBED, heads: int = 5) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(embed, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


class Network(nn.Module):
    """An attention in a residual block, then a classifier."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(EMBED, EMBED), nn.LayerNorm(EMBED)
        self.attention, self.head = attention, nn.Linear(EMBED, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head((x + self.attention(self.norm(x))).tanh().mean(1))


def qkv_blocks(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(part.unflatten(2, (-1, WIDTH)).transpose(1, 2) for part in qkv.chunk(3, 2))


def qkv_by_head(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return qkv.unflatten(2, (-1, 3, WIDTH)).permute(3, 0, 2, 1, 4).unbind(0)


def network(attention: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Network(attention()).double().eval()


def inputs(samples: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(samples, TOKENS, EMBED, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# name -> (attention, group, output projection, channels of a unit)
KINDS: dict[str, tuple[Callable[[], nn.Module], str, str, int]] = {
    "fused": (lambda: Fused(qkv_blocks), "attention.qkv", "attention.proj", WIDTH),
    "fused by head": (lambda: Fused(qkv_by_head), "attention.qkv", "attention.proj", WIDTH),
    "apart": (Apart, "attention.q_proj", "attention.o_proj", WIDTH),
    "shared keys": (lambda: Apart(2), "attention.q_proj", "attention.o_proj", 2 * WIDTH),
    "by functions": (ByFunctions, "attention.q_proj", "attention.o_proj", WIDTH),
    "nested": (Nested, "attention.self.query", "attention.output.dense", WIDTH),
    "multihead": (Multihead, "attention.inner", "attention.inner.out_proj", 2),
}


def traced(kind: str) -> nn.Module:
    """A network around an attention, with the graph of another like it known: for tests of what comes after tracing."""
    model = network(KINDS[kind][0])
    if kind != "by functions":  # whose calls are noted of the model that is traced
        cache.put(model, inputs(1), call_model, _graph(kind))
    return model


@functools.cache
def _graph(kind: str) -> ChannelGraph:
    return trace(network(KINDS[kind][0]), inputs())


def channels_of(kind: str) -> int:
    return EMBED if kind == "multihead" else HEADS * WIDTH


def group_of(kind: str) -> Group:
    _, _, output, unit = KINDS[kind]
    channels = channels_of(kind)
    return Group(channels, {output: [[c] for c in range(channels)]}, units=tuple(c // unit for c in range(channels)))


def called(model: nn.Module) -> nn.Module:
    """A copy whose output projection is called, so that an oracle's hooks see it."""
    model = copy.deepcopy(model)
    for module in model.modules():
        module.__class__ = {nn.MultiheadAttention: ByDefinition, ByFunctions: Apart}.get(type(module), type(module))
    return model


class ByDefinition(nn.MultiheadAttention):
    """Vaswani et al., arXiv 1706.03762, section 3.2."""

    def forward(self, x: Tensor, key: Tensor, value: Tensor, need_weights: bool) -> tuple[Tensor, None]:
        q, k, v = (F.linear(x, w, b).unflatten(2, (self.num_heads, -1)).transpose(1, 2) for w, b in
                   zip(self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3), strict=True))
        return self.out_proj(attend(q, k, v)), None
