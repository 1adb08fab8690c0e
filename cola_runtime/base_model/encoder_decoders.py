"""Encoder-decoders (T5's and BART's families): opening them, and their forward.

Shapes: B rows, S tokens of the source, T tokens of the target, D hidden size, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cola_runtime.base_model.loss import VocabularyProjection
from cola_runtime.base_model.segments import MixedBatch
from cola_runtime.base_model.stock import open_frozen
from cola_runtime.errors import InvalidInput


def is_encoder_decoder(path: Path) -> bool:
    from transformers import AutoConfig

    return bool(AutoConfig.from_pretrained(path, local_files_only=True).is_encoder_decoder)


def read_encoder_decoder(
    path: Path, dtype: torch.dtype, attention: str | None
) -> tuple[Any, VocabularyProjection]:
    """The frozen model and its vocabulary projection. Raises InvalidInput `BASE_MODEL_UNSUPPORTED`."""
    from transformers import AutoModelForSeq2SeqLM

    model = open_frozen(AutoModelForSeq2SeqLM, path, dtype, attention)
    _check_decoder_start(model)
    return model, _vocabulary_projection(model)


def decode(model: Any, source_BS: Tensor, real_BS: Tensor, tokens_BT: Tensor) -> Tensor:
    """The decoder's last hidden state [B, T, D]; `real_BS` is 0 where the source is padded.

    The target is padded on the right, where the causal decoder never looks: every position counts as real.
    """
    encoded = model.get_encoder()(input_ids=source_BS, attention_mask=real_BS)
    decoded = model.get_decoder()(
        input_ids=tokens_BT,
        attention_mask=torch.ones_like(tokens_BT),
        encoder_hidden_states=encoded.last_hidden_state,
        encoder_attention_mask=real_BS,
        use_cache=False,
    )
    hidden_BTD: Tensor = decoded.last_hidden_state
    return hidden_BTD


def decoder_hidden(model: Any, batch: MixedBatch) -> Tensor:
    """The decoder's last hidden state [B, T, D] of a mixed batch."""
    assert batch.sources is not None  # rows without a source are refused
    return decode(model, batch.sources.tokens_BS, batch.sources.real_BS, batch.tokens_BT)


def _check_decoder_start(model: Any) -> None:
    """Rows are the labels behind the start that the folder names, or behind their own last one."""
    asked = model.generation_config.decoder_start_token_id
    start = getattr(model.config, "decoder_start_token_id", None)
    if start is None:  # the folder may name it in its generation settings only
        start = model.config.decoder_start_token_id = asked
    fed = [] if asked is None else _decoder_inputs(model, [5, 6, 7])
    if fed not in ([start, 5, 6], [7, 5, 6]):
        raise InvalidInput(
            "BASE_MODEL_UNSUPPORTED",
            f"{type(model).__name__} does not begin its labels with the decoder_start_token_id that it names",
            where="base_model",
            remedy="Name one in the folder's generation_config.json, or use another base model.",
        )


@torch.no_grad()
def _decoder_inputs(model: Any, labels: list[int]) -> list[int]:
    """What the model feeds its decoder for these labels."""
    fed: list[int] = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda _module, _args, inputs: fed.extend(inputs["input_ids"][0].tolist()), with_kwargs=True
    )
    try:
        model(input_ids=torch.tensor([[5]]), labels=torch.tensor([labels]))
    finally:
        hook.remove()
    return fed


@torch.no_grad()
def _vocabulary_projection(model: Any) -> VocabularyProjection:
    """What the model makes of its decoder's hidden state: T5 may scale it, BART adds a bias of its own."""
    tokens = torch.tensor([[0, 1]])
    hidden_BTD = decode(model, tokens, torch.ones_like(tokens), tokens)
    found_BTV = model(input_ids=tokens, decoder_input_ids=tokens, use_cache=False).logits
    tolerance = 32 * torch.finfo(found_BTV.dtype).eps * float(found_BTV.abs().max())
    for scale in (1.0, hidden_BTD.shape[-1] ** -0.5):
        head = VocabularyProjection.of(model, hidden_scale=scale)
        logits_BTV = torch.nn.functional.linear(hidden_BTD * scale, head.weight_VD, head.bias_V)
        if torch.allclose(logits_BTV, found_BTV, rtol=0.0, atol=tolerance):
            return head
    raise InvalidInput(
        "BASE_MODEL_UNSUPPORTED",
        f"{type(model).__name__} transforms its logits after the vocabulary projection",
        where="base_model",
        remedy="Use a base model without logit soft-capping.",
    )
