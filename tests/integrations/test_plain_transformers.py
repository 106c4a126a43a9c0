"""Pruned models of transformers as ordinary ones: written, loaded by from_pretrained, and generating alike."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from oracles import untouched

import fastscore
from fastscore.integrations.transformers import forward, save_pretrained

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 40, "max_position_embeddings": 32, "pad_token_id": 0}


def _pruned(kind: str, dtype: torch.dtype = torch.float32, units: Any = "groups", **options: Any
            ) -> tuple[Any, dict[str, torch.Tensor]]:
    family = {"Llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig),
              "tied Llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig),
              "Qwen3": (transformers.Qwen3ForCausalLM, transformers.Qwen3Config),
              "Gemma3": (transformers.Gemma3ForCausalLM, transformers.Gemma3TextConfig),
              "BERT": (transformers.BertForSequenceClassification, transformers.BertConfig)}[kind]
    sizes = {name: value for name, value in SIZES.items() if kind != "BERT" or not name.startswith(("num_key", "head"))}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = family[0](family[1](**sizes, tie_word_embeddings="tied" in kind)).eval().to(dtype)
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
    batch = {"input_ids": torch.randint(1, 40, (3, 7), generator=torch.Generator().manual_seed(1))}
    scores = fastscore.score(model, [batch], units=units, forward=forward, progress=False)
    return fastscore.prune(model, scores, batch, forward=forward, **options).model, batch


@pytest.mark.parametrize("kind", ["Llama", "tied Llama", "Qwen3"])
def test_from_pretrained_loads_what_was_pruned_alike_in_all_layers(kind: str, tmp_path: Path) -> None:
    small, batch = _pruned(kind, channels=0.6, scope="layer", round_to=8, compensate=False)
    with untouched(small):
        save_pretrained(small, tmp_path)
    loaded = type(small).from_pretrained(tmp_path)
    assert loaded.config.hidden_size == small.get_input_embeddings().embedding_dim < 32
    assert loaded.config.intermediate_size < 48
    assert not any("Narrowed" in type(module).__name__ for module in loaded.modules())
    with torch.no_grad():
        torch.testing.assert_close(forward(loaded, batch), forward(small, batch), rtol=1e-3, atol=1e-4)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    texts = [each.generate(batch["input_ids"], use_cache=cache, **options)
             for each in (small, loaded) for cache in (True, False)]
    assert all(torch.equal(text, texts[0]) for text in texts)
    if kind == "tied Llama":
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_in_any_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    """What the library's code computes in float32, whatever comes in, is no difference in float64."""
    small, batch = _pruned("Llama", dtype, channels=0.6, scope="layer", round_to=8, compensate=False)
    with untouched(small):
        assert save_pretrained(small, tmp_path).dtype == dtype
    loaded = type(small).from_pretrained(tmp_path, dtype="auto")
    assert loaded.dtype == dtype
    assert loaded.config.hidden_size < 32
    assert torch.equal(loaded.lm_head.weight, small.lm_head.weight)  # to the last digit
    with torch.no_grad():
        want, got = (forward(each, batch) for each in (small, loaded))
    close = 4 * torch.finfo(dtype).eps if dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(got, want, rtol=0, atol=close * float(want.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_width_that_code_computes_with_is_no_rounding(dtype: torch.dtype, tmp_path: Path) -> None:
    """Gemma 3 scales what it embeds by the root of the hidden width; what little that changes here shows in float32."""
    small, _ = _pruned("Gemma3", dtype, channels=0.7, scope="layer", compensate=False)
    small.model.embed_tokens.weight.data *= 4  # beside which branches are small
    with untouched(small), pytest.raises(ValueError, match="computes with the hidden width"):
        save_pretrained(small, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("kind", "options", "said"), [
    ("Llama", {"macs": 0.75, "round_to": 8, "compensate": False}, "scope=\"layer\""),
    ("Llama", {"channels": 0.6, "scope": "layer", "round_to": 8}, "lm_head.bias"),
    ("Llama", {"channels": 0.8, "scope": "layer", "compensate": False}, "multiple of the number of attention heads"),
    ("BERT", {"channels": 0.6, "scope": "layer", "compensate": False}, "LayerNorm that divides"),
    ("Llama", {"channels": 0.75, "scope": "layer", "compensate": False, "units": "heads_and_dims"},
     r"lost pairs of dimensions .*units=\"groups\""),
])
def test_what_a_config_cannot_say_is_refused_with_the_way_out(kind: str, options: dict[str, Any], said: str,
                                                              tmp_path: Path) -> None:
    small, _ = _pruned(kind, **options)
    with untouched(small), pytest.raises(ValueError, match=said) as caught:
        save_pretrained(small, tmp_path / "out")
    assert "save_pruned" in str(caught.value)
    assert not (tmp_path / "out").exists()


VISION = {"image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
FAMILIES = {
    "ViT": (transformers.ViTForImageClassification, transformers.ViTConfig(**VISION, intermediate_size=64)),
    "DINOv2": (transformers.Dinov2ForImageClassification, transformers.Dinov2Config(**VISION, mlp_ratio=2)),
    "CLIP": (transformers.CLIPVisionModelWithProjection,
             transformers.CLIPVisionConfig(**VISION, intermediate_size=64, projection_dim=16)),
    "Swin": (transformers.SwinForImageClassification,
             transformers.SwinConfig(image_size=16, patch_size=4, embed_dim=16, depths=[1], num_heads=[2],
                                     window_size=4)),
    "ResNet": (transformers.ResNetForImageClassification,
               transformers.ResNetConfig(embedding_size=16, hidden_sizes=[16], depths=[1], layer_type="basic")),
}


def _images(kind: str, *ignore: str, units: Any = "") -> tuple[Any, dict[str, torch.Tensor]]:
    """A model of images, pruned alike in all layers but those in `ignore`."""
    family, config = FAMILIES[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = family(config).eval()
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
        batch = {"pixel_values": torch.randn(3, 3, 16, 16)}
    how = {"units": units} if units else {"importance": "magnitude-l2"}
    scores = fastscore.score(model, [batch], forward=forward, progress=False, **how)
    return fastscore.prune(model, scores, batch, forward=forward, channels=0.6, scope="layer",
                           round_to=4 if units else 8, compensate=False, ignore=ignore).model, batch


def _ignored(error: ValueError) -> list[str]:
    """What a refusal says to ignore."""
    said = re.search(r"ignore=\[(.*?)\]", str(error))
    return re.findall(r'"(.*?)"', said[1]) if said else []


@pytest.mark.parametrize("kind", ["CLIP", "Llama"])
def test_written_whatever_the_default_device(kind: str, tmp_path: Path) -> None:
    if kind == "CLIP":
        with pytest.raises(ValueError, match="ignore=") as caught:
            save_pretrained(_images(kind)[0], tmp_path / "refused")
        small = _images(kind, *_ignored(caught.value), "*self_attn*")[0]
    else:
        small = _pruned(kind, channels=0.6, scope="layer", round_to=8, compensate=False)[0]
    save_pretrained(small, tmp_path / "plain")
    with torch.device("meta"):
        save_pretrained(small, tmp_path / "meta")
    plain, meta = (type(small).from_pretrained(tmp_path / name).state_dict() for name in ("plain", "meta"))
    torch.testing.assert_close(meta, plain, rtol=0, atol=0)


@pytest.mark.parametrize(("kind", "said", "ways"), [
    ("ViT", "LayerNorm that divides", ()), ("DINOv2", "LayerNorm that divides", ("*fc1",)),
    ("CLIP", "k_proj.weight", ("*self_attn*",)), ("Swin", "SwinConfig has words for nothing", ()),
    ("ResNet", "ResNetConfig has words for nothing", ()),
])
def test_models_of_images(kind: str, said: str, ways: tuple[str, ...], tmp_path: Path) -> None:
    """Their hidden width stays, as it must be; the error's own way out leads to a folder that from_pretrained loads."""
    small, batch = _images(kind)
    with untouched(small), pytest.raises(ValueError, match=said) as caught:
        save_pretrained(small, tmp_path / "out")
    assert "save_pruned" in str(caught.value)
    assert not (tmp_path / "out").exists()
    named = _ignored(caught.value)
    if not named and not ways:
        return
    small, batch = _images(kind, *named, *ways)
    save_pretrained(small, tmp_path / "out")
    loaded = type(small).from_pretrained(tmp_path / "out")
    dense = sum(parameter.numel() for parameter in FAMILIES[kind][0](FAMILIES[kind][1]).parameters())
    assert sum(parameter.numel() for parameter in loaded.parameters()) < dense
    with torch.no_grad():
        torch.testing.assert_close(forward(loaded, batch), forward(small, batch), rtol=1e-5, atol=1e-5)


WORDS = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TWO = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2,
       "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 32, "decoder_start_token_id": 2}
TEXT: dict[str, tuple[Any, Any, tuple[str, ...], tuple[str, ...]]] = {  # what stays, and what the config then says
    "GPT-2": (transformers.GPT2LMHeadModel, transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, **WORDS),
              ("transformer.wte*", "*c_attn"), ("n_inner",)),
    "T5": (transformers.T5ForConditionalGeneration,
           transformers.T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=4, decoder_start_token_id=0,
                                 **WORDS), ("shared",), ("d_ff", "num_heads")),
    "BART": (transformers.BartForConditionalGeneration, transformers.BartConfig(**TWO, **WORDS),
             ("model.shared", "*attn*"), ("encoder_ffn_dim", "decoder_ffn_dim")),
    "Mixtral": (transformers.MixtralForCausalLM,
                transformers.MixtralConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                           num_key_value_heads=2, intermediate_size=32, num_local_experts=3,
                                           num_experts_per_tok=2, **WORDS),
                ("*q_proj",), ("intermediate_size",)),
    "GLM": (transformers.GlmForCausalLM, transformers.GlmConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=4, **WORDS), (), ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")),
}


@pytest.mark.parametrize("kind", TEXT)
def test_widths_of_models_of_text(kind: str, tmp_path: Path) -> None:
    """What each config calls its widths; layers of equal width stay equally wide, of a mixture's experts, too."""
    family, config, ignore, said = TEXT[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = family(config).eval()
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
        batch = {"input_ids": torch.randint(3, 40, (3, 7))}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = batch["input_ids"][:, :5]
    scores = fastscore.score(model, [batch], importance="magnitude-l2", forward=forward, progress=False)
    small: Any = fastscore.prune(model, scores, batch, forward=forward, channels=0.6, scope="layer", compensate=False,
                                 ignore=ignore, progress=False).model
    save_pretrained(small, tmp_path)
    loaded = type(small).from_pretrained(tmp_path)
    assert all(getattr(loaded.config, name) != getattr(config, name) for name in said)
    with torch.no_grad():
        torch.testing.assert_close(forward(loaded, batch), forward(small, batch), rtol=1e-3, atol=1e-4)


def test_what_a_config_has_no_word_for_is_named_as_ignore_takes_it(tmp_path: Path) -> None:
    family, config, ignore, _ = TEXT["GPT-2"]
    model, batch = family(config).eval(), {"input_ids": torch.randint(3, 40, (3, 7))}
    scores = fastscore.score(model, [batch], importance="magnitude-l2", forward=forward, progress=False)
    small = fastscore.prune(model, scores, batch, forward=forward, channels=0.6, scope="layer", compensate=False,
                            ignore=ignore[:1], progress=False).model
    with pytest.raises(ValueError, match="no word for another width there") as caught:
        save_pretrained(small, tmp_path / "out")
    assert _ignored(caught.value) == ["transformer.h.*.attn.c_attn"]


def test_a_bias_that_makes_up_for_channels_keeps_no_layer(tmp_path: Path) -> None:
    """Without it the same layers go, and from_pretrained loads what is left."""
    family, config, _, said = TEXT["GLM"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, batch = family(config).eval(), {"input_ids": torch.randint(3, 40, (3, 7))}
    scores = fastscore.score(model, [batch], forward=forward, progress=False)
    how: dict[str, Any] = {"forward": forward, "channels": 0.6, "scope": "layer", "progress": False}
    with pytest.raises(ValueError, match=r"bias is .*, and not there by .*compensate=False .*, or keep it") as caught:
        save_pretrained(fastscore.prune(model, scores, batch, **how).model, tmp_path / "out")
    assert not _ignored(caught.value)
    small: Any = fastscore.prune(model, scores, batch, compensate=False, **how).model
    save_pretrained(small, tmp_path / "out")
    loaded = type(small).from_pretrained(tmp_path / "out")
    assert all(getattr(loaded.config, name) < getattr(config, name) for name in said)
    with torch.no_grad():
        torch.testing.assert_close(forward(loaded, batch), forward(small, batch), rtol=1e-3, atol=1e-4)


DECODERS: dict[str, tuple[Any, Any]] = {
    "Falcon": (transformers.FalconForCausalLM, transformers.FalconConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, multi_query=False, alibi=False, **WORDS)),
    "BLOOM": (transformers.BloomForCausalLM, transformers.BloomConfig(hidden_size=16, n_layer=2, n_head=4, **WORDS)),
    "MPT": (transformers.MptForCausalLM, transformers.MptConfig(
        d_model=16, n_layers=2, n_heads=4, max_seq_len=32, **WORDS)),
}


@pytest.mark.parametrize(("kind", "units", "ways", "narrower"), [
    ("T5", "groups", ["shared*"], ("d_ff", "num_heads")),
    ("T5", "head_dims", [], ("d_ff", "d_kv")),
    ("T5, not tied", "groups", [], ("d_ff", "num_heads", "d_model")),
    ("BERT", "groups", ["bert.embeddings.word_embeddings*", "bert.encoder.layer.*.attention.self.query",
                        "bert.pooler.dense"], ("intermediate_size",)),
    ("Falcon", "groups", ["transformer.word_embeddings*", "transformer.h.*.self_attention.query_key_value"],
     ("ffn_hidden_size",)),
    ("BLOOM", "groups", [], ()), ("MPT", "groups", [], ()),
])
def test_the_ways_out_lead_to_what_from_pretrained_loads(kind: str, units: Any, ways: list[str],
                                                        narrower: tuple[str, ...], tmp_path: Path) -> None:
    """Errors say what to ignore: the hidden width where the code divides by it (T5's tied head does), heads where the
    config holds no width of theirs (BERT's are as wide as the hidden size says); all at once where they can be told
    apart from the hidden width. Where a config has a word for nothing that goes (BLOOM, MPT), the first says so."""
    family: Any = transformers.T5ForConditionalGeneration
    config: Any = transformers.T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=4, **WORDS,
                                        decoder_start_token_id=0, tie_word_embeddings="not tied" not in kind)
    if kind == "BERT":
        family = transformers.BertForSequenceClassification
        config = transformers.BertConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                                         num_attention_heads=4, **WORDS)
    elif kind in DECODERS:
        family, config = DECODERS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = family(config).eval()
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
        batch = {"input_ids": torch.randint(3, 40, (3, 7))}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = batch["input_ids"][:, :5]
    scores = fastscore.score(model, [batch], units=units, forward=forward, progress=False)

    def pruned(ignore: list[str]) -> Any:
        return fastscore.prune(model, scores, batch, forward=forward, channels=0.6, scope="layer", compensate=False,
                               ignore=ignore, round_to=4, progress=False).model

    ignored = list[str]()
    while set(ways) - {*ignored}:
        with pytest.raises(ValueError, match=r"ignore=") as caught:
            save_pretrained(pruned(ignored), tmp_path / "out")
        assert set(_ignored(caught.value)) & (set(ways) - {*ignored})
        assert not {*ignored} & {*_ignored(caught.value)}
        ignored += _ignored(caught.value)
    small = pruned(ignored)
    if kind in ("BLOOM", "MPT"):
        with pytest.raises(ValueError, match=r"words for nothing that went: keep it with fastscore\.save_pruned"):
            save_pretrained(small, tmp_path / "out")
        return
    save_pretrained(small, tmp_path / "out")
    loaded = type(small).from_pretrained(tmp_path / "out")
    assert all(getattr(loaded.config, name) < getattr(config, name) for name in narrower)
    with torch.no_grad():
        torch.testing.assert_close(forward(loaded, batch), forward(small, batch), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("units", ["head_dims", "heads_and_dims"])
def test_dimensions_of_heads(units: Any, tmp_path: Path) -> None:
    """Their config tells how wide heads are; queries make up for products that are scaled by that width then."""
    small, batch = _images("ViT", "*patch*", units=units)
    with untouched(small):
        save_pretrained(small, tmp_path / "out")
    loaded = type(small).from_pretrained(tmp_path / "out")
    attention = loaded.vit.layers[0].attention
    assert attention.head_dim < 8
    assert (attention.q_proj.out_features < 4 * attention.head_dim) == (units == "heads_and_dims")
    with torch.no_grad():
        torch.testing.assert_close(forward(loaded, batch), forward(small, batch), rtol=1e-5, atol=1e-5)


def test_repaired_where_layers_have_biases(tmp_path: Path) -> None:
    """The result itself is taken, too; where layers have no bias, nor the config a word, what repairs is refused."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = FAMILIES["ViT"][0](FAMILIES["ViT"][1]).eval()
        batches = [{"pixel_values": torch.randn(4, 3, 16, 16)} for _ in range(4)]
    how: dict[str, Any] = {"forward": forward, "progress": False}
    scores = fastscore.score(model, batches, ignore=["vit.embeddings.patch_embeddings*"], **how)
    result = fastscore.prune(model, scores, batches[0], params=0.8, scope="layer", round_to=8,
                            calibration=batches, **how)
    save_pretrained(result, tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(forward(type(model).from_pretrained(tmp_path / "out"), batches[0]),
                                   forward(result.model, batches[0]), rtol=1e-4, atol=1e-5)
    texts = [{"input_ids": torch.arange(at, at + 21).reshape(3, 7) % 39 + 1} for at in range(4)]
    small, _ = _pruned("Llama", channels=0.6, scope="layer", round_to=8, calibration=texts)
    with pytest.raises(ValueError, match=r"no word for a bias there: .*\(and no calibration=\)"):
        save_pretrained(small, tmp_path / "Llama")


def test_only_models_of_transformers(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="no model of transformers"):
        save_pretrained(torch.nn.Linear(2, 2), tmp_path)
