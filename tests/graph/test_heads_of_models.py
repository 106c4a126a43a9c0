"""Heads of attentions whose code keeps their number, or something for each of them, elsewhere than in its layers."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import whole_way
from torch import nn
from torchvision.models import swin_transformer as swin

import fastscore

TOKENS = {"input_ids": torch.randint(1, 50, (3, 6), generator=torch.Generator().manual_seed(1))}
PIXELS = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)}


def _phi3() -> nn.Module:
    return transformers.Phi3ForCausalLM(transformers.Phi3Config(
        hidden_size=16, intermediate_size=12, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=50, max_position_embeddings=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, use_cache=False))


def _beit() -> nn.Module:
    return transformers.BeitForImageClassification(transformers.BeitConfig(
        hidden_size=16, intermediate_size=12, num_hidden_layers=1, num_attention_heads=4, image_size=16, patch_size=4,
        use_relative_position_bias=True, num_labels=5))


def _swin() -> nn.Module:
    return transformers.SwinForImageClassification(transformers.SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[2], num_heads=[4], window_size=4, num_labels=5))


def _swinv2() -> nn.Module:
    return transformers.Swinv2ForImageClassification(transformers.Swinv2Config(
        image_size=16, patch_size=2, embed_dim=8, depths=[2], num_heads=[4], window_size=4, num_labels=5))


def _deberta() -> nn.Module:
    return transformers.DebertaV2ForSequenceClassification(transformers.DebertaV2Config(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, intermediate_size=12,
        max_position_embeddings=16, relative_attention=True, position_buckets=4, pos_att_type=["p2c", "c2p"],
        share_att_key=True, norm_rel_ebd="layer_norm", position_biased_input=False, type_vocab_size=0))


def _modernbert() -> nn.Module:
    return transformers.ModernBertForSequenceClassification(transformers.ModernBertConfig(
        vocab_size=50, hidden_size=16, intermediate_size=12, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2))


def _mpnet() -> nn.Module:
    return transformers.MPNetForSequenceClassification(transformers.MPNetConfig(
        vocab_size=50, hidden_size=16, intermediate_size=12, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16))


def _falcon() -> nn.Module:
    """Whose queries share one head of keys and values, which stays."""
    return transformers.FalconForCausalLM(transformers.FalconConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=4, vocab_size=50, multi_query=True, bos_token_id=1,
        eos_token_id=2, use_cache=False))


# name -> (model, batch, group, shapes of parameters after half of the heads are gone)
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str, dict[str, tuple[int, ...]]]] = {
    "BEiT": (_beit, PIXELS, "beit.layers.0.attention.q_proj",
             {"beit.layers.0.relative_position_bias.relative_position_bias_table": (52, 2)}),
    "Swin": (_swin, PIXELS, "swin.encoder.layers.0.blocks.1.attention.q_proj",
             {"swin.encoder.layers.0.blocks.1.attention.relative_position_bias.relative_position_bias_table": (49, 2)}),
    "Swin V2": (_swinv2, PIXELS, "swinv2.encoder.layers.0.blocks.1.attention.self.query",
                {"swinv2.encoder.layers.0.blocks.1.attention.self.logit_scale": (2, 1, 1),
                 "swinv2.encoder.layers.0.blocks.1.attention.self.continuous_position_bias_mlp.2.weight": (2, 512)}),
    "DeBERTa": (_deberta, TOKENS, "deberta.encoder.layer.0.attention.self.query_proj",
                {"deberta.encoder.layer.0.attention.self.value_proj.weight": (8, 16)}),
    "MPNet": (_mpnet, TOKENS, "mpnet.encoder.layer.0.attention.attn.q",
              {"mpnet.encoder.relative_attention_bias.weight": (32, 2),
               "mpnet.encoder.layer.1.attention.attn.k.weight": (8, 16)}),
    "Falcon": (_falcon, TOKENS, "transformer.h.0.self_attention.query_key_value",
               {"transformer.h.0.self_attention.query_key_value.weight": (16, 16)}),
    "ModernBERT": (_modernbert, TOKENS, "model.layers.0.attn.Wqkv", {"model.layers.0.attn.Wqkv.weight": (24, 16)}),
}


@pytest.mark.parametrize("name", list(MODELS))
def test_whole_way(name: str, tmp_path: Path) -> None:
    build, batch, group, shapes = MODELS[name]
    small = whole_way.check(build, batch, [group], tmp_path, only=False).model
    assert {key: tuple(small.get_parameter(key).shape) for key in shapes} == shapes


@pytest.mark.parametrize("version", [1, 2])
def test_heads_and_streams_of_torchvisions_swin(version: int, tmp_path: Path) -> None:
    """The smaller model's windows are as wide as what it reads, and merged four by four; biases of keys, which V2 does
    not read, take no mean in."""
    def build() -> nn.Module:
        kinds = {} if version == 1 else {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2}
        return swin.SwinTransformer([2, 2], 8, [2, 1], [2, 4], [2, 2], num_classes=5, **kinds)

    groups = ["features.0.0", "features.2.reduction", *(f"features.{at}.{layer}" for at in ("1.0", "1.1", "3.0")
                                                        for layer in ("attn.qkv", "mlp.0"))]
    small = whole_way.check(build, PIXELS["pixel_values"], groups, tmp_path, only=version == 1).model
    assert small.features[1][1].attn.qkv.weight.shape == (12, 4)
    assert small.features[2].reduction.weight.shape == (8, 16)
    model, x = whole_way.noisy(build), PIXELS["pixel_values"]
    scores = fastscore.score(model, [x], progress=False)
    small = fastscore.prune(model, scores, x, channels=0.6, scope="layer").model
    with torch.no_grad(), fastscore.mask(model, scores, 0.4, x, scope="layer"):
        torch.testing.assert_close(small(x), model(x))


def test_a_config_that_others_share_stays_what_it_is(tmp_path: Path) -> None:
    """Phi-3's attention reads its number of heads there; whatever else is set there later, it sees."""
    small = whole_way.check(_phi3, TOKENS, ["model.layers.0.self_attn.qkv_proj"], tmp_path, only=False).model
    attention = small.model.layers[0].self_attn
    assert [tuple(parameter.shape) for parameter in attention.parameters()] == [(16, 8), (16, 16)]
    assert (small.config.num_attention_heads, attention.config.num_attention_heads) == (4, 2)
    assert (attention.config.num_key_value_heads, attention.num_key_value_heads) == (1, 1)
    other = copy.deepcopy(small)
    other.set_attn_implementation("eager")
    assert other.model.layers[0].self_attn.config._attn_implementation == "eager"
    assert attention.config._attn_implementation == "sdpa"
    with torch.no_grad():
        torch.testing.assert_close(other(**TOKENS).logits, small(**TOKENS).logits, rtol=1e-4, atol=1e-5)
        small.float()
        with_cache, without = (small.generate(TOKENS["input_ids"], max_new_tokens=4, do_sample=False, use_cache=cached,
                                              pad_token_id=0) for cached in (True, False))
    assert torch.equal(with_cache, without)


