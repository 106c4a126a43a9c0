"""Models that people use, with random weights: how each is made, and a batch that it takes.

Transformers and diffusion models are built from tiny configurations, whose code is that of the large ones.
"""

import functools
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from networks import UNet
from super_resolution import EDSR
from torch import Tensor, nn

from fastscore.batches import Batch, Forward, call_model, concat_outputs, floating_tensors
from fastscore.cli import models


@dataclass(frozen=True)
class Case:
    """make: the model. image: its height and width. batch: the number of samples -> a batch, where it is no tensor of
    images. forward: how it is called, where not on the batch alone. small: in the ordinary run of the tests."""

    name: str
    make: Callable[[], nn.Module]
    image: int = 64
    forward: Forward = call_model
    small: bool = False
    batch: Callable[[int], Batch] | None = None

    @property
    def library(self) -> str:
        """That the model is from."""
        return self.name.partition(":")[0] if ":" in self.name else "torchvision"

    def inputs(self, samples: int) -> Batch:
        """A random batch."""
        return torch.randn(samples, 3, self.image, self.image) if self.batch is None else self.batch(samples)

    @property
    def input(self) -> str:
        """What a sample is, in short."""
        batch = self.inputs(1)
        tensors = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, tuple) else (batch,)
        return ", ".join("×".join(map(str, tensor.shape[1:])) or "1" for tensor in tensors if tensor.dim())


# torchvision

def torchvision_model(name: str, **options: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # GoogLeNet's and Inception's initialisation
        return models.torchvision_models().get_model(name, weights=None, **options)


def retinanet(model: nn.Module, images: Tensor) -> Tensor:
    features = list(model.backbone(images).values())
    return torch.cat([part.flatten(1) for part in model.head(features).values()], 1)


def faster_rcnn(model: nn.Module, images: Tensor) -> Tensor:
    """Of every anchor the objectness and offset, of one box the classes and offsets."""
    features = model.backbone(images)
    size = images.shape[-1]
    boxes = [torch.tensor([[0.0, 0.0, size / 2, size / 2]])] * len(images)
    pooled = model.roi_heads.box_roi_pool(features, boxes, [(size, size)] * len(images))
    proposed = [level for levels in model.rpn.head(list(features.values())) for level in levels]
    return torch.cat([part.flatten(1) for part in
                      (*proposed, *model.roi_heads.box_predictor(model.roi_heads.box_head(pooled)))], 1)


def ssd(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([part.flatten(1) for part in model.head(list(model.backbone(images).values())).values()], 1)


def last_flow(model: nn.Module, pair: Tensor) -> Tensor:
    return model(pair[:, :3], pair[:, 3:], num_flow_updates=2)[-1]


def _torchvision() -> list[Case]:
    small = ["resnet18", "resnext50_32x4d", "vgg11", "densenet121", "mobilenet_v2", "mobilenet_v3_small", "mnasnet0_5",
             "efficientnet_b0", "regnet_y_400mf", "shufflenet_v2_x0_5", "squeezenet1_1", "googlenet", "convnext_tiny"]
    others = ["alexnet", "resnet34", "resnet50", "wide_resnet50_2", "vgg11_bn", "vgg16_bn", "densenet169",
              "mobilenet_v3_large", "mnasnet1_0", "efficientnet_b1", "efficientnet_v2_s", "regnet_x_400mf",
              "regnet_y_1_6gf", "shufflenet_v2_x1_0", "squeezenet1_0"]
    sizes = {"inception_v3": 299, "vit_b_16": 224, "vit_b_32": 224, "swin_t": 64, "swin_v2_t": 64, "maxvit_t": 224}
    detector = {"num_classes": 5, "weights_backbone": None}
    clip = functools.partial(_random, 3, 8, 64, 64)
    return [
        *(Case(name, functools.partial(torchvision_model, name, num_classes=10), sizes.get(name, 64),
               small=name in small) for name in [*small, *others, *sizes]),
        *(Case(name, functools.partial(torchvision_model, name, **detector), small=name.startswith("lraspp"))
          for name in ("fcn_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large")),
        Case("retinanet_resnet50_fpn", functools.partial(torchvision_model, "retinanet_resnet50_fpn", **detector), 64,
             retinanet),
        Case("fasterrcnn_mobilenet_v3_large_fpn", functools.partial(
            torchvision_model, "fasterrcnn_mobilenet_v3_large_fpn", **detector), 64, faster_rcnn),
        Case("ssdlite320_mobilenet_v3_large", functools.partial(
            torchvision_model, "ssdlite320_mobilenet_v3_large", **detector), 320, ssd),
        *(Case(name, functools.partial(torchvision_model, name, num_classes=10), batch=clip)
          for name in ("r3d_18", "mc3_18", "r2plus1d_18")),
        Case("swin3d_t", functools.partial(torchvision_model, "swin3d_t", num_classes=10), batch=clip),
        Case("raft_small", functools.partial(torchvision_model, "raft_small"), forward=last_flow,
             batch=functools.partial(_random, 6, 128, 128)),
        Case("U-Net with transposed convolutions", UNet, 32, small=True),
        Case("EDSR", EDSR, 32, small=True),
    ]


def _random(*shape_and_samples: int) -> Tensor:
    *shape, samples = shape_and_samples
    return torch.randn(samples, *shape)


# timm: (names, image, options)

_VIT = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 64}
_TIMM: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("resnet50d resnet50 resnetv2_50 efficientnet_lite0 tf_efficientnetv2_b0 mobilenetv3_large_100 "
     "mobilenetv4_conv_small mobilenetv4_hybrid_medium regnetx_002 regnetz_c16 convnext_atto convnextv2_atto repvgg_a0 "
     "ghostnet_100 ghostnetv2_100 hrnet_w18_small cspresnet50 cspresnext50 cs3darknet_s dla34 dla60_res2net "
     "res2net50_26w_4s resnest14d seresnet50 mixnet_s hardcorenas_a vgg11_bn densenet121 densenetblur121d xception41 "
     "nfnet_f0 eca_nfnet_l0 fbnetc_100 dpn48b edgenext_xx_small fasternet_t0 hgnet_tiny hgnetv2_b0 inception_next_atto "
     "inception_v4 lcnet_050 mobileone_s0 gcresnext26ts lambda_resnet26t eca_resnext26ts rdnet_tiny repghostnet_050 "
     "repvit_m0_9 resnetblur18 resnetv2_50d_gn resnetv2_50x1_bit resnetv2_50d_evos resnetv2_50d_frn rexnet_100 "
     "selecsls42b skresnet18 starnet_s050 tresnet_m ese_vovnet19b_slim ecaresnet26t resnetaa50 "
     "legacy_seresnet18 test_mambaout efficientvit_b0 poolformer_s12 caformer_s18 convformer_s18 pvt_v2_b0 "
     "pvt_v2_b2_li tf_efficientnet_cc_b0_4e tinynet_e", 64, {}),
    ("vit_tiny_patch16_224 deit_tiny_patch16_224 deit_tiny_distilled_patch16_224 deit3_small_patch16_224 "
     "vit_relpos_small_patch16_224 vit_srelpos_small_patch16_224 vit_base_patch16_siglip_224 "
     "vit_small_patch14_dinov2 vit_base_patch16_clip_224 vit_small_patch14_reg4_dinov2 convit_tiny", 64, _VIT),
    ("beit_base_patch16_224 beitv2_base_patch16_224", 64, {"depth": 2, "embed_dim": 48, "num_heads": 3,
                                                           "img_size": 64}),
    ("eva02_tiny_patch14_224", 56, {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 56}),
    ("cait_xxs24_224", 64, {**_VIT, "depth_token_only": 1}),
    ("xcit_nano_12_p16_224", 64, _VIT),
    ("mixer_s16_224 gmlp_ti16_224 resmlp_12_224", 64, {"num_blocks": 2, "embed_dim": 48, "img_size": 64}),
    ("efficientvit_m0 swiftformer_xs mobilevit_xxs mobilevitv2_050 fastvit_t8 shvit_s1 nextvit_small convmixer_768_32",
     128, {}),
    ("efficientformer_l1 efficientformerv2_s0 levit_128s levit_conv_128s coat_lite_tiny crossvit_9_240 davit_tiny "
     "visformer_tiny gcvit_xxtiny hiera_tiny_224 mvitv2_tiny nest_tiny tiny_vit_5m_224 twins_pcpvt_small "
     "twins_svt_small volo_d1_224 "
     "pit_ti_224 coatnet_nano_rw_224 maxvit_pico_rw_256 tnt_s_patch16_224 swin_tiny_patch4_window7_224 "
     "swinv2_cr_tiny_224 vit_tiny_r_s16_p8_224 sequencer2d_s focalnet_tiny_srf vitamin_small_224", 224, {}),
    ("swinv2_tiny_window8_256 botnet26t_256 halonet26t maxvit_tiny_rw_256", 256, {}),
    ("samvit_base_patch16_224", 224, {"depth": 2, "embed_dim": 48, "num_heads": 3, "global_attn_indexes": (1,)}),
)


def timm_model(name: str, **options: Any) -> nn.Module:
    import timm

    return timm.create_model(name, num_classes=10, **options)


def _timm() -> list[Case]:
    sizes = {"maxvit_pico_rw_256": 256, "crossvit_9_240": 240, "inception_v4": 128}
    return [Case(f"timm:{name}", functools.partial(timm_model, name, **options), sizes.get(name, image),
                 small=name == "ghostnet_100") for names, image, options in _TIMM for name in names.split()]


# transformers: (class of the model, class of its configuration, configuration, kind of input)

_BERT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "vocab_size": 60, "max_position_embeddings": 32}
_LLAMA = {**_BERT, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_HF_VIT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
           "image_size": 32, "patch_size": 8, "num_labels": 5}
_EXPERTS = {**_LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1,
            "num_local_experts": 4}
_STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_labels": 5}
_BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 60,
         "max_position_embeddings": 32}
_AUDIO = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
          "conv_dim": (16, 16), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2,
          "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "num_labels": 5}
_CLIP = {"text_config": {**_BERT, "projection_dim": 16, "eos_token_id": 59},
         "vision_config": {**_HF_VIT, "projection_dim": 16}, "projection_dim": 16}
_TRANSFORMERS: tuple[tuple[str, str, dict[str, Any], str], ...] = (
    ("LlamaForCausalLM", "LlamaConfig", _LLAMA, "text"),
    ("MistralForCausalLM", "MistralConfig", _LLAMA, "text"),
    ("Qwen2ForCausalLM", "Qwen2Config", _LLAMA, "text"),
    ("Qwen3ForCausalLM", "Qwen3Config", _LLAMA, "text"),
    ("Gemma2ForCausalLM", "Gemma2Config", _LLAMA, "text"),
    ("Gemma3ForCausalLM", "Gemma3TextConfig", _LLAMA, "text"),
    ("Phi3ForCausalLM", "Phi3Config", _LLAMA, "text"),
    ("GraniteForCausalLM", "GraniteConfig", _LLAMA, "text"),
    ("Olmo2ForCausalLM", "Olmo2Config", _LLAMA, "text"),
    ("SmolLM3ForCausalLM", "SmolLM3Config", _LLAMA, "text"),
    ("StableLmForCausalLM", "StableLmConfig", _LLAMA, "text"),
    ("CohereForCausalLM", "CohereConfig", _LLAMA, "text"),
    ("MixtralForCausalLM", "MixtralConfig", _EXPERTS, "text"),
    ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", {**_EXPERTS, "shared_expert_intermediate_size": 24}, "text"),
    ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", _EXPERTS, "text"),
    ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 60, "n_positions": 32,
                                       "bos_token_id": 1, "eos_token_id": 2}, "text"),
    ("GPTNeoXForCausalLM", "GPTNeoXConfig", _BERT, "text"),
    ("OPTForCausalLM", "OPTConfig", {
        "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "word_embed_proj_dim": 32, "num_attention_heads": 4,
        "vocab_size": 60, "max_position_embeddings": 32}, "text"),
    ("BloomForCausalLM", "BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 60}, "text"),
    ("FalconForCausalLM", "FalconConfig", _BERT, "text"),
    ("MambaForCausalLM", "MambaConfig", {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 60, "state_size": 4},
     "text"),
    ("BertForSequenceClassification", "BertConfig", _BERT, "text"),
    ("RobertaForSequenceClassification", "RobertaConfig", _BERT, "text"),
    ("DistilBertForSequenceClassification", "DistilBertConfig", {
        "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 60, "max_position_embeddings": 32},
     "text"),
    ("ElectraForSequenceClassification", "ElectraConfig", {**_BERT, "embedding_size": 32}, "text"),
    ("AlbertForSequenceClassification", "AlbertConfig", {**_BERT, "embedding_size": 16}, "text"),
    ("MPNetForSequenceClassification", "MPNetConfig", _BERT, "text"),
    ("DebertaV2ForSequenceClassification", "DebertaV2Config", _BERT, "text"),
    ("ModernBertForSequenceClassification", "ModernBertConfig", {**_BERT, "pad_token_id": 0}, "text"),
    ("MobileBertForSequenceClassification", "MobileBertConfig", {
        **_BERT, "embedding_size": 32, "intra_bottleneck_size": 32, "initializer_range": 0.2}, "text"),
    ("T5ForConditionalGeneration", "T5Config", {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4,
                                                "vocab_size": 60, "decoder_start_token_id": 0}, "pair"),
    ("BartForConditionalGeneration", "BartConfig", _BART, "pair"),
    ("MarianMTModel", "MarianConfig", {**_BART, "pad_token_id": 0, "decoder_start_token_id": 0}, "pair"),
    ("PegasusForConditionalGeneration", "PegasusConfig", {**_BART, "pad_token_id": 0}, "pair"),
    ("WhisperForConditionalGeneration", "WhisperConfig", {
        **_BART, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 20, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}, "mel"),
    ("ViTForImageClassification", "ViTConfig", _HF_VIT, "pixels"),
    ("DeiTForImageClassification", "DeiTConfig", _HF_VIT, "pixels"),
    ("BeitForImageClassification", "BeitConfig", _HF_VIT, "pixels"),
    ("Dinov2ForImageClassification", "Dinov2Config", _HF_VIT, "pixels"),
    ("SiglipForImageClassification", "SiglipConfig", {"vision_config": _HF_VIT, "num_labels": 5}, "pixels"),
    ("CLIPVisionModelWithProjection", "CLIPVisionConfig", {**_HF_VIT, "projection_dim": 16}, "pixels embeds"),
    ("CLIPModel", "CLIPConfig", _CLIP, "clip"),
    ("SwinForImageClassification", "SwinConfig", {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 1],
                                                  "num_heads": [2, 4], "window_size": 4, "num_labels": 5}, "pixels"),
    ("Swinv2ForImageClassification", "Swinv2Config", {
        "image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4,
        "num_labels": 5}, "pixels"),
    ("ConvNextForImageClassification", "ConvNextConfig", _STAGES, "pixels"),
    ("ConvNextV2ForImageClassification", "ConvNextV2Config", _STAGES, "pixels"),
    ("ResNetForImageClassification", "ResNetConfig", {**_STAGES, "embedding_size": 8}, "pixels"),
    ("RegNetForImageClassification", "RegNetConfig", {**_STAGES, "embedding_size": 8, "groups_width": 8}, "pixels"),
    ("MobileNetV2ForImageClassification", "MobileNetV2Config", {"num_labels": 5, "depth_multiplier": 0.35}, "pixels"),
    ("MobileViTForImageClassification", "MobileViTConfig", {
        "image_size": 64, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 12, 16, 16, 24, 32],
        "num_labels": 5}, "pixels 64"),
    ("PoolFormerForImageClassification", "PoolFormerConfig", _STAGES, "pixels 64"),
    ("PvtForImageClassification", "PvtConfig", {
        "image_size": 64, **_STAGES, "num_attention_heads": [1, 2, 3, 4]}, "pixels 64"),
    ("SegformerForSemanticSegmentation", "SegformerConfig", {
        **_STAGES, "num_attention_heads": [1, 2, 3, 4], "decoder_hidden_size": 16}, "pixels 64"),
    ("DPTForSemanticSegmentation", "DPTConfig", {
        **_HF_VIT, "num_hidden_layers": 4, "is_hybrid": False, "backbone_out_indices": [0, 1, 2, 3],
        "neck_hidden_sizes": [8, 8, 16, 16], "fusion_hidden_size": 16, "use_auxiliary_head": False}, "pixels"),
    ("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", _AUDIO, "sound"),
    ("HubertForSequenceClassification", "HubertConfig", _AUDIO, "sound"),
    ("ASTForAudioClassification", "ASTConfig", {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 8,
        "frequency_stride": 8, "time_stride": 8, "max_length": 32, "num_mel_bins": 16}, "spectrogram"),
    ("DetrForObjectDetection", "DetrConfig", {
        "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_queries": 6, "num_labels": 5,
        "use_timm_backbone": False, "use_pretrained_backbone": False}, "detr"),
)


def _text(samples: int) -> Tensor:
    return torch.randint(3, 60, (samples, 9))


_BATCHES: dict[str, Callable[[int], Batch]] = {
    "text": lambda n: {"input_ids": _text(n)},
    "pair": lambda n: {"input_ids": _text(n), "decoder_input_ids": _text(n)[:, :7]},
    "mel": lambda n: {"input_features": torch.randn(n, 8, 40), "decoder_input_ids": _text(n)[:, :7]},
    "pixels": lambda n: {"pixel_values": torch.randn(n, 3, 32, 32)},
    "pixels 64": lambda n: {"pixel_values": torch.randn(n, 3, 64, 64)},
    "pixels embeds": lambda n: {"pixel_values": torch.randn(n, 3, 32, 32)},
    "clip": lambda n: {"input_ids": _text(n), "pixel_values": torch.randn(n, 3, 32, 32)},
    "sound": lambda n: {"input_values": torch.randn(n, 400)},
    "spectrogram": lambda n: {"input_values": torch.randn(n, 32, 16)},
    "detr": lambda n: {"pixel_values": torch.randn(n, 3, 64, 64)},
}


def transformers_model(model: str, config: str, options: dict[str, Any]) -> nn.Module:
    import transformers

    return getattr(transformers, model)(getattr(transformers, config)(**options))


