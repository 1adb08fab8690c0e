"""Reads a pretrained folder and refuses what the tapped base model cannot serve exactly."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cola_runtime.base_model.accelerator import HOST, Accelerator
from cola_runtime.base_model.catalogue import site_catalogue, source_groups
from cola_runtime.base_model.checkpointing import checkpoint_layers
from cola_runtime.base_model.encoder_decoders import is_encoder_decoder, read_encoder_decoder
from cola_runtime.base_model.encoders import is_encoder, read_encoder
from cola_runtime.base_model.heads import Pooling
from cola_runtime.base_model.images import (
    ImageInput,
    image_tokens,
    is_image_classifier,
    read_image_classifier,
)
from cola_runtime.base_model.llama_weights import is_plain_llama
from cola_runtime.base_model.loss import VocabularyProjection
from cola_runtime.base_model.product_rate import matrix_product_flops
from cola_runtime.base_model.quantized import QUANTIZATIONS, quantize_sites
from cola_runtime.base_model.site_groups import SiteGroup, site_group
from cola_runtime.base_model.stock import open_frozen
from cola_runtime.errors import InvalidInput
from cola_runtime.job_choices import Task
from cola_runtime.types import UNQUANTIZED, Site

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
ATTENTIONS = ("eager", "sdpa")
UNBOUNDED_CONTEXT = 4096  # of T5's relative positions, which set no limit: what memory should allow
_TRIAL_SHAPE = (4, 64)
_TRIAL_IMAGES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A frozen transformers model in evaluation mode and what was found out about it."""

    model: Any
    path: Path
    dtype: str
    sites: tuple[Site, ...]
    groups: tuple[SiteGroup, ...]
    head: VocabularyProjection | None  # None: an encoder, which predicts no tokens
    pooling: Pooling
    attention: str  # of transformers' own forward: generation, and training too unless `by_hand`
    by_hand: bool  # LlamaBody can compute it
    product_flops: float  # FLOP/s of matrix products in its dtype here
    tied_sites: tuple[int, ...]  # sites whose parameters another module uses too
    activation_checkpointing: bool
    tiled_weights: bool  # kept in the processor's own layout beside the plain one, where that is faster
    quantization: str
    parameters: int
    source_groups: frozenset[int]  # of an encoder-decoder: input groups whose x is of the source's tokens
    accelerator: Accelerator = HOST
    images: ImageInput | None = None  # of an image classifier, which takes nothing else
    image_tokens: int = 0  # computed for every image

    @property
    def bidirectional(self) -> bool:
        return self.head is None

    @property
    def encoder_decoder(self) -> bool:
        return bool(self.model.config.is_encoder_decoder)

    @property
    def tasks(self) -> tuple[Task, ...]:
        """What it can be trained for."""
        if self.encoder_decoder:
            return (Task.SEQUENCE_TO_SEQUENCE,)
        if self.images is not None:
            return (Task.IMAGE_CLASSIFICATION,)
        heads = (Task.SEQUENCE_CLASSIFICATION, Task.REGRESSION)
        return heads if self.bidirectional else (Task.CAUSAL_LM, *heads)

    @property
    def hidden_size(self) -> int:
        if self.images is not None:
            return self.images.hidden_size
        return int(self.model.get_input_embeddings().embedding_dim)

    @property
    def vocabulary_size(self) -> int:
        """0 where rows have no tokens."""
        return 0 if self.images is not None else int(self.model.get_input_embeddings().num_embeddings)

    @property
    def context_length(self) -> int:
        """Tokens. RoBERTa counts positions from behind its padding token's id, so those before are lost."""
        if self.images is not None:
            return self.image_tokens
        embeddings = getattr(self.model.base_model, "embeddings", None)
        lost = getattr(embeddings, "padding_idx", None)
        positions = getattr(self.model.config, "max_position_embeddings", UNBOUNDED_CONTEXT)
        return int(positions) - (0 if lost is None else lost + 1)

    @property
    def token_types(self) -> int:
        return int(getattr(self.model.config, "type_vocab_size", 0)) if self.bidirectional else 0


