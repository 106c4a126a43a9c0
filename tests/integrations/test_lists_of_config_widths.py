"""Pruned models of transformers whose configs list a width for each layer, as ordinary ones."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import fastscore
from fastscore.integrations.transformers import forward, save_pretrained

WORDS = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LISTS: dict[str, tuple[Any, Any, str, list[str]]] = {
    "Gemma 3n": (transformers.Gemma3nForCausalLM, transformers.Gemma3nTextConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=4, vocab_size_per_layer_input=40, hidden_size_per_layer_input=4, laurel_rank=4,
        num_kv_shared_layers=0, **WORDS), "intermediate_size", ["*altup*", "*laurel*", "*self_attn*"]),
    "Laguna": (transformers.LagunaForCausalLM, transformers.LagunaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
        num_attention_heads_per_layer=[8, 4], head_dim=4, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=8, shared_expert_intermediate_size=8, **WORDS),
        "num_attention_heads_per_layer", ["*mlp*", "model.embed_tokens*"]),
    "HuBERT": (transformers.HubertModel, transformers.HubertConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, conv_dim=(8, 6, 12),
        conv_kernel=(5, 3, 2), conv_stride=(3, 2, 2), num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2),
        "conv_dim", ["*intermediate_dense"]),
}


@pytest.mark.parametrize("kind", LISTS)
def test_lists_of_a_width_for_each_layer(kind: str, tmp_path: Path) -> None:
    """Where a config has one, each layer goes as far as it may (Laguna's keys, of which there is one number, alike).
    What has to stay besides, the error says."""
    family, config, setting, ignore = LISTS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = family(config).eval()
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
        batch = {"input_values": torch.randn(3, 400)} if kind == "HuBERT" else {
            "input_ids": torch.randint(3, 40, (3, 7))}
    before = list(getattr(model.config, setting))
    scores = fastscore.score(model, [batch], forward=forward, progress=False)

    def pruned() -> Any:
        how: dict[str, Any] = {"channels": 0.5, "scope": "layer"} if kind == "Laguna" else {"channels": 0.7}
        return fastscore.prune(model, scores, batch, forward=forward, compensate=False, ignore=ignore, progress=False,
                               **how).model

    if kind == "HuBERT":
        with pytest.raises(ValueError, match=r"feature_projection\.layer_norm is a LayerNorm") as caught:
            save_pretrained(pruned(), tmp_path)
        ignore = [*ignore, *re.findall(r'"([^"]+)"', str(caught.value).partition("ignore=[")[2].partition("]")[0])]
        assert "feature_extractor.conv_layers.2.conv" in ignore
    small = pruned()
    save_pretrained(small, tmp_path)
    loaded = type(small).from_pretrained(tmp_path)
    left = list(getattr(loaded.config, setting))
    assert len({was - now for was, now in zip(before, left, strict=True)}) > 1
    assert all(now <= was for was, now in zip(before, left, strict=True))
    with torch.no_grad():
        torch.testing.assert_close(forward(loaded, batch), forward(small, batch), rtol=1e-4, atol=1e-5)
