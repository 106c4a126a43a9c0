"""Attentions whose code hands weights of layers that it does not call to F.multi_head_attention_forward."""

import copy
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_layouts import EMBED, HEADS, TOKENS, tokens
from own_attentions import Network
from torch import Tensor, nn
from whole_way import check, noisy

import fastscore
from fastscore.graph.tracing import trace
from fastscore.modules.attention.multihead_attention import replace_attention


class Apart(nn.Module):
    """As fairseq's: sequences first, the call in a method of its own, arguments by position."""

    def __init__(self, bias: bool = True, extra: bool = False) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(EMBED, EMBED) for _ in range(4))
        self.embed_dim, self.num_heads, self.dropout = EMBED, HEADS, 0.0
        self.bias_k, self.bias_v = (nn.Parameter(torch.randn(1, 1, EMBED)) if extra else None for _ in range(2))
        self.add_zero_attn = extra

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return self.attend(x.transpose(0, 1), **options)[0].transpose(0, 1)

    def attend(self, x: Tensor, other: Tensor | None = None, padding: Tensor | None = None,
               weights: bool = True, **options: Any) -> tuple[Tensor, Tensor | None]:
        _, _, embed_dim = x.size()
        assert embed_dim == self.embed_dim
        key = x if other is None else other
        return F.multi_head_attention_forward(
            x, key, key, self.embed_dim, self.num_heads, torch.empty([0]),
            torch.cat((self.q_proj.bias, self.k_proj.bias, self.v_proj.bias)), self.bias_k, self.bias_v,
            self.add_zero_attn, self.dropout, self.out_proj.weight, self.out_proj.bias, self.training, padding, weights,
            attn_mask=options.get("mask"), use_separate_proj_weight=True, q_proj_weight=self.q_proj.weight,
            k_proj_weight=self.k_proj.weight, v_proj_weight=self.v_proj.weight,
            is_causal=options.get("causal", False))


class Pooled(nn.Module):
    """As at the end of CLIP's ResNets: one query, an output of its own width."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(TOKENS + 1, EMBED))
        self.k_proj, self.q_proj, self.v_proj = (nn.Linear(EMBED, EMBED) for _ in range(3))
        self.c_proj, self.num_heads = nn.Linear(EMBED, 4), HEADS

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(1, 0, 2)
        x = torch.cat([x.mean(0, keepdim=True), x])
        x = x + self.places[:, None, :].to(x.dtype)
        x, _ = F.multi_head_attention_forward(
            query=x[:1], key=x, value=x, embed_dim_to_check=x.shape[-1], num_heads=self.num_heads,
            q_proj_weight=self.q_proj.weight, k_proj_weight=self.k_proj.weight, v_proj_weight=self.v_proj.weight,
            in_proj_weight=None, in_proj_bias=torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias]),
            bias_k=None, bias_v=None, add_zero_attn=False, dropout_p=0, out_proj_weight=self.c_proj.weight,
            out_proj_bias=self.c_proj.bias, use_separate_proj_weight=True, training=self.training, need_weights=False)
        return x.squeeze(0)


class WithoutBias(Apart):
    def __init__(self) -> None:
        super().__init__()
        for layer in self.children():
            layer.register_parameter("bias", None)

    def attend(self, x: Tensor, other: Tensor | None = None, padding: Tensor | None = None,
               weights: bool = True, **options: Any) -> tuple[Tensor, Tensor | None]:
        return nn.functional.multi_head_attention_forward(
            x, x, x, self.embed_dim, self.num_heads, None, None, None, None, False, 0.0, self.out_proj.weight, None,
            use_separate_proj_weight=True, q_proj_weight=self.q_proj.weight, k_proj_weight=self.k_proj.weight,
            v_proj_weight=self.v_proj.weight)


class Swapped(Apart):
    """Whose queries have the bias of the keys."""

    def attend(self, x: Tensor, other: Tensor | None = None, padding: Tensor | None = None,
               weights: bool = True, **options: Any) -> tuple[Tensor, Tensor | None]:
        return F.multi_head_attention_forward(
            x, x, x, self.embed_dim, self.num_heads, None,
            torch.cat((self.k_proj.bias, self.q_proj.bias, self.v_proj.bias)), None, None, False, 0.0,
            self.out_proj.weight, self.out_proj.bias, use_separate_proj_weight=True, q_proj_weight=self.q_proj.weight,
            k_proj_weight=self.k_proj.weight, v_proj_weight=self.v_proj.weight)


class Halved(Apart):
    """Whose output projection is multiplied by half of its weight."""

    def attend(self, x: Tensor, other: Tensor | None = None, padding: Tensor | None = None,
               weights: bool = True, **options: Any) -> tuple[Tensor, Tensor | None]:
        return F.multi_head_attention_forward(
            x, x, x, self.embed_dim, self.num_heads, None,
            torch.cat((self.q_proj.bias, self.k_proj.bias, self.v_proj.bias)), None, None, False, 0.0,
            self.out_proj.weight / 2, self.out_proj.bias, use_separate_proj_weight=True,
            q_proj_weight=self.q_proj.weight, k_proj_weight=self.k_proj.weight, v_proj_weight=self.v_proj.weight)


class Images(nn.Module):
    """A stream that a pooling reads."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.pool = nn.Linear(3, EMBED), Pooled()

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.embed(x).relu())