def load_frozen_model(
    path: Path,
    *,
    dtype: str,
    attention: str,
    activation_checkpointing: bool = False,
    tiled_weights: bool = True,
    quantization: str = UNQUANTIZED,
    accelerator: Accelerator = HOST,
) -> LoadedModel:
    """Load, freeze, find the sites; of a causal model check that head(last hidden state) is its logits.

    Reads safetensors only. What there is to find out is found out in host memory; then it moves to the
    accelerator. Sites of one group get one weight buffer. Raises InvalidInput for an unknown dtype or
    attention, `BASE_MODEL_UNSUPPORTED` where the logits are not a plain projection,
    `CHECKPOINTING_UNSUPPORTED`, and `QUANTIZATION_UNSUPPORTED`.
    """
    _check_known("dtype", dtype, tuple(DTYPES))
    _check_known("attention", attention, ("auto", *ATTENTIONS))
    _check_known("quantization", quantization, (UNQUANTIZED, *QUANTIZATIONS))
    chosen = None if attention == "auto" else attention
    model, head, pooling, images = _opened(path, DTYPES[dtype], chosen)
    sites = site_catalogue(model, None if images is None else images.shape)
    tied_sites = _tied_sites(model, sites)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    sources = source_groups(model, sites) if model.config.is_encoder_decoder else frozenset()
    tokens_of_image = 0 if images is None else image_tokens(model, sites, images.shape)
    if quantization != UNQUANTIZED:
        quantize_sites(model, sites, quantization, tied_sites=tied_sites, device=accelerator.device)
    model.to(accelerator.device)  # modules and ties stay; tensors taken out of it before do not follow
    if head is not None:
        head = VocabularyProjection.of(model, hidden_scale=head.hidden_scale, keep_tiles=tiled_weights)
    images = None if images is None else images.at(accelerator)
    groups = _site_groups(model, sites)
    by_hand = is_plain_llama(model, groups)
    if attention == "auto":
        attention = "sdpa" if by_hand else _faster_attention(model, images, accelerator)
    if activation_checkpointing and not by_hand:
        checkpoint_layers(model, groups)
    return LoadedModel(
        model=model,
        path=path,
        dtype=dtype,
        sites=sites,
        groups=groups,
        head=head,
        pooling=pooling,
        attention=attention,
        by_hand=by_hand,
        tied_sites=tied_sites,
        images=images,
        image_tokens=tokens_of_image,
        product_flops=matrix_product_flops(DTYPES[dtype], accelerator),
        source_groups=sources,
        accelerator=accelerator,
        activation_checkpointing=activation_checkpointing,
        tiled_weights=tiled_weights,
        quantization=quantization,
        parameters=parameters,
    )


def _opened(
    path: Path, dtype: torch.dtype, attention: str | None
) -> tuple[Any, VocabularyProjection | None, Pooling, ImageInput | None]:
    if is_image_classifier(path):
        model, images = read_image_classifier(path, dtype, attention)
        return model, None, Pooling(first_token=True), images
    if is_encoder_decoder(path):
        return *read_encoder_decoder(path, dtype, attention), Pooling(first_token=False), None
    if is_encoder(path):
        model, pooling = read_encoder(path, dtype, attention)
        return model, None, pooling, None
    model = _read(path, dtype, attention)
    head = VocabularyProjection.of(model)
    _check_plain_projection(model, head)
    return model, head, Pooling(first_token=False), None


def _read(path: Path, dtype: torch.dtype, attention: str | None) -> Any:
    from transformers import AutoModelForCausalLM

    return open_frozen(AutoModelForCausalLM, path, dtype, attention)


