"""Tiny random models of many transformers architectures, for what must hold whatever the architecture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 261  # the byte tokenizer's
WEIGHT_DEVIATION = 0.1

_SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
_GPT2_LIKE: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
_GROUPED_QUERIES: dict[str, Any] = {"num_key_value_heads": 2}

# transformers' model_type -> what its configuration needs beside the shared sizes
CAUSAL: dict[str, dict[str, Any]] = {
    "bloom": {"n_layer": 2, "n_head": 4},  # ALiBi, fused query_key_value, eager attention only
    "falcon": {},  # multi-query, parallel attention and MLP
    "gemma": {**_GROUPED_QUERIES, "head_dim": 16},  # tied head, norm weights around 1
    "gpt2": {**_GPT2_LIKE, "n_inner": 96, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gpt_neox": {},
    "gptj": {**_GPT2_LIKE, "rotary_dim": 8},
    "llama": _GROUPED_QUERIES,
    "mistral": _GROUPED_QUERIES,
    "olmo2": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64, "dropout": 0.0},  # flattens rows and tokens
    "phi3": _GROUPED_QUERIES,  # fused qkv_proj and gate_up_proj
    "qwen2": _GROUPED_QUERIES,  # biases at q, k and v
    "qwen3": {**_GROUPED_QUERIES, "head_dim": 16},  # norms on queries and keys
    "stablelm": {"num_key_value_heads": 4},
}

_RELATIVE = {
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "eos_token_id": 2,
}
_ENCODER_DECODER = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "dropout": 0.0,
    "decoder_start_token_id": 1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "forced_eos_token_id": None,
}
SEQUENCE_TO_SEQUENCE: dict[str, dict[str, Any]] = {
    "bart": _ENCODER_DECODER,  # a bias behind the vocabulary projection
    "marian": _ENCODER_DECODER,
    "t5": {**_RELATIVE, "decoder_start_token_id": 0},  # relative positions, a scaled and tied head
    "mt5": {**_RELATIVE, "decoder_start_token_id": 0, "tie_word_embeddings": False},  # a gated MLP
}

IMAGE_EDGE = 32
_VIT = {
    "image_size": IMAGE_EDGE,
    "patch_size": 8,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_STAGES = {"depths": [1, 2], "hidden_sizes": [16, 24]}
IMAGES: dict[str, dict[str, Any]] = {
    "vit": {**_VIT, "intermediate_size": 96},
    "vit_msn": {**_VIT, "intermediate_size": 96},
    "deit": {**_VIT, "intermediate_size": 96, "architectures": ["DeiTForImageClassification"]},  # two tokens
    "dinov2": {**_VIT, "mlp_ratio": 2},  # pools the first token and the patches' mean
    "dinov2_with_registers": {**_VIT, "mlp_ratio": 2, "num_register_tokens": 3},
    "swin": {  # windows of patches, halved between the stages
        "image_size": IMAGE_EDGE,
        "patch_size": 4,
        "embed_dim": 16,
        "depths": [2, 1],
        "num_heads": [2, 4],
        "window_size": 4,
    },
    "convnext": {**_STAGES, "num_stages": 2, "image_size": IMAGE_EDGE},  # 1 x 1 products as Linear
    "convnextv2": {**_STAGES, "num_stages": 2, "image_size": IMAGE_EDGE},
    "resnet": {**_STAGES, "embedding_size": 8, "layer_type": "basic"},
    "regnet": {**_STAGES, "embedding_size": 8, "groups_width": 8},
}
WITHOUT_ATTENTION = ("convnext", "convnextv2", "resnet", "regnet")


def save_causal_model(model_type: str, folder: Path, *, dtype: str, **changes: Any) -> Path:
    """A random causal LM of `model_type` (a key of CAUSAL, or any with `changes`), drawn in float32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **{**_SHARED, **CAUSAL.get(model_type, {}), **changes})
    return _save(AutoModelForCausalLM, config, folder, dtype)


def save_smollm2_shape(folder: Path, *, dtype: str = "bfloat16") -> Path:
    """Random weights in the shapes of SmolLM2-135M: what is timed costs the same."""
    changes = {
        "vocab_size": 49_152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    }
    return save_causal_model("llama", folder, dtype=dtype, **changes)


def save_encoder_decoder(model_type: str, folder: Path, *, dtype: str) -> Path:
    """A random encoder-decoder of `model_type`, a key of SEQUENCE_TO_SEQUENCE, drawn in float32."""
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    shared = {key: _SHARED[key] for key in ("vocab_size", "pad_token_id")}
    config = AutoConfig.for_model(model_type, **{**shared, **SEQUENCE_TO_SEQUENCE[model_type]})
    return _save(AutoModelForSeq2SeqLM, config, folder, dtype)


def save_image_classifier(model_type: str, folder: Path, *, dtype: str) -> Path:
    """A random image classifier of `model_type`, a key of IMAGES, with its image processor's file."""
    from transformers import AutoConfig, AutoModelForImageClassification

    config = AutoConfig.for_model(model_type, **IMAGES[model_type])
    _save(AutoModelForImageClassification, config, folder, dtype)
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": IMAGE_EDGE, "width": IMAGE_EDGE},
        "image_mean": [0.4, 0.5, 0.6],
        "image_std": [0.3, 0.25, 0.2],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    return folder


def _save(auto_class: Any, config: Any, folder: Path, dtype: str) -> Path:
    with torch.random.fork_rng(devices=[]):
        model = auto_class.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, WEIGHT_DEVIATION, generator=generator)
            if parameter.ndim == 1 and name.endswith("weight"):
                parameter.add_(1.0)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder
