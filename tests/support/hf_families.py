"""Families of transformers, each as the configuration of a tiny random model and a batch that it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.support.hf_models import tokens

_SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,  # else many a random model repeats its last token
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_WINDOWS = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}

# By family: the arguments of its configuration, <family>Config.
DECODERS: dict[str, dict[str, Any]] = {
    "Llama": _GROUPED,
    "Qwen2": _GROUPED,
    "Qwen2Moe": {**_GROUPED, **_EXPERTS, "shared_expert_intermediate_size": 48},
    "Qwen3": {**_GROUPED, "head_dim": 16},
    "Qwen3Moe": {**_GROUPED, **_EXPERTS, "head_dim": 16},
    "Qwen3Next": {
        **_GROUPED, **_EXPERTS, "head_dim": 16, "shared_expert_intermediate_size": 48,
        "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4, "linear_num_key_heads": 2,
        "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    },
    "Mistral": {**_GROUPED, "sliding_window": 6},
    "Mixtral": {**_GROUPED, "num_local_experts": 4, "sliding_window": None},
    "Gemma2": {
        **_GROUPED, **_WINDOWS, "head_dim": 16, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 16,
    },
    "Gemma3Text": {**_GROUPED, **_WINDOWS, "head_dim": 16, "query_pre_attn_scalar": 16},
    "GptOss": {**_GROUPED, **_WINDOWS, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Phi3": _GROUPED,
    "GPTNeoX": _SIZES,
    "GPT2": {"vocab_size": 300, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "pad_token_id": 0,
             "bos_token_id": 1, "eos_token_id": None, "tie_word_embeddings": False},
    "DeepseekV3": {
        **_SIZES, "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16, "v_head_dim": 16, "n_routed_experts": 4, "n_group": 2, "topk_group": 1,
        "num_experts_per_tok": 2, "moe_intermediate_size": 48, "first_k_dense_replace": 1, "n_shared_experts": 1,
    },
    "Olmo2": _GROUPED,
    "Cohere2": {**_GROUPED, **_WINDOWS},
    "OPT": {"vocab_size": 300, "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
            "max_position_embeddings": 128, "word_embed_proj_dim": 64, "pad_token_id": 0, "bos_token_id": 1,
            "eos_token_id": None, "tie_word_embeddings": False},
    "Bamba": {
        **_GROUPED, "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16,
        "mamba_n_groups": 1, "mamba_expand": 2,
    },
    "Lfm2": {**_GROUPED, "layer_types": ["conv", "full_attention"], "block_multiple_of": 16},
    "Granite": _GROUPED,
    "Starcoder2": {**_GROUPED, "sliding_window": None},
    "Glm4": {**_GROUPED, "head_dim": 16},
}  # fmt: skip


def _text() -> dict[str, Any]:
    """So little padding that every row of it sees a token through ModernBert's window."""
    return tokens(22, 24, 21, side="right")


def _image(**others: Any) -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), **others}


def _sound() -> dict[str, Any]:
    return {"input_values": torch.randn(2, 1600, generator=torch.Generator().manual_seed(0))}


def _speech() -> dict[str, Any]:
    features = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0))
    return {"input_features": features, "decoder_input_ids": tokens(7, 7)["input_ids"]}


_SEEN = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
_WHISPER = {
    "vocab_size": 300, "num_mel_bins": 8, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96,
    "max_source_positions": 32, "max_target_positions": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1,
}  # fmt: skip
_BART = {
    "vocab_size": 300, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "max_position_embeddings": 64,
}  # fmt: skip
_SHORT = {name: value for name, value in _SIZES.items() if name not in ("eos_token_id", "tie_word_embeddings")}
_IMAGE_TOKEN = 5
_LLAVA = {
    "vision_config": {"model_type": "clip_vision_model", **_SEEN, "projection_dim": 64},
    "text_config": {"model_type": "llama", **_GROUPED},
    "image_token_index": _IMAGE_TOKEN,
    "vision_feature_layer": -1,
}
_QWEN2_VL = {
    "text_config": {
        **_GROUPED, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3], "rope_type": "default"},
    },
    "vision_config": {
        "depth": 2, "embed_dim": 64, "hidden_size": 64, "num_heads": 4, "mlp_ratio": 2, "patch_size": 8,
        "temporal_patch_size": 1, "spatial_merge_size": 2,
    },
    "image_token_id": _IMAGE_TOKEN,
}  # fmt: skip


def _text_with_images() -> dict[str, Any]:
    """16 patches of an image of 32 by 32 in each row."""
    ids = tokens(24, 24)["input_ids"]
    ids[ids == _IMAGE_TOKEN] = 6
    ids[:, 3:19] = _IMAGE_TOKEN
    return _image(input_ids=ids)


def _text_with_ragged_images() -> dict[str, Any]:
    """Images of 4 by 4 and 2 by 6 patches, 2 by 2 of which are one token."""
    patches = torch.randn(16 + 12, 3 * 8 * 8, generator=torch.Generator().manual_seed(0))
    ids = tokens(14, 14)["input_ids"]
    ids[ids == _IMAGE_TOKEN] = 6
    ids[0, 3:7] = _IMAGE_TOKEN
    ids[1, 3:6] = _IMAGE_TOKEN
    types = (ids == _IMAGE_TOKEN).int()
    return {"input_ids": ids, "pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4], [1, 2, 6]]),
            "mm_token_type_ids": types}  # fmt: skip


# By family: (model, configuration, its arguments, a batch); the first result of the model is judged.
ENCODERS: dict[str, tuple[str, str, dict[str, Any], Callable[[], dict[str, Any]]]] = {
    "Bert": ("BertModel", "BertConfig", _SHORT, _text),
    "Roberta": ("RobertaModel", "RobertaConfig", _SHORT, _text),
    "DistilBert": (
        "DistilBertModel", "DistilBertConfig",
        {"vocab_size": 300, "dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4, "pad_token_id": 0}, _text,
    ),
    "Electra": ("ElectraModel", "ElectraConfig", {**_SHORT, "embedding_size": 32}, _text),
    "ModernBert": (
        "ModernBertModel", "ModernBertConfig",
        {**_SHORT, "local_attention": 8, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2}, _text,
    ),
    "Bart": ("BartModel", "BartConfig", _BART, _text),
    "ViT": ("ViTModel", "ViTConfig", _SEEN, _image),
    "Dinov2": ("Dinov2Model", "Dinov2Config", {k: v for k, v in _SEEN.items() if k != "intermediate_size"}, _image),
    "SiglipVision": ("SiglipVisionModel", "SiglipVisionConfig", _SEEN, _image),
    "CLIPVision": ("CLIPVisionModel", "CLIPVisionConfig", _SEEN, _image),
    "CLIPText": ("CLIPTextModel", "CLIPTextConfig", {**_SHORT, "eos_token_id": 2}, _text),
    "Wav2Vec2": (
        "Wav2Vec2Model", "Wav2Vec2Config",
        {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "conv_dim": (32, 32), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_conv_pos_embeddings": 16,
         "num_conv_pos_embedding_groups": 4, "num_feat_extract_layers": 2}, _sound,
    ),
    "Whisper": ("WhisperModel", "WhisperConfig", _WHISPER, _speech),
    "Llava": ("LlavaModel", "LlavaConfig", _LLAVA, _text_with_images),
    "Qwen2VL": ("Qwen2VLModel", "Qwen2VLConfig", _QWEN2_VL, _text_with_ragged_images),
}  # fmt: skip
