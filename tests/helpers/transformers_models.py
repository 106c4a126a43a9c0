"""Models of transformers, built from tiny configurations, whose code is that of the large ones."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from model_case import Case
from torch import Tensor, nn

from fastscore.batches.parts import Batch

# (class of the model, class of its configuration, configuration, kind of input)

_BERT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "vocab_size": 60, "max_position_embeddings": 32}
_LLAMA = {**_BERT, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_HF_VIT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
           "image_size": 32, "patch_size": 8, "num_labels": 5}
_EXPERTS = {**_LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1,
            "num_local_experts": 4}
_DELTA = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
          "layer_types": ["linear_attention", "full_attention"]}
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
    ("GptOssForCausalLM", "GptOssConfig", {**_EXPERTS, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
     "text"),
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
    ("Mamba2ForCausalLM", "Mamba2Config", {
        "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 60, "num_heads": 8, "head_dim": 8, "state_size": 4,
        "n_groups": 1, "chunk_size": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}, "text"),
    ("BambaForCausalLM", "BambaConfig", {
        **_LLAMA, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 4,
        "mamba_chunk_size": 4, "attn_layer_indices": [1]}, "text"),
    ("NemotronHForCausalLM", "NemotronHConfig", {
        **_LLAMA, "num_hidden_layers": 3, "layers_block_type": ["mamba", "attention", "mlp"], "mamba_num_heads": 8,
        "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 4, "chunk_size": 4}, "text"),
    ("Qwen3NextForCausalLM", "Qwen3NextConfig", {
        **_EXPERTS, **_DELTA, "shared_expert_intermediate_size": 24}, "text"),
    ("Qwen3_5ForCausalLM", "Qwen3_5TextConfig", {**_LLAMA, **_DELTA}, "text"),
    ("Lfm2ForCausalLM", "Lfm2Config", {
        **_BERT, "num_key_value_heads": 2, "pad_token_id": 0, "layer_types": ["conv", "full_attention"]}, "text"),
    ("Lfm3ForCausalLM", "Lfm3Config", _EXPERTS, "text"),
    ("KimiLinearForCausalLM", "KimiLinearConfig", {
        **_EXPERTS, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
        "v_head_dim": 8, "num_key_value_heads": 4, "n_shared_experts": 1, "linear_head_dim": 8, "linear_num_heads": 4,
        "layer_types": ["linear_attention", "full_attention"]}, "text"),
    ("HYV3ForCausalLM", "HYV3Config", {**_EXPERTS, "num_shared_experts": 1}, "text"),
    ("DeepseekV3ForCausalLM", "DeepseekV3Config", {
        **_EXPERTS, "q_lora_rank": 16, "kv_lora_rank": 12, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
        "v_head_dim": 8, "num_key_value_heads": 4, "n_shared_experts": 1, "n_routed_experts": 4, "n_group": 1,
        "topk_group": 1, "first_k_dense_replace": 1}, "text"),
    ("DeepseekV4ForCausalLM", "DeepseekV4Config", {
        **_EXPERTS, "q_lora_rank": 16, "o_lora_rank": 16, "o_groups": 2, "n_routed_experts": 4,
        "num_key_value_heads": 1, "qk_rope_head_dim": 4, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 4},
     "text"),
    ("ZambaForCausalLM", "ZambaConfig", {
        **_BERT, "num_hidden_layers": 4, "n_mamba_heads": 2, "mamba_d_state": 4, "num_key_value_heads": 4,
        "attention_hidden_size": 64, "attention_head_dim": 16,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"]}, "text"),
    ("Gemma3nForCausalLM", "Gemma3nTextConfig", {
        **_LLAMA, "vocab_size_per_layer_input": 60, "hidden_size_per_layer_input": 8, "laurel_rank": 4,
        "num_kv_shared_layers": 0, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0, 0.0],
        "layer_types": ["sliding_attention", "full_attention"]}, "text"),
    ("BertForSequenceClassification", "BertConfig", _BERT, "text"),
    ("LongformerForSequenceClassification", "LongformerConfig", {**_BERT, "attention_window": 8}, "text"),
    ("RobertaForSequenceClassification", "RobertaConfig", _BERT, "text"),
    ("DistilBertForSequenceClassification", "DistilBertConfig", {
        "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 60, "max_position_embeddings": 32},
     "text"),
    ("ElectraForSequenceClassification", "ElectraConfig", {**_BERT, "embedding_size": 32}, "text"),
    ("AlbertForSequenceClassification", "AlbertConfig", {**_BERT, "embedding_size": 16}, "text"),
    ("MPNetForSequenceClassification", "MPNetConfig", _BERT, "text"),
    ("DebertaV2ForSequenceClassification", "DebertaV2Config", _BERT, "text"),
    ("NomicBertForSequenceClassification", "NomicBertConfig", _BERT, "text"),
    ("GteForSequenceClassification", "GteConfig", {**_BERT, "initializer_range": 0.2}, "text"),
    ("ModernBertForSequenceClassification", "ModernBertConfig", {**_BERT, "pad_token_id": 0}, "text"),
    ("MobileBertForSequenceClassification", "MobileBertConfig", {
        **_BERT, "embedding_size": 32, "intra_bottleneck_size": 32, "initializer_range": 0.2}, "text"),
    ("SqueezeBertForSequenceClassification", "SqueezeBertConfig", {
        **_BERT, "embedding_size": 32, "num_attention_heads": 8}, "text"),
    ("FunnelForSequenceClassification", "FunnelConfig", {
        "vocab_size": 60, "block_sizes": [1, 1], "num_decoder_layers": 1, "d_model": 32, "n_head": 4, "d_head": 8,
        "d_inner": 64}, "text"),
    ("T5ForConditionalGeneration", "T5Config", {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4,
                                                "vocab_size": 60, "decoder_start_token_id": 0}, "pair"),
    ("LongT5ForConditionalGeneration", "LongT5Config", {
        "d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4, "vocab_size": 60,
        "decoder_start_token_id": 0, "local_radius": 3}, "pair"),
    ("BartForConditionalGeneration", "BartConfig", _BART, "pair"),
    ("MarianMTModel", "MarianConfig", {**_BART, "pad_token_id": 0, "decoder_start_token_id": 0}, "pair"),
    ("PegasusForConditionalGeneration", "PegasusConfig", {**_BART, "pad_token_id": 0}, "pair"),
    ("PegasusXForConditionalGeneration", "PegasusXConfig", {
        **_BART, "pad_token_id": 0, "block_size": 4, "num_global_tokens": 2}, "pair"),
    ("ProphetNetForConditionalGeneration", "ProphetNetConfig", {
        "hidden_size": 32, "num_encoder_layers": 2, "num_decoder_layers": 2, "num_encoder_attention_heads": 4,
        "num_decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 60,
        "max_position_embeddings": 32, "num_buckets": 8, "relative_max_distance": 16}, "pair"),
    ("TrOCRForCausalLM", "TrOCRConfig", _BART, "text"),
    ("WhisperForConditionalGeneration", "WhisperConfig", {
        **_BART, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 20, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}, "mel"),
    ("ViTForImageClassification", "ViTConfig", _HF_VIT, "pixels"),
    ("DeiTForImageClassification", "DeiTConfig", _HF_VIT, "pixels"),
    ("BeitForImageClassification", "BeitConfig", _HF_VIT, "pixels"),
    ("Dinov2ForImageClassification", "Dinov2Config", _HF_VIT, "pixels"),
    ("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", _HF_VIT, "pixels"),
    ("SiglipForImageClassification", "SiglipConfig", {"vision_config": _HF_VIT, "num_labels": 5}, "pixels"),
    ("CLIPVisionModelWithProjection", "CLIPVisionConfig", {**_HF_VIT, "projection_dim": 16}, "pixels embeds"),
    ("CLIPModel", "CLIPConfig", _CLIP, "clip"),
    ("FocalNetForImageClassification", "FocalNetConfig", {
        "image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "hidden_sizes": [16, 32],
        "focal_levels": [2, 2], "focal_windows": [3, 3], "num_labels": 5}, "pixels"),
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
    ("SegformerForImageClassification", "SegformerConfig", {**_STAGES, "num_attention_heads": [1, 2, 3, 4]},
     "pixels 64"),
    ("PvtV2ForImageClassification", "PvtV2Config", {
        "image_size": 64, **_STAGES, "num_attention_heads": [1, 2, 3, 4]}, "pixels 64"),
    ("DPTForSemanticSegmentation", "DPTConfig", {
        **_HF_VIT, "num_hidden_layers": 4, "is_hybrid": False, "backbone_out_indices": [0, 1, 2, 3],
        "neck_hidden_sizes": [8, 8, 16, 16], "fusion_hidden_size": 16, "use_auxiliary_head": False}, "pixels"),
    ("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", _AUDIO, "sound"),
    ("HubertForSequenceClassification", "HubertConfig", _AUDIO, "sound"),
    ("WavLMForSequenceClassification", "WavLMConfig", _AUDIO, "sound"),
    ("Data2VecAudioForSequenceClassification", "Data2VecAudioConfig", {**_AUDIO, "num_conv_pos_embeddings": 2},
     "sound"),
    ("SpeechT5ForSpeechToText", "SpeechT5Config", {
        **_AUDIO, "vocab_size": 60, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}, "speech"),
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
    "speech": lambda n: {"input_values": torch.randn(n, 400), "decoder_input_ids": _text(n)[:, :7]},
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


def cases() -> list[Case]:
    return [Case(f"transformers:{model}", functools.partial(transformers_model, model, config, options),
                 forward=hugging_face, batch=_BATCHES[kind]) for model, config, options, kind in _TRANSFORMERS]
