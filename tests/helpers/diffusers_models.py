"""Models of diffusers, built from tiny configurations, whose code is that of the large ones."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from model_case import Case
from torch import Tensor, nn

from fastscore.batches.parts import Batch

_BLOCKS = {"block_out_channels": (16, 32), "norm_num_groups": 8, "layers_per_block": 1}
_DIT = {"num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8}


def _noise(n: int) -> dict[str, Tensor]:
    return {"sample": torch.randn(n, 4, 8, 8), "timestep": torch.full((n,), 7),
            "encoder_hidden_states": torch.randn(n, 5, 16)}


def _hidden(n: int) -> dict[str, Tensor]:
    return {"hidden_states": torch.randn(n, 4, 8, 8), "timestep": torch.full((n,), 7)}


_DIFFUSERS: tuple[tuple[str, dict[str, Any], Callable[[int], Batch]], ...] = (
    ("UNet2DModel", {**_BLOCKS, "sample_size": 16, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
                     "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 8},
     lambda n: {"sample": torch.randn(n, 3, 16, 16), "timestep": torch.full((n,), 7)}),
    ("UNet2DConditionModel", {
        **_BLOCKS, "sample_size": 8, "cross_attention_dim": 16, "attention_head_dim": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}, _noise),
    ("AutoencoderKL", {**_BLOCKS, "down_block_types": ("DownEncoderBlock2D",) * 2,
                       "up_block_types": ("UpDecoderBlock2D",) * 2, "latent_channels": 4},
     lambda n: {"sample": torch.randn(n, 3, 16, 16)}),
    ("AutoencoderTiny", {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8),
                         "num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)},
     lambda n: {"sample": torch.randn(n, 3, 16, 16)}),
    ("VQModel", {**_BLOCKS, "down_block_types": ("DownEncoderBlock2D",) * 2,
                 "up_block_types": ("UpDecoderBlock2D",) * 2, "latent_channels": 4, "num_vq_embeddings": 16},
     lambda n: {"sample": torch.randn(n, 3, 16, 16)}),
    ("DiTTransformer2DModel", {**_DIT, "patch_size": 2, "num_embeds_ada_norm": 10, "in_channels": 4,
                               "norm_num_groups": 4},
     lambda n: {**_hidden(n), "class_labels": torch.arange(n) % 10}),
    ("PixArtTransformer2DModel", {**_DIT, "cross_attention_dim": 32, "caption_channels": 16, "out_channels": 4,
                                  "norm_num_groups": 4},
     lambda n: {**_hidden(n), "encoder_hidden_states": torch.randn(n, 5, 16)}),
    ("SD3Transformer2DModel", {**_DIT, "patch_size": 2, "in_channels": 4, "out_channels": 4, "joint_attention_dim": 16,
                               "caption_projection_dim": 32, "pooled_projection_dim": 16, "pos_embed_max_size": 8},
     lambda n: {**_hidden(n), "encoder_hidden_states": torch.randn(n, 5, 16),
                "pooled_projections": torch.randn(n, 16)}),
    ("UNet1DModel", {"block_out_channels": (32, 64), "sample_size": 32, "in_channels": 2, "out_channels": 2,
                     "extra_in_channels": 64, "down_block_types": ("DownBlock1DNoSkip", "DownBlock1D"),
                     "up_block_types": ("UpBlock1D", "UpBlock1DNoSkip"), "mid_block_type": "UNetMidBlock1D"},
     lambda n: {"sample": torch.randn(n, 2, 64), "timestep": torch.full((n,), 7)}),
)


def diffusers_model(name: str, options: dict[str, Any]) -> nn.Module:
    import diffusers

    return getattr(diffusers, name)(**options)


def diffusion(model: nn.Module, batch: Any) -> Tensor:
    return model(**batch).sample


def coding(model: nn.Module, batch: Any) -> Tensor:
    """What an autoencoder makes of its latents, as in training: AutoencoderTiny's own forward rounds them to bytes,
    through which no gradient comes back."""
    return model.decode(model.encode(batch["sample"]).latents).sample


def cases() -> list[Case]:
    return [Case(f"diffusers:{name}", functools.partial(diffusers_model, name, options), batch=batch,
                 forward=coding if name == "AutoencoderTiny" else diffusion) for name, options, batch in _DIFFUSERS]
