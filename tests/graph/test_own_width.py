"""Attention whose code takes the width of what it reads for that of its heads, as much of timm's does."""

import copy
import io
from pathlib import Path

import pytest
import torch
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn
from whole_way import check, noisy

import fastscore
from fastscore.graph.tracing import trace
from fastscore.modules.attention import own_width

WIDTH, HEADS = 12, 3


class Plain(nn.Module):
    """Queries, keys and values from one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.scale = HEADS, (WIDTH // HEADS) ** -0.5
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        x = ((q * self.scale * scale) @ k.mT).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


class Across(nn.Module):
    """XCiT's: channels attend to channels, with a temperature for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.temperature = HEADS, nn.Parameter(torch.ones(HEADS, 1, 1))
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.size()
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 4, 1).unbind(0)
        q, k = nn.functional.normalize(q, dim=-1), nn.functional.normalize(k, dim=-1)
        x = ((q @ k.mT) * self.temperature).softmax(-1) @ v
        return self.proj(x.permute(0, 3, 1, 2).reshape(B, N, C))


class Pooled(nn.Module):
    """Queries from a layer of their own, keys and values from one."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.q, self.kv, self.proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q = self.q(x).reshape(B, N, self.num_heads, C // self.num_heads).transpose(1, 2)
        k, v = self.kv(x).reshape(B, N, 2, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        x = (q @ k.mT / 2).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


class Reduced(Pooled):
    """Of a pyramid (PVT, Twins): an image of what it reads, smaller, has the keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.sr, self.norm = nn.Conv2d(WIDTH, WIDTH, (2, 1), (2, 1)), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q = self.q(x).reshape(B, N, self.num_heads, -1).transpose(1, 2)
        x = self.sr(x.mT.reshape(B, C, 2, 3)).reshape(B, C, -1).mT
        k, v = self.kv(self.norm(x)).reshape(B, -1, 2, self.num_heads, 4).permute(2, 0, 3, 1, 4)
        x = (q @ k.mT / 2).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


class Positional(Plain):
    """GPSA of ConViT: of places and of what is there, by a gate for each head, in a method of its own."""

    def __init__(self) -> None:
        super().__init__()
        del self.qkv
        self.qk, self.v, self.pos_proj = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(2, HEADS)
        self.gating_param = nn.Parameter(torch.ones(HEADS))
        self.register_buffer("places", torch.linspace(-2, 2, 72).reshape(1, 6, 6, 2).sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        weights = self.get_attention(x)
        v = self.v(x).reshape(B, N, self.num_heads, C // self.num_heads).permute(0, 2, 1, 3)
        return self.proj((weights @ v).transpose(1, 2).reshape(B, N, C))

    def get_attention(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k = self.qk(x).reshape(B, N, 2, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        gate = self.gating_param.view(1, -1, 1, 1).sigmoid()
        places = self.pos_proj(self.places.expand(B, -1, -1, -1)).permute(0, 3, 1, 2)
        weights = (1 - gate) * (q @ k.mT * self.scale).softmax(-1) + gate * places.softmax(-1)
        return weights / weights.sum(-1, keepdim=True)


class Model(nn.Module):
    """A residual stream through one attention and one MLP."""

    def __init__(self, attention: type[nn.Module]) -> None:
        super().__init__()
        self.embed, self.norm1, self.norm2 = nn.Linear(5, WIDTH), nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = attention()
        self.mlp, self.head = nn.Sequential(nn.Linear(WIDTH, 8), nn.GELU(), nn.Linear(8, WIDTH)), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.attn(self.norm1(x))
        return self.head((x + self.mlp(self.norm2(x))).mean(1))


def _x() -> Tensor:
    return torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize("attention", [Plain, Across, Pooled, Reduced, Positional])
def test_heads_and_the_stream_go(attention: type[nn.Module], tmp_path: Path) -> None:
    """Each without the other: everything from data to a file, by brute force."""
    heads = "attn.q" if issubclass(attention, Pooled) else "attn.qk" if attention is Positional else "attn.qkv"
    small = check(lambda: Model(attention), _x(), ["embed", heads, "mlp.0"], tmp_path).model
    assert small.attn.num_heads < HEADS
    assert small.attn.proj.in_features == 4 * small.attn.num_heads != small.embed.out_features
    assert type(small.attn).__name__ == attention.__name__
    assert isinstance(small.attn, attention)


def test_a_smaller_model_is_copied_pickled_and_pruned_again() -> None:
    """The class that its attention gets is made anew where it is loaded."""
    model, x = noisy(lambda: Model(Plain)), _x()
    scores = fastscore.score(model, [x], importance="magnitude-l2", progress=False)
    small = fastscore.prune(model, scores, x, channels=0.6, scope="layer").model
    expected = small(x)
    file = io.BytesIO()
    torch.save(small, file)
    file.seek(0)
    for again in (copy.deepcopy(small), torch.load(file, weights_only=False)):
        assert torch.equal(again(x), expected)
        assert type(again.attn) is type(small.attn)
    assert {group.name for group in trace(small, x).groups} == {group.name for group in trace(model, x).groups} \
        - ({"attn.qkv"} if small.attn.num_heads == 1 else set())
    assert type(model.attn) is Plain


class Inherited(Plain):
    """Its code refers to what stands around it."""

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        B, N, C = x.shape
        return super().forward(x, scale=scale).reshape(B, N, C)


class Measured(Plain):
    """x is something else when its shape is read."""

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        x = x[:, :, None].expand(-1, -1, 2, -1).flatten(1, 2)
        B, N, C = x.shape
        return Plain.forward(self, x).reshape(B, N // 2, 2, C).mean(2)


@pytest.mark.parametrize("attention", [Inherited, Measured, nn.Linear])
def test_other_code_stays_as_it_is(attention: type[nn.Module]) -> None:
    """Code that is not understood is not changed."""
    assert own_width.with_own_width(attention) is None


def test_defaults_and_positions_in_the_file_are_kept() -> None:
    """The code that is changed differs in the width alone."""
    made = own_width.with_own_width(Plain)
    assert made is own_width.with_own_width(Plain)
    assert made.forward.__kwdefaults__ == {"scale": 1.0}
    assert made.forward.__code__.co_filename == __file__
    assert made.forward.__code__.co_firstlineno == Plain.forward.__code__.co_firstlineno
    assert own_width.with_own_width(nn.Linear) is None


def test_attention_that_reads_less_and_makes_as_much() -> None:
    """A pool whose projection no group has: what it reads is narrower, in the model that is returned, too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 12), nn.GELU(), AttentionPoolLatent(12, num_heads=3), nn.Linear(12, 4)).eval()
    x = torch.randn(2, 6, 5)
    scores = fastscore.score(model, [x], progress=False)
    others = [name for name in scores if name != "0"]
    result = fastscore.prune(model, scores, x[:1], channels=0.7, compensate=False, ignore=others)
    assert set(result.removed) == {"0"}
    fraction = 1 - result.report.channels[1] / result.report.channels[0]
    with fastscore.mask(model, scores, fraction, x[:1], compensate=False, ignore=others) as masked:
        assert torch.equal(masked["0"], result.removed["0"])
        torch.testing.assert_close(result.model(x), model(x))
