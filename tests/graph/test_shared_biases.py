"""Attentions that hand a bias for each head from one to the next, as T5's do: head by head, all of them go together."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import whole_way
from torch import Tensor, nn

import fastscore
from fastscore.graph.tracing import trace

HEADS, WIDTH, DIM, BLOCK = 4, 3, 10, 5


class Attention(nn.Module):
    """Of tokens among themselves; the first of several has a bias for each distance and head."""

    def __init__(self, has_bias: bool, heads: int = HEADS) -> None:
        super().__init__()
        self.n_heads, self.key_value_proj_dim = heads, HEADS * WIDTH // heads
        self.q, self.k, self.v = (nn.Linear(DIM, HEADS * WIDTH) for _ in range(3))
        self.o = nn.Linear(HEADS * WIDTH, DIM)
        if has_bias:
            self.relative_attention_bias = nn.Embedding(9, heads)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        q, k, v = (layer(x).view(*x.shape[:-1], -1, self.key_value_proj_dim).transpose(1, 2)
                   for layer in (self.q, self.k, self.v))
        if bias is None:
            places = torch.arange(x.shape[1])
            bias = self.relative_attention_bias(places[:, None] - places + 4).permute(2, 0, 1)[None]
        read = (q @ k.mT + bias).softmax(-1) @ v
        return self.o(read.transpose(1, 2).flatten(2)), bias


class InBlocks(Attention):
    """Of tokens with those of their block: the bias has five dimensions, as LongT5's."""

    def forward(self, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        blocks = x.unflatten(1, (-1, BLOCK))
        q, k, v = (layer(blocks).view(*blocks.shape[:-1], -1, self.key_value_proj_dim)
                   for layer in (self.q, self.k, self.v))
        if bias is None:
            places = torch.arange(BLOCK)
            bias = self.relative_attention_bias(places[:, None] - places + 4).permute(2, 0, 1)[None, None]
        scores = torch.einsum("...qhd,...khd->...hqk", q, k) + bias
        read = torch.einsum("...hqk,...khd->...qhd", scores.softmax(-1), v)
        return self.o(read.contiguous().view(*x.shape[:2], -1)), bias


class Model(nn.Module):
    """Three attentions, of which the last takes what the second gave it, or a part, by how many heads it has."""

    def __init__(self, last: int = HEADS, kind: type[Attention] = Attention) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, DIM), nn.Linear(DIM, 3)
        self.first, self.second, self.third = kind(True), kind(False), kind(False, last)
        self.alone, self.part = kind(True), last < HEADS

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y, bias = self.first(x)
        y, bias = self.second(x + y.tanh(), bias)
        z, _ = self.third(x + y, bias[:, :2] * self.third.n_heads if self.part else bias)
        return self.head(self.alone(x + z.tanh())[0]).mean(1)


def _x(blocks: int = 1) -> Tensor:
    return torch.randn(2, blocks * BLOCK, 4, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize("kind", [Attention, InBlocks])
def test_they_go_together(kind: type[Attention], tmp_path: Path) -> None:
    """By brute force, from data to a file."""
    small = whole_way.check(lambda: Model(kind=kind), _x(2 if kind is InBlocks else 1),
                            ["embed", "first.q", "alone.q", "alone.o"], tmp_path).model
    assert {attention.n_heads for attention in (small.first, small.second, small.third, small.alone)} == {2}
    assert small.first.relative_attention_bias.weight.shape == (9, 2)
    assert small.first.relative_attention_bias.embedding_dim == 2


def test_where_one_cannot_go_the_others_say_why() -> None:
    """A part of the bias is none that can be followed."""
    graph = trace(whole_way.noisy(lambda: Model(2)), _x())
    assert "alone.q" in {group.name for group in graph.groups}
    assert "third.o reads something else where some channels are gone" in graph.skipped["third.q"]


_SIZES: dict[str, Any] = {"vocab_size": 50, "d_model": 16, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 4,
                          "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
MODELS: dict[str, Callable[[], nn.Module]] = {  # by what the attention of its encoder is called
    "SelfAttention": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**_SIZES)),
    "LocalSelfAttention": lambda: transformers.LongT5ForConditionalGeneration(transformers.LongT5Config(
        **_SIZES, local_radius=2)),
    "TransientGlobalSelfAttention": lambda: transformers.LongT5ForConditionalGeneration(transformers.LongT5Config(
        **_SIZES, local_radius=2, global_block_size=2, encoder_attention_type="transient-global")),
}


@pytest.mark.parametrize("attention", MODELS)
def test_heads_of_t5(attention: str) -> None:
    """All of its self-attentions lose the same heads, and all that read the encoder; it goes on writing as it did."""
    model = whole_way.noisy(MODELS[attention]).float()
    tokens = torch.randint(2, 50, (3, 6), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": tokens, "decoder_input_ids": tokens.flip(1), "use_cache": False}
    scores = fastscore.score(model, [batch], progress=False, forward=_logits)
    heads = [name for name in scores if name.endswith("Attention.q")]
    assert [name.removesuffix(".q") for name in heads] == [
        f"encoder.block.0.layer.0.{attention}", "decoder.block.0.layer.0.SelfAttention",
        "decoder.block.0.layer.1.EncDecAttention"]
    options = {"scope": "layer", "compensate": False, "forward": _logits}
    small = fastscore.prune(model, scores, batch, channels=0.5, **options).model
    with torch.no_grad(), fastscore.mask(model, scores, 0.5, batch, **options):
        torch.testing.assert_close(_logits(small, batch), _logits(model, batch), rtol=1e-4, atol=1e-5)
    embeddings = [module for name, module in small.named_modules() if name.endswith("relative_attention_bias")]
    assert {module.weight.shape[1] for module in embeddings} == {2}
    assert {module.n_heads for module in small.modules() if hasattr(module, "n_heads")} == {2}
    with_cache, without = (small.generate(tokens, max_new_tokens=4, do_sample=False, use_cache=cached)
                           for cached in (True, False))
    assert torch.equal(with_cache, without)


def _logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).logits