@torch.no_grad()
def _check_plain_projection(model: Any, head: VocabularyProjection) -> None:
    tokens = torch.tensor([[0, 1]])
    hidden_BTD = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    logits_BTV = torch.nn.functional.linear(hidden_BTD, head.weight_VD, head.bias_V)
    found_BTV = model(input_ids=tokens, use_cache=False).logits
    # The same product in the same dtype: a cap that bends small logits little is far above rounding.
    tolerance = 32 * torch.finfo(found_BTV.dtype).eps * float(found_BTV.abs().max())
    capped = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    if capped or not torch.allclose(logits_BTV, found_BTV, rtol=0.0, atol=tolerance):
        raise InvalidInput(
            "BASE_MODEL_UNSUPPORTED",
            f"{type(model).__name__} transforms its logits after the vocabulary projection",
            where="base_model",
            remedy="Use a base model without logit scaling or soft-capping.",
        )


def _site_groups(model: Any, sites: Sequence[Site]) -> tuple[SiteGroup, ...]:
    members: dict[int, list[Site]] = {}
    for site in sites:
        members.setdefault(site.input_group, []).append(site)
    groups = [
        site_group(group, [model.get_submodule(site.name) for site in group]) for group in members.values()
    ]
    shared = _shared_storages(model)
    for group in groups:
        if not any(p.data_ptr() in shared for module in group.modules for p in module.parameters()):
            group.fuse()
    return tuple(groups)


def _tied_sites(model: Any, sites: Sequence[Site]) -> tuple[int, ...]:
    shared = _shared_storages(model)
    modules = {site.index: model.get_submodule(site.name) for site in sites}
    return tuple(
        index for index, module in modules.items() if any(p.data_ptr() in shared for p in module.parameters())
    )


def _shared_storages(model: Any) -> set[int]:
    """Addresses of weights that more than one module uses: moving one would untie it."""
    seen: set[int] = set()
    shared: set[int] = set()
    for _, parameter in model.named_parameters(remove_duplicate=False):
        (shared if parameter.data_ptr() in seen else seen).add(parameter.data_ptr())
    return shared


def _faster_attention(model: Any, images: ImageInput | None, accelerator: Accelerator) -> str:
    """Set and return the implementation whose forward and backward take less time on this machine.

    An encoder-decoder keeps what transformers chose.
    """
    if model.config.is_encoder_decoder:
        return str(model.config._attn_implementation)
    trial = partial(_text_trial, model) if images is None else partial(_image_trial, model, images)
    seconds = {name: _trial_seconds(model, name, trial, accelerator) for name in ATTENTIONS}
    best = min(seconds, key=lambda name: seconds[name])
    model.set_attn_implementation(best)
    return best


def _trial_seconds(
    model: Any, attention: str, trial: Callable[[], Tensor], accelerator: Accelerator
) -> float:
    """Best of two passes over a small batch; infinite where the model does not have the implementation."""
    try:
        model.set_attn_implementation(attention)
    except ValueError:
        return float("inf")
    return min(_timed_pass(trial, accelerator) for _ in range(2))


def _timed_pass(trial: Callable[[], Tensor], accelerator: Accelerator) -> float:
    accelerator.wait()
    started = time.perf_counter()
    trial().sum().backward()  # type: ignore[no-untyped-call]
    accelerator.wait()
    return time.perf_counter() - started


def _text_trial(model: Any) -> Tensor:
    embedded_BTD = model.get_input_embeddings()(
        torch.zeros(_TRIAL_SHAPE, dtype=torch.int64, device=model.device)
    )
    hidden: Tensor = model.base_model(inputs_embeds=embedded_BTD.requires_grad_(True), use_cache=False)[0]
    return hidden


def _image_trial(model: Any, images: ImageInput) -> Tensor:
    shape = _TRIAL_IMAGES, *images.shape
    pixels_BCHW = torch.zeros(shape, dtype=model.dtype, device=model.device, requires_grad=True)
    pooled: Tensor = model(pixel_values=pixels_BCHW).logits
    return pooled


def _check_known(field: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise InvalidInput(
            "SPEC_INVALID",
            f"{field} {value!r} is unknown",
            where=field,
            remedy=f"Use one of {', '.join(known)}.",
        )
