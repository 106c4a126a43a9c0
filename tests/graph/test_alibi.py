"""Heads of attentions that are handed a bias for each, which the model computes from the number in its config (ALiBi):
each attention that has lost some reads those of the others."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import whole_way
from oracles import untouched
from thinned import NIGHTLY
from torch import nn

import fastscore
from fastscore.graph.tracing import trace
from fastscore.integrations.transformers import forward
from fastscore.modules.attention import handed

WORDS: dict[str, Any] = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TOKENS = {"input_ids": torch.randint(3, 50, (4, 6), generator=torch.Generator().manual_seed(1))}  # as many as heads


def _falcon(how: str) -> nn.Module:
    return transformers.FalconForCausalLM(transformers.FalconConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, alibi=True, multi_query=False,
        new_decoder_architecture=False, parallel_attn=False, attn_implementation=how, **WORDS))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[str, str]]] = {  # and groups of heads
    "BLOOM": (lambda: transformers.BloomForCausalLM(transformers.BloomConfig(
        hidden_size=16, n_layer=2, n_head=4, **WORDS)), ("transformer.h", "self_attention.query_key_value")),
    "MPT": (lambda: transformers.MptForCausalLM(transformers.MptConfig(
        d_model=16, n_layers=2, n_heads=4, expansion_ratio=1, max_seq_len=32, **WORDS)),
        ("transformer.blocks", "attn.Wqkv")),
    "Falcon": (lambda: _falcon("sdpa"), ("transformer.h", "self_attention.query_key_value")),
}
if NIGHTLY:
    MODELS["Falcon, eager"] = lambda: _falcon("eager"), MODELS["Falcon"][1]


def _groups(name: str) -> list[str]:
    before, behind = MODELS[name][1]
    return [f"{before}.{layer}.{behind}" for layer in range(2)]


@pytest.mark.parametrize("name", MODELS)
def test_whole_way(name: str, tmp_path: Path) -> None:
    def build() -> nn.Module:
        model: Any = MODELS[name][0]()
        model.config.use_cache = False
        return model

    small = whole_way.check(build, {"input_ids": TOKENS["input_ids"][:3]}, _groups(name), tmp_path, only=False).model
    read = [module.handed_heads.tolist() for module in small.modules() if "handed_heads" in module._buffers]
    assert [len(heads) for heads in read] == [2, 2]


@pytest.mark.parametrize("name", MODELS)
def test_texts_are_those_of_the_masked_model(name: str) -> None:
    """With a cache and without, with padding and without; of a copy, too, and of a model that is pruned again."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = MODELS[name][0]().eval()
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    padded = torch.ones_like(TOKENS["input_ids"])
    padded[0, :3] = 0
    one = {"input_ids": TOKENS["input_ids"][:1]}
    assert trace(model, one, forward).fingerprint == trace(model, TOKENS, forward).fingerprint
    for share in (0.7, 0.6):
        scores = fastscore.score(model, [TOKENS], forward=forward, progress=False)
        with untouched(model):
            result = fastscore.prune(model, scores, TOKENS, forward=forward, channels=share, scope="layer")
            small: Any = result.model
            for mask in (torch.ones_like(padded), padded):
                texts = [each.generate(TOKENS["input_ids"], attention_mask=mask, use_cache=cached, **options)
                         for each in (small, pickle.loads(pickle.dumps(copy.deepcopy(small))))
                         for cached in (True, False)]
                with fastscore.mask(model, scores, result, TOKENS, forward=forward):
                    texts.append(model.generate(TOKENS["input_ids"], attention_mask=mask, **options))
                assert all(torch.equal(text, texts[0]) for text in texts)
        model = small
    heads = [len(module.handed_heads) for module in small.modules() if "handed_heads" in module._buffers]
    assert len(heads) == 2
    assert max(heads) <= 2


def test_what_is_handed_for_each_head_is_told_from_what_is_not() -> None:
    module = nn.Module()
    images, bias, mask = torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 5, 5), torch.zeros(2, 1, 5, 5)
    assert handed.biases(module, (images,), {"bias": bias, "mask": mask}, 3) == ("bias",)
    assert handed.biases(module, (images,), {"bias": bias[:, None], "mask": mask[:, None]}, 3) == ("bias",)
    rows = torch.zeros(2, 5, 12)
    assert handed.biases(module, (rows,), {"residual": rows, "alibi": torch.zeros(6, 1, 5)}, 3) == ("alibi",)
    assert handed.biases(module, (rows,), {"residual": rows, "alibi": torch.zeros(2, 1, 5)}, 2) == ("alibi",)
    assert handed.biases(module, (rows,), {"alibi": torch.zeros(2, 1, 5)}, 1) == ()


class Own(nn.Module):
    """An attention of which names say nothing, given a bias for each head, as CPM-Ant's."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.one = 4, nn.Linear(8, 16)
        self.two, self.three, self.back = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor, near: torch.Tensor) -> torch.Tensor:
        one, two, three = (layer(x).view(*x.shape[:2], self.num_heads, 4).transpose(1, 2)
                           for layer in (self.one, self.two, self.three))
        among = (one @ two.mT / 2 + near).softmax(-1) @ three
        return self.back(among.transpose(1, 2).flatten(2))


class Around(nn.Module):
    """Two of them, each of which is given the same table."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = nn.Linear(3, 8), nn.ModuleList([Own(), Own()]), nn.Linear(8, 2)
        self.near = nn.Parameter(torch.randn(4, 5, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, near = self.stem(x), self.near[None]
        for block in self.blocks:
            x = x + block(x, near=near)
        return self.head(x)


def test_attentions_of_which_names_say_nothing(tmp_path: Path) -> None:
    x = torch.randn(3, 5, 3, generator=torch.Generator().manual_seed(1)).double()
    small = whole_way.check(Around, x, ["blocks.0.one", "blocks.1.one"], tmp_path, only=False).model
    assert [block.handed_heads.numel() for block in small.blocks] == [2, 2]
    assert len(small.near) == 4
