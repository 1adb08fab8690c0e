"""Tiny random models of many transformers architectures, for what must hold whatever the architecture."""

from __future__ import annotations

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


def save_causal_model(model_type: str, folder: Path, *, dtype: str, **changes: Any) -> Path:
    """A random causal LM of `model_type` (a key of CAUSAL, or any with `changes`), drawn in float32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **{**_SHARED, **CAUSAL.get(model_type, {}), **changes})
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, WEIGHT_DEVIATION, generator=generator)
            if parameter.ndim == 1 and name.endswith("weight"):
                parameter.add_(1.0)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder
