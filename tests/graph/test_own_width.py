"""Attention whose code takes the width of what it reads for that of its heads, as much of timm's does."""

import copy
import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn
from whole_way import check, noisy

import fastscore
from fastscore.graph.cutting import surgery
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


def _counted(number: int) -> Callable[[Any], Any]:
    """A decorator with something of its own in its closure."""
    def decorate(function: Any) -> Any:
        @functools.wraps(function)
        def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return function(self, *args, **kwargs) * number

        return wrapper

    return decorate


class Decorated(Plain):
    """As TrOCR's, with a word on an argument that is out of use."""

    @_counted(2)
    @_counted(3)
    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        x = ((q * self.scale * scale) @ k.mT).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


class Described(Plain):
    """As PEGASUS-X's, which asks for one dimension after another, and has methods multiply."""

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        sizes = {"rows": (x.shape[0], x.size(1)), "heads": self.num_heads, "width": x.shape[2]}
        each = x.size(-1) // self.num_heads
        q, k, v = self.qkv(x).reshape(*sizes["rows"], 3, sizes["heads"], each).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(self._attend(q * self.scale * scale, k, v).transpose(1, 2).reshape(*sizes["rows"],
                                                                                          sizes["width"]))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.matmul(torch.matmul(q, k.mT).softmax(-1), v)


class Named(Described):
    """One that gives the width a name."""

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        width = x.size(-1)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        x = self._attend(q * self.scale * scale, k, v)
        return self.proj(x.transpose(1, 2).reshape(len(x), -1, width))


class Model(nn.Module):
    """A residual stream through one attention and one MLP."""

    def __init__(self, attention: Callable[[], nn.Module]) -> None:
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


@pytest.mark.parametrize("attention", [Plain, Across, Pooled, Reduced, Positional, Decorated, Described, Named])
def test_heads_and_the_stream_go(attention: type[nn.Module], tmp_path: Path) -> None:
    """Each without the other: everything from data to a file, by brute force."""
    heads = "attn.q" if issubclass(attention, Pooled) else "attn.qk" if attention is Positional else "attn.qkv"
    small = check(lambda: Model(attention), _x(), ["embed", heads, "mlp.0"], tmp_path).model
    assert small.attn.num_heads < HEADS
    assert small.attn.proj.in_features == 4 * small.attn.num_heads != small.embed.out_features
    assert type(small.attn).__name__ == attention.__name__
    assert isinstance(small.attn, attention)


class Inner(nn.Module):
    """As Longformer's: what reads its heads stands in another module, and it asks whether what it reads is as wide as
    it was built for, and makes something as wide."""

    def __init__(self) -> None:
        super().__init__()
        self.longest = WIDTH  # another thing, by chance as large
        self.num_heads, self.head_dim, self.embed_dim = HEADS, WIDTH // HEADS, WIDTH
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :self.longest].transpose(0, 1)
        q, k, v = self.query(x), self.key(x), self.value(x)
        N, B, C = x.size()
        assert self.embed_dim == C, f"{C} is not {self.embed_dim}"
        q, k, v = (part.view(N, B, self.num_heads, self.head_dim).permute(1, 2, 0, 3) for part in (q, k, v))
        made = self._attend(q, k, v).permute(2, 0, 1, 3).reshape(N, B, C)
        first = x.new_zeros(1, B, self.embed_dim)
        first[0] = x[0]
        return (made + self.value(first)).transpose(0, 1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.einsum("bhnm,bhmc->bhnc", torch.einsum("bhnc,bhmc->bhnm", q, k).softmax(-1), v)


class Outer(nn.Module):
    """A module whose attention is in one, and its projection in another."""
    def __init__(self, inner: type[nn.Module] = Inner) -> None:
        super().__init__()
        self.self, self.output = inner(), nn.Sequential(nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.self(x))


class OneLayer(nn.Module):
    """As TimeSformer's: all three in one layer, and nothing else in the module that attends."""
    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.qkv = HEADS, nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        return ((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).reshape(B, N, C)


def test_a_width_of_three_in_one_layer(tmp_path: Path) -> None:
    small = check(lambda: Model(lambda: Outer(OneLayer)), _x(), ["embed", "attn.self.qkv", "mlp.0"], tmp_path).model
    assert small.attn.self.qkv.out_features == 12 * small.attn.self.num_heads != 3 * small.embed.out_features


class Deep(Model):
    """Two such attentions."""

    def __init__(self) -> None:
        super().__init__(Outer)
        self.again = Outer()

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.attn(self.norm1(x))
        return self.head((x + self.again(x) + self.mlp(self.norm2(x))).mean(1))


def test_a_width_that_code_asks_for_goes_with_the_stream(tmp_path: Path) -> None:
    """And heads with one that is kept beside them."""
    small = check(Deep, _x(), ["embed", "attn.self.query", "again.self.query", "mlp.0"], tmp_path).model
    for attention in (small.attn.self, small.again.self):
        assert attention.embed_dim == small.embed.out_features < WIDTH == attention.longest
        assert attention.num_heads < HEADS


class Streams(nn.Module):
    """Two of the same width, of which modules of one class ask."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Deep(), Deep()

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.two(x)


def test_each_of_two_streams_takes_its_own_numbers(tmp_path: Path) -> None:
    """The modules of the other one keep theirs."""
    names = ("embed", "attn.self.query", "again.self.query", "mlp.0")
    every = [f"{stream}.{name}" for stream in ("one", "two") for name in names]
    check(Streams, _x(), every, tmp_path)
    model = noisy(Streams)
    group = next(group for group in trace(model, _x()).groups if group.name == "one.embed")
    small = surgery.smaller_copy(model, lambda whole: surgery.remove_channels(
        whole, [group], {group.name: torch.tensor([1, 2, 7])}))
    assert small.one.again.self.embed_dim == small.one.attn.self.embed_dim == WIDTH - 3
    assert small.two.again.self.embed_dim == small.two.attn.self.embed_dim == WIDTH
    assert small(_x()).shape == (2, 4)


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