SMALL = {"vocab_size": 50, "d_model": 16, "pad_token_id": 0, "use_cache": False}
PAIRS: dict[str, Callable[[], nn.Module]] = {
    "T5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(
        **SMALL, d_kv=4, d_ff=12, num_layers=1, num_heads=4, eos_token_id=1, decoder_start_token_id=0)),
    "BART": lambda: transformers.BartForConditionalGeneration(transformers.BartConfig(
        **SMALL, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=12, decoder_ffn_dim=12, max_position_embeddings=16, bos_token_id=1, eos_token_id=2)),
}


@pytest.mark.parametrize("name", list(PAIRS))
def test_an_encoder_and_a_decoder_that_share_an_embedding_lose_the_same_of_it(name: str, tmp_path: Path) -> None:
    model = whole_way.noisy(PAIRS[name])
    batch = {**TOKENS, "decoder_input_ids": TOKENS["input_ids"].flip(1)}
    scores = fastscore.score(model, [batch], progress=False, forward=_logits)
    (stream,) = (each for each in scores if each.endswith("embed_tokens"))
    result = fastscore.prune(model, scores, batch, channels=0.6, scope="layer", compensate=False, forward=_logits)
    assert len(result.removed[stream]) > 3
    with torch.no_grad(), fastscore.mask(model, scores, 0.4, batch, scope="layer", compensate=False, forward=_logits):
        masked = _logits(model, batch)
    small = result.model
    with torch.no_grad():
        # T5 normalises in float32, whatever it is given
        torch.testing.assert_close(_logits(small, batch), masked, rtol=1e-4, atol=1e-5 * float(masked.abs().max()))
    held = [module.weight for module in small.modules() if isinstance(module, nn.Embedding)
            and len(module.weight) == 50]
    assert len(held) == 3
    assert all(weight is held[0] for weight in held)
    fastscore.save_pruned(small, tmp_path / "small.safetensors")
    loaded = fastscore.load_pruned(PAIRS[name]().double(), tmp_path / "small.safetensors").eval()
    with torch.no_grad():
        assert torch.equal(_logits(loaded, batch), _logits(small, batch))


def _logits(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    return model(**batch).logits
