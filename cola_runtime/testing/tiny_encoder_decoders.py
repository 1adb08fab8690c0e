"""Tiny random encoder-decoders with a byte-level tokenizer, as pretrained folders; no network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cola_runtime.testing.architectures import save_encoder_decoder
from cola_runtime.testing.tiny_models import BOS, EOS, byte_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

EncoderDecoderKind = Literal["t5", "bart"]

_FRAMES = {"t5": f"$A {EOS}", "bart": f"{BOS} $A {EOS}"}


def save_tiny_encoder_decoder(kind: EncoderDecoderKind, folder: Path, *, dtype: str = "float32") -> Path:
    """Write a random model and its tokenizer to `folder`, for transformers' Auto classes; returns it."""
    save_encoder_decoder(kind, folder, dtype=dtype)
    framing_tokenizer(kind).save_pretrained(folder)
    return folder


def framing_tokenizer(kind: EncoderDecoderKind) -> PreTrainedTokenizerFast:
    """One token a byte; a text is framed as by the model's own tokenizer: `a </s>`, BART `<s> a </s>`."""
    from tokenizers import processors

    tokenizer = byte_tokenizer()
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (BOS, EOS)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=_FRAMES[kind], special_tokens=ids
    )
    tokenizer.chat_template = None
    return tokenizer