@pytest.mark.parametrize("attention", [Apart, WithoutBias])
def test_heads_go(attention: type[nn.Module], tmp_path: Path) -> None:
    """Everything from data to a file, by brute force."""
    small = check(lambda: Network(attention), tokens(), ["attn.q_proj", "mlp.0"], tmp_path, only=False).model
    assert small.attn.num_heads == HEADS // 2
    assert small.attn.q_proj.out_features == small.attn.out_proj.in_features == EMBED // 2


def test_heads_and_the_stream_of_a_pooling_go(tmp_path: Path) -> None:
    small = check(Images, tokens(), ["embed", "pool.k_proj"], tmp_path).model
    assert small.pool.num_heads == HEADS // 2
    assert small.pool.k_proj.in_features == EMBED // 2
    assert type(copy.deepcopy(small.pool)) is type(pickle.loads(pickle.dumps(small.pool))) is type(small.pool)


_PADDING = torch.tensor([[False] * TOKENS, [False] * 3 + [True] * 2, [False] * 4 + [True]])
_CAUSAL = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)


_OPTIONS: list[dict[str, Any]] = [
    {}, {"weights": False}, {"padding": _PADDING}, {"padding": _PADDING, "mask": _CAUSAL, "weights": False},
    {"mask": torch.randn(3 * HEADS, TOKENS, TOKENS, dtype=torch.float64)},
    {"other": torch.randn(7, 3, EMBED, dtype=torch.float64)}, {"mask": _CAUSAL, "causal": True, "weights": False}]


@pytest.mark.parametrize(("options", "extra"), [
    *((options, False) for options in _OPTIONS), *((options, True) for options in _OPTIONS[:-1])])
def test_what_the_layers_make_is_what_the_function_does(options: Mapping[str, Any], extra: bool) -> None:
    module, x = noisy(lambda: Apart(extra=extra)), torch.randn(TOKENS, 3, EMBED, dtype=torch.float64)
    expected, called = module.attend(x, **options), list[nn.Module]()
    before = type(module)
    handles = [*replace_attention(module), *(layer.register_forward_hook(lambda layer, *_: called.append(layer))
                                             for layer in module.children())]
    found = module.attend(x, **options)
    for handle in handles:
        handle.remove()
    assert set(called) == set(module.children())
    assert type(module) is before
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert torch.equal(module.attend(x, **options)[0], expected[0])


def test_one_sequence_without_a_batch() -> None:
    class Alone(Pooled):
        def forward(self, x: Tensor) -> Tensor:
            return F.multi_head_attention_forward(
                x, x, x, EMBED, self.num_heads, None,
                torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias], dim=0), None, None, False, 0.0,
                self.c_proj.weight, self.c_proj.bias, use_separate_proj_weight=True, q_proj_weight=self.q_proj.weight,
                k_proj_weight=self.k_proj.weight, v_proj_weight=self.v_proj.weight)[0]

    module, x = noisy(Alone), torch.randn(TOKENS, EMBED, dtype=torch.float64)
    expected = module(x)
    for _ in replace_attention(module):
        pass
    assert type(module) is not Alone
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize("attention", [Swapped, Halved])
def test_other_weights_than_those_of_layers_stay(attention: type[nn.Module]) -> None:
    model = noisy(lambda: Network(attention))
    graph = trace(model, tokens())
    assert [group.name for group in graph.groups] == ["mlp.0"]
    assert "attn.q_proj" in " ".join(graph.skipped.values())


def test_a_layer_with_a_hook_of_the_users_is_not_called() -> None:
    """It did not run before, so that nothing that it does may show."""
    model, seen = noisy(lambda: Network(Apart)), list[nn.Module]()
    model.attn.v_proj.register_forward_hook(lambda layer, *_: seen.append(layer))
    scores = fastscore.score(model, [tokens()], progress=False)
    assert "attn.q_proj" not in scores
    assert not seen