def hugging_face(model: nn.Module, batch: Any) -> Tensor:
    """Logits, or what stands for them: embeddings of both sides of CLIP."""
    caches = {"use_cache": False} if getattr(model.config, "use_cache", False) else {}
    output = model(**batch, **caches)
    if "image_embeds" in output and "text_embeds" in output:
        return torch.cat([output.image_embeds, output.text_embeds], -1)
    return output.logits if "logits" in output else output.image_embeds


def _transformers() -> list[Case]:
    return [Case(f"transformers:{model}", functools.partial(transformers_model, model, config, options),
                 forward=hugging_face, batch=_BATCHES[kind]) for model, config, options, kind in _TRANSFORMERS]


# diffusers

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
                     "extra_in_channels": 16, "down_block_types": ("DownBlock1DNoSkip", "DownBlock1D"),
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


def _diffusers() -> list[Case]:
    return [Case(f"diffusers:{name}", functools.partial(diffusers_model, name, options), batch=batch,
                 forward=coding if name == "AutoencoderTiny" else diffusion) for name, options, batch in _DIFFUSERS]


# segmentation-models-pytorch and ultralytics

def segmentation_model(name: str, encoder: str) -> nn.Module:
    import segmentation_models_pytorch

    return getattr(segmentation_models_pytorch, name)(encoder, encoder_weights=None, classes=3)


def yolo(config: str, **options: Any) -> nn.Module:
    """From a configuration of the smallest scale, as a trainer builds it."""
    os.environ.setdefault("YOLO_VERBOSE", "False")
    from ultralytics import YOLO

    return YOLO(config, verbose=False).model


def yolo_output(model: nn.Module, images: Tensor) -> Tensor:
    """What the heads say of every anchor, before boxes are chosen, and the prototypes of masks: what is decoded, and of
    two heads, as v10 and 26 train them, what the other one says too."""
    returned = model(images)
    decoded = floating_tensors(returned[0] if isinstance(returned, tuple) else returned)
    heads = returned[1] if isinstance(returned, tuple) and isinstance(returned[1], dict) else {}
    if "one2one" in heads:
        decoded += [heads["one2one"][name] for name in ("boxes", "scores", "mask_coefficient")
                    if name in heads["one2one"]]
    return concat_outputs(decoded)


def _segmentation() -> list[Case]:
    names = ["Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "PAN", "DeepLabV3", "DeepLabV3Plus",
             "UPerNet", "Segformer"]
    return [*(Case(f"smp:{name}-resnet18", functools.partial(segmentation_model, name, "resnet18"),
                   128 if name == "PAN" else 64) for name in names),
            Case("smp:Unet-mobilenet_v2", functools.partial(segmentation_model, "Unet", "mobilenet_v2")),
            Case("smp:Unet-mit_b0", functools.partial(segmentation_model, "Unet", "mit_b0"))]


def _ultralytics() -> list[Case]:
    names = ["yolov3-tiny", "yolov5n", "yolov6n", "yolov8n", "yolov8n-cls", "yolov8n-seg", "yolov8n-pose",
             "yolov8n-obb", "yolov9t", "yolov10n", "yolo11n", "yolo11n-seg", "yolo12n", "yolo26n"]
    return [Case(f"ultralytics:{name}", functools.partial(yolo, f"{name}.yaml"), forward=yolo_output)
            for name in names]


CASES = [*_torchvision(), *_timm(), *_transformers(), *_diffusers(), *_segmentation(), *_ultralytics()]
