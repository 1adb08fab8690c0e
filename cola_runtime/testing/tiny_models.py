"""Tiny random causal models and encoders with a byte-level tokenizer, as pretrained folders; no network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from cola_runtime.types import Site, SiteKind

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

ModelKind = Literal["llama", "gpt2", "bert", "roberta"]

CONTEXT_LENGTH = 256
LAYERS = 3
HIDDEN = 64
HEADS = 4
KEY_VALUE_HEADS = 2
INTERMEDIATE = 96
# Large enough that the gradients at the lowest layer are far above float32's smallest steps.
WEIGHT_DEVIATION = 0.1

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (PAD, BOS, EOS, TURN_START, TURN_END)

ROBERTA_PADDING = 3  # a token that no text has: RoBERTa's positions begin behind it

_KEY_VALUE = HIDDEN // HEADS * KEY_VALUE_HEADS
_ENCODER_SITES = (
    ("{prefix}.encoder.layer.{layer}.attention.self.query", HIDDEN, HIDDEN, 0),
    ("{prefix}.encoder.layer.{layer}.attention.self.key", HIDDEN, HIDDEN, 0),
    ("{prefix}.encoder.layer.{layer}.attention.self.value", HIDDEN, HIDDEN, 0),
    ("{prefix}.encoder.layer.{layer}.attention.output.dense", HIDDEN, HIDDEN, 1),
    ("{prefix}.encoder.layer.{layer}.intermediate.dense", HIDDEN, INTERMEDIATE, 2),
    ("{prefix}.encoder.layer.{layer}.output.dense", INTERMEDIATE, HIDDEN, 3),
)
# name, in_features, out_features, input group within the layer
_LAYER_SITES: dict[str, tuple[tuple[str, int, int, int], ...]] = {
    "llama": (
        ("model.layers.{layer}.self_attn.q_proj", HIDDEN, HIDDEN, 0),
        ("model.layers.{layer}.self_attn.k_proj", HIDDEN, _KEY_VALUE, 0),
        ("model.layers.{layer}.self_attn.v_proj", HIDDEN, _KEY_VALUE, 0),
        ("model.layers.{layer}.self_attn.o_proj", HIDDEN, HIDDEN, 1),
        ("model.layers.{layer}.mlp.gate_proj", HIDDEN, INTERMEDIATE, 2),
        ("model.layers.{layer}.mlp.up_proj", HIDDEN, INTERMEDIATE, 2),
        ("model.layers.{layer}.mlp.down_proj", INTERMEDIATE, HIDDEN, 3),
    ),
    "gpt2": (
        ("transformer.h.{layer}.attn.c_attn", HIDDEN, 3 * HIDDEN, 0),
        ("transformer.h.{layer}.attn.c_proj", HIDDEN, HIDDEN, 1),
        ("transformer.h.{layer}.mlp.c_fc", HIDDEN, INTERMEDIATE, 2),
        ("transformer.h.{layer}.mlp.c_proj", INTERMEDIATE, HIDDEN, 3),
    ),
    "bert": _ENCODER_SITES,
    "roberta": _ENCODER_SITES,
}

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_tiny_model(kind: ModelKind, folder: Path, *, dtype: str = "float32", seed: int = 0) -> Path:
    """Write a random model and its tokenizer to `folder`, for transformers' Auto classes; returns `folder`.

    `llama`: grouped-query attention, untied head. `gpt2`: Conv1D, fused c_attn, tied head, no dropout.
    `bert`: token types and a pooler. `roberta`: as pretrained, with a vocabulary head and no pooler. All
    parameters, biases and norms too, are drawn in float32, then cast: models of one seed agree across dtypes.
    """
    tokenizer = byte_tokenizer(kind)
    with torch.random.fork_rng(devices=[]):
        model = _build(kind, tokenizer)
    _randomise(model, seed)
    model.to(getattr(torch, dtype))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_sites(kind: ModelKind) -> tuple[Site, ...]:
    """Every Linear or Conv1D of a tiny model but the head (`all-linear`), known without loading it."""
    sites: list[Site] = []
    for layer in range(LAYERS):
        for name, in_features, out_features, group in _LAYER_SITES[kind]:
            sites.append(
                Site(
                    index=len(sites),
                    name=name.format(layer=layer, prefix=kind),
                    kind=SiteKind.CONV1D if kind == "gpt2" else SiteKind.LINEAR,
                    in_features=in_features,
                    out_features=out_features,
                    input_group=4 * layer + group,
                )
            )
    return tuple(sites)


def byte_tokenizer(kind: ModelKind = "llama") -> PreTrainedTokenizerFast:
    """One token a byte (261 in all with the special ones) and a ChatML template.

    Adds no tokens by itself, but an encoder's `<s> a </s> b </s>` (`bert`) or `<s> a </s></s> b </s>`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if kind in ("bert", "roberta"):
        second = f"{EOS} {EOS} $B {EOS}" if kind == "roberta" else f"{EOS}:0 $B:1 {EOS}:1"
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A {EOS}",
            pair=f"{BOS} $A {second}",
            special_tokens=[(BOS, words.index(BOS)), (EOS, words.index(EOS))],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[TURN_START, TURN_END],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT_LENGTH,
    )


def _build(kind: ModelKind, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    from transformers import (
        BertConfig,
        BertModel,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        RobertaConfig,
        RobertaForMaskedLM,
    )

    shared: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if kind == "llama":
        return LlamaForCausalLM(_llama_config(LlamaConfig, shared))
    if kind == "gpt2":
        return GPT2LMHeadModel(_gpt2_config(GPT2Config, shared))
    if kind == "bert":
        return BertModel(_encoder_config(BertConfig, shared, type_vocab_size=2))
    shared["pad_token_id"] = ROBERTA_PADDING
    return RobertaForMaskedLM(_encoder_config(RobertaConfig, shared, type_vocab_size=1))


def _llama_config(config: Any, shared: dict[str, Any]) -> Any:
    return config(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        max_position_embeddings=CONTEXT_LENGTH,
        tie_word_embeddings=False,
        **shared,
    )


def _gpt2_config(config: Any, shared: dict[str, Any]) -> Any:
    return config(
        n_embd=HIDDEN,
        n_inner=INTERMEDIATE,
        n_layer=LAYERS,
        n_head=HEADS,
        n_positions=CONTEXT_LENGTH,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **shared,
    )


def _encoder_config(config: Any, shared: dict[str, Any], *, type_vocab_size: int) -> Any:
    return config(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=CONTEXT_LENGTH,
        type_vocab_size=type_vocab_size,
        **shared,
    )


def _randomise(model: torch.nn.Module, seed: int) -> None:
    """Draw every parameter in place: matrices around 0, norm weights around 1, biases around 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, WEIGHT_DEVIATION, generator=generator)
            if parameter.ndim == 1 and name.endswith("weight"):
                parameter.add_(1.0)
