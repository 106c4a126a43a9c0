"""Transformers of torchvision, timm and Hugging Face, as they are built there, from data to a smaller model."""

import copy
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
import transformers
from oracles import untouched
from torch import Tensor, nn

import fastscore
from fastscore.modules.attention import multihead_attention

TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50,
        "max_position_embeddings": 16, "use_cache": False}
PATCHES = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5,
           "mlp_ratio": 2}


def _images(samples: int) -> Tensor:
    return torch.randn(samples, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def _pixels(samples: int) -> dict[str, Tensor]:
    return {"pixel_values": _images(samples)}


def _text(samples: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(1, 50, (samples, 6), generator=torch.Generator().manual_seed(1))}


@dataclass(frozen=True)
class Model:
    """heads: a group of heads -> how many heads it has that can go on their own. channels: another group."""

    build: Callable[[], nn.Module]
    batch: Callable[[int], Any]
    heads: str
    count: int
    channels: str


MODELS = {
    "torchvision ViT": Model(lambda: torchvision.models.VisionTransformer(16, 8, 2, 4, 32, 48, num_classes=5), _images,
                             "encoder.layers.encoder_layer_1.self_attention", 4,
                             "encoder.layers.encoder_layer_0.mlp.0"),
    "timm ViT": Model(lambda: timm.models.VisionTransformer(**PATCHES), _images, "blocks.1.attn.qkv", 4,
                      "blocks.0.mlp.fc1"),
    "timm DeiT": Model(lambda: timm.models.deit.VisionTransformerDistilled(**PATCHES), _images, "blocks.0.attn.qkv", 4,
                       "blocks.1.mlp.fc1"),
    "BERT": Model(lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT, num_labels=5)),
                  _text, "bert.encoder.layer.0.attention.self.query", 4, "bert.encoder.layer.1.intermediate.dense"),
    "DistilBERT": Model(lambda: transformers.DistilBertForSequenceClassification(transformers.DistilBertConfig(
        vocab_size=50, dim=32, hidden_dim=48, n_layers=2, n_heads=4, num_labels=5, max_position_embeddings=16)), _text,
        "distilbert.transformer.layer.1.attention.q_lin", 4, "distilbert.transformer.layer.0.ffn.lin1"),
    "ViT": Model(lambda: transformers.ViTForImageClassification(transformers.ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8,
        num_labels=5)), _pixels, "vit.layers.0.attention.q_proj", 4, "vit.layers.1.mlp.fc1"),
    "Llama": Model(lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, num_key_value_heads=2)),
                   _text, "model.layers.0.self_attn.q_proj", 2, "model.layers.1.mlp.gate_proj"),
    "Qwen2": Model(lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**TEXT, num_key_value_heads=2)),
                   _text, "model.layers.1.self_attn.q_proj", 2, "model.layers.0.mlp.gate_proj"),
    "GPT-NeoX": Model(lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**TEXT)), _text,
                      "gpt_neox.layers.0.attention.query_key_value", 4, "gpt_neox.layers.1.mlp.dense_h_to_4h"),
}


def _model(name: str, seed: int = 0) -> nn.Module:
    """In float64 and evaluation mode, with no weight left at zero, as training would."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MODELS[name].build().double().eval()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def _batch(name: str, samples: int = 4) -> Any:
    batch = MODELS[name].batch(samples)
    if isinstance(batch, Tensor):
        return batch.double()
    return {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}


def _run(model: nn.Module, batch: Any) -> Tensor:
    output = model(**batch) if isinstance(batch, Mapping) else model(batch)
    return output if isinstance(output, Tensor) else output.logits


def _exported(model: nn.Module, batch: Any) -> Tensor:
    args, kwargs = ((), batch) if isinstance(batch, Mapping) else ((batch,), {})
    output = torch.export.export(model, args, kwargs).module()(*args, **kwargs)
    return output if isinstance(output, Tensor) else output.logits


@pytest.mark.parametrize("name", list(MODELS))
def test_from_data_to_a_smaller_model(name: str, tmp_path: Path) -> None:
    spec, model, batch = MODELS[name], _model(name), _batch(name)
    with untouched(model):
        scores = fastscore.score(model, [batch], progress=False)
        assert {spec.heads, spec.channels} <= set(scores)
        assert len(scores[spec.heads].unique()) == spec.count  # one score for each head
        for budget in ({"macs": 0.7}, {"params": 0.8}):
            report = fastscore.prune(model, scores, batch, **budget).report
            for unit, share in budget.items():
                before, after = getattr(report, unit)
                assert after <= share * before
        result = _pruned(model, scores, batch, spec)
        assert set(result.removed) == {spec.heads, spec.channels}
    small = result.model
    with torch.no_grad(), untouched(model):
        expected = _masked(model, scores, batch, result.removed)
        output = _run(small, batch)
        torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
        assert not torch.allclose(_run(model, batch), expected, rtol=1e-4)
        torch.testing.assert_close(_exported(small, batch), output)
    again = copy.deepcopy(small)
    for parameter in again.parameters():
        nn.init.zeros_(parameter)
    torch.save(small.state_dict(), tmp_path / "state.pt")
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    with torch.no_grad():
        assert torch.equal(_run(again, batch), output)
    small.train()
    optimizer = torch.optim.SGD(small.parameters(), 1e-3)
    target = torch.zeros(output.shape[:-1], dtype=torch.long)

    def loss() -> Tensor:
        return F.cross_entropy(_run(small.eval(), batch).flatten(0, -2), target.flatten())

    first = loss()
    first.backward()
    assert all(parameter.grad is not None for key, parameter in small.named_parameters() if "pos_embed" not in key)
    optimizer.step()
    assert loss() < first
    fastscore.save_pruned(result.model, tmp_path / "small.safetensors")
    loaded = fastscore.load_pruned(_model(name, seed=1), tmp_path / "small.safetensors")
    with torch.no_grad():
        assert torch.equal(_run(loaded.eval(), batch), _run(small.eval(), batch))


def _only(scores: fastscore.Scores, *layers: str) -> list[str]:
    return [layer for layer in scores if layer not in layers]


def _pruned(model: nn.Module, scores: fastscore.Scores, batch: Any, spec: Model) -> fastscore.PruneResult:
    """Without half of the heads of one layer, and half of the channels of another."""
    return fastscore.prune(model, scores, batch, channels=0.5, scope="layer",
                           ignore=_only(scores, spec.heads, spec.channels))


def _masked(model: nn.Module, scores: fastscore.Scores, batch: Any, removed: Mapping[str, Tensor]) -> Tensor:
    ignore = _only(scores, *removed)
    with fastscore.mask(model, scores, 0.5, batch, scope="layer", ignore=ignore) as masked:
        assert {layer: gone.tolist() for layer, gone in masked.items()} == \
            {layer: gone.tolist() for layer, gone in removed.items()}
        return _run(model, batch)


def test_heads_whose_code_takes_the_width_of_its_input_for_theirs() -> None:
    model = timm.models.eva.Eva(**PATCHES, swiglu_mlp=True, use_rot_pos_emb=True).eval()
    scores = fastscore.score(model, [_images(2)], progress=False)
    assert set(scores) == {"patch_embed.proj", *(f"blocks.{block}.{layer}" for block in range(2)
                                                 for layer in ("attn.qkv", "mlp.fc1"))}
    small = fastscore.prune(model, scores, _images(2), params=0.6).model
    assert small(_images(2)).shape == (2, 5)


def _swin(version: int) -> nn.Module:
    swin = torchvision.models.swin_transformer
    blocks = {1: (swin.SwinTransformerBlock, swin.PatchMerging), 2: (swin.SwinTransformerBlockV2, swin.PatchMergingV2)}
    block, merging = blocks[version]
    return torchvision.models.SwinTransformer([2, 2], 8, [2, 2], [2, 4], [4, 2], num_classes=5, block=block,
                                              downsample_layer=merging, stochastic_depth_prob=0.0, mlp_ratio=2)


class VideoSwin(torchvision.models.video.swin_transformer.SwinTransformer3d):
    """Four frames of each image, and windows that are longer than that: some of their places are never read."""

    def __init__(self) -> None:
        super().__init__([1, 1, 2], 8, [2, 2], [2, 4], [8, 3, 4], 2, stochastic_depth_prob=0.0, num_classes=5)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, 16, 16] -> [N, 5]."""
        return super().forward(x.unflatten(2, (4, 4)))


WINDOWED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "Swin": (lambda: _swin(1), "features.3.1.attn.qkv"),
    "Swin V2": (lambda: _swin(2), "features.3.1.attn.qkv"),
    "Swin of videos": (VideoSwin, "features.0.1.attn.qkv"),
    "MaxViT": (lambda: torchvision.models.MaxVit((16, 16), 8, 2, [8], [1], 4, 0.0, num_classes=5),
               "blocks.0.layers.0.layers.grid_attention.attn_layer.1.to_qkv"),
}


@pytest.mark.parametrize("name", list(WINDOWED))
def test_windowed_attention_loses_heads_with_their_position_biases(name: str) -> None:
    build, heads = WINDOWED[name]
    torch.manual_seed(0)
    model, batch = build().double().eval(), _images(2).double()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    with torch.no_grad():
        expected = model(batch)
        with ExitStack() as standing_in:
            for handle in multihead_attention.replace_attention(model):
                standing_in.enter_context(handle)
            replaced = type(model.get_submodule(heads.rpartition(".")[0]))
            assert replaced.__module__ == "fastscore.modules.attention.windowed_attention"
            torch.testing.assert_close(model(batch), expected, rtol=1e-12, atol=1e-12)
    with untouched(model):
        scores = fastscore.score(model, [batch], progress=False)
        assert not set(scores) & set(scores.skipped)
        ignore = _only(scores, heads)
        result = fastscore.prune(model, scores, batch, channels=0.5, ignore=ignore, compensate=False)
        with torch.no_grad(), fastscore.mask(model, scores, 0.5, batch, ignore=ignore, compensate=False):
            masked = model(batch)
    with torch.no_grad():
        torch.testing.assert_close(result.model(batch), masked, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(masked, expected)
    assert len(result.removed[heads]) * 2 == len(scores[heads])
    layer = heads.rpartition(".")[0]
    wide, narrow = ({key: value.numel() for key, value in each.named_parameters() if key.startswith(layer)}
                    for each in (model, result.model))
    tables = [key for key in wide if "bias_table" in key or "logit_scale" in key or "cpb_mlp.2" in key]
    assert tables
    assert all(2 * narrow[key] == wide[key] for key in tables)
