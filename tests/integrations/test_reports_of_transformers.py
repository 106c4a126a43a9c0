"""What the report says of pruned models of transformers: how to save them, and what became of heads."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import fastscore
from fastscore.integrations.transformers import forward

VIT = transformers.ViTConfig(image_size=16, patch_size=4, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
                             intermediate_size=64)
LLAMA = transformers.LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
                                 num_key_value_heads=2, head_dim=8, vocab_size=40, max_position_embeddings=32,
                                 pad_token_id=0)


def test_the_report_says_that_the_models_own_way_to_save_does_not_load(tmp_path: Path) -> None:
    """Where something went; and it does not."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = transformers.ViTForImageClassification(VIT).eval()
        batch = {"pixel_values": torch.randn(2, 3, 16, 16)}
    scores = fastscore.score(model, [batch], forward=forward, progress=False)
    for share, said in ((1.0, False), (0.7, True)):
        result = fastscore.prune(model, scores, batch, forward=forward, channels=share, progress=False)
        assert ("save_pretrained: its config.json tells the dense widths" in str(result.report)) is said
    result.model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="mismatched"):
        type(model).from_pretrained(tmp_path)
    rest = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    scores = fastscore.score(rest, [torch.ones(2, 3)], progress=False)
    assert "save_pretrained" not in str(fastscore.prune(rest, scores, torch.ones(2, 3), channels=0.5).report)


@pytest.mark.parametrize("kind", ["ViT", "Llama"])
def test_the_report_tells_heads_from_their_dimensions(kind: str) -> None:
    """What it says of a row is what the layers are left with; of two heads that share keys and values, both count."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = transformers.ViTForImageClassification(VIT) if kind == "ViT" else transformers.LlamaForCausalLM(
            LLAMA)
        batch = {"pixel_values": torch.randn(2, 3, 16, 16)} if kind == "ViT" else {
            "input_ids": torch.randint(1, 40, (2, 5))}
    units: Any = "heads_and_dims" if kind == "ViT" else "groups"
    scores = fastscore.score(model.eval(), [batch], units=units, forward=forward, progress=False)
    named = next(name for name in scores if "q_proj" in name and (kind == "Llama" or "(whole heads)" in name))
    others = [name for name in scores if "q_proj" not in name]
    for share in (1.0, 0.75, 0.5):
        result = fastscore.prune(model, scores, batch, forward=forward, channels=share, compensate=False,
                                 floor=dict.fromkeys(others, 0.4), progress=False)
        row = next(row for row in result.report.groups if row.layer == named)
        out = next(layer for name, layer in result.model.named_modules() if name.endswith("o_proj"))
        heads = next(module for name, module in result.model.named_modules() if name.endswith(("attention", "attn")))
        assert row.heads is not None
        assert row.heads[0] == 4
        assert row.heads[1] * heads.head_dim == out.in_features == row.channels[1]
        assert f" 4 → {row.heads[1]} heads" in str(result.report)
