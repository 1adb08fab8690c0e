"""One adapter trained alone by stock peft and torch.optim: what every other path is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from cola_runtime.adapter_spec import AdapterSpec, LoraKind
from cola_runtime.adapters.schedule import learning_rate
from cola_runtime.rows import Row
from cola_runtime.types import LearningRateSchedule, OptimizerHyperparameters, TensorKey, TensorKind

_FACTORS = {TensorKind.LORA_A: "lora_A", TensorKind.LORA_B: "lora_B"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How one adapter is trained alone. A step is one batch of rows, whatever the adaptation interval."""

    spec: AdapterSpec
    initial_weights: Mapping[TensorKey, Tensor]
    steps: Sequence[Sequence[Row]]
    optimizer: OptimizerHyperparameters
    schedule: LearningRateSchedule


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedAlone:
    """Final weights of every site, and each step's mean loss before it was applied."""

    weights: dict[TensorKey, Tensor]
    losses: list[float]


def train_alone(model_path: Path, recipe: Recipe, *, dtype: str, attention: str = "sdpa") -> TrainedAlone:
    """Train with peft's LoRA on the stock transformers model, loaded in `dtype`, in evaluation mode.

    The loss is sum(w ce) / sum(w) over a step's rows, right-padded into one batch, taken from the logits in
    the model's dtype: transformers' own loss goes through float32, which costs 6e-7 in a float64 run.
    """
    model = peft_model(model_path, recipe.spec, dtype=dtype, attention=attention)
    factors = adapter_parameters(model, recipe.spec)
    with torch.no_grad():
        for key, parameter in factors.items():
            parameter.copy_(recipe.initial_weights[key])
    return train_parameters(model, factors, recipe)


def train_parameters(model: Any, parameters: Mapping[TensorKey, Tensor], recipe: Recipe) -> TrainedAlone:
    """Train the adapter's parameters in place, by torch.optim and autograd through the whole model."""
    optimizer = torch_optimizer(recipe.optimizer, list(parameters.values()))
    losses = [
        _train_step(
            model, optimizer, rows, recipe, learning_rate(recipe.schedule, recipe.optimizer.learning_rate, k)
        )
        for k, rows in enumerate(recipe.steps)
    ]
    return TrainedAlone(weights={key: p.detach().clone() for key, p in parameters.items()}, losses=losses)


def peft_model(model_path: Path, spec: AdapterSpec, *, dtype: str, attention: str = "sdpa") -> Any:
    """The stock model with a fresh peft LoRA at the spec's sites, its factors in spec.dtype; no dropout."""
    from peft import LoraConfig, get_peft_model

    base = stock_model(model_path, dtype=dtype, attention=attention)
    kind = spec.parts[0].kind
    assert isinstance(kind, LoraKind)
    config = LoraConfig(
        r=kind.rank,
        lora_alpha=kind.alpha,
        use_rslora=kind.use_rslora,
        target_modules=[site.name for site in spec.sites],
        fan_in_fan_out=any(site.kind == "conv1d" for site in spec.sites),
        task_type="SEQ_2_SEQ_LM" if base.config.is_encoder_decoder else "CAUSAL_LM",
    )
    model = get_peft_model(base, config, autocast_adapter_dtype=False).eval()
    for parameter in adapter_parameters(model, spec).values():
        parameter.data = parameter.data.to(getattr(torch, spec.dtype))
    return model


def stock_model(model_path: Path, *, dtype: str, attention: str) -> Any:
    """transformers' own language model of the folder, an encoder-decoder or a decoder."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    of_pairs = AutoConfig.from_pretrained(model_path).is_encoder_decoder
    opened = AutoModelForSeq2SeqLM if of_pairs else AutoModelForCausalLM
    return opened.from_pretrained(model_path, dtype=getattr(torch, dtype), attn_implementation=attention)


def adapter_parameters(model: Any, spec: AdapterSpec) -> dict[TensorKey, Parameter]:
    """The peft model's own factor parameters, by our names, in catalogue order."""
    base = model.get_base_model()
    found: dict[TensorKey, Parameter] = {}
    for site in spec.sites:
        module = base.get_submodule(site.name)
        for kind, factor in _FACTORS.items():
            key = TensorKey(site.index, kind)
            if site.takes_ids:
                found[key] = getattr(module, factor.replace("lora_", "lora_embedding_"))["default"]
            else:
                found[key] = getattr(module, factor)["default"].weight
    return found


def batch_loss(model: Any, rows: Sequence[Row]) -> Tensor:
    """sum(w ce) / sum(w) over the rows' predicted tokens, in the dtype of the logits; of rows with a source
    the stock model's own loss of their labels.

    The vocabulary is the last, contiguous dimension: over a strided one torch adds 49,152 exponentials
    up one by one, which in float32 costs 3e-5 of the loss and up to 5e-3 of a gradient.
    """
    if rows[0].source is not None:
        return _labels_loss(model, rows)
    tokens, weights, mask = (each.to(getattr(model, "device", "cpu")) for each in padded(rows))
    logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
    loss = cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten().to(loss.dtype)
    return (weights * loss).sum() / weights.sum()


def _labels_loss(model: Any, rows: Sequence[Row]) -> Tensor:
    """The model shifts the labels behind its decoder's start by itself."""
    sources = [torch.from_numpy(row.source).long() for row in rows if row.source is not None]
    labels = [torch.from_numpy(row.tokens[1:]).long() for row in rows]
    loss: Tensor = model(
        input_ids=pad_sequence(sources, batch_first=True, padding_value=model.config.pad_token_id),
        attention_mask=pad_sequence([torch.ones_like(each) for each in sources], batch_first=True),
        labels=pad_sequence(labels, batch_first=True, padding_value=-100),
        use_cache=False,
    ).loss
    return loss


def relative_difference(
    values: Mapping[TensorKey, Tensor], reference: Mapping[TensorKey, Tensor]
) -> dict[TensorKey, float]:
    """|value - reference| / |reference| of each tensor, norms in float64; inf where only the latter is 0."""
    if values.keys() != reference.keys():
        raise ValueError(f"the adapters differ in {sorted(map(str, values.keys() ^ reference.keys()))}")
    return {key: _relative(values[key].double(), reference[key].double()) for key in reference}


def _relative(value: Tensor, reference: Tensor) -> float:
    difference, norm = float((value - reference).norm()), float(reference.norm())
    if difference == 0.0:
        return 0.0
    return difference / norm if norm else float("inf")


def _train_step(
    model: Any, optimizer: torch.optim.Optimizer, rows: Sequence[Row], recipe: Recipe, rate: float
) -> float:
    loss = batch_loss(model, rows)
    descend(loss, optimizer, recipe, rate)
    return loss.item()


def descend(loss: Tensor, optimizer: torch.optim.Optimizer, recipe: Recipe, rate: float) -> None:
    """One optimizer step at the learning rate `rate`, clipped as the recipe says."""
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    for group in optimizer.param_groups:
        group["lr"] = rate
        if recipe.optimizer.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(group["params"], recipe.optimizer.max_grad_norm)
    optimizer.step()


def torch_optimizer(wanted: OptimizerHyperparameters, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
    """torch's own; AdamW, SGD or Adafactor."""
    if wanted.kind == "adafactor":
        return torch.optim.Adafactor(
            parameters,
            lr=wanted.learning_rate,
            beta2_decay=wanted.beta2_decay,
            eps=(wanted.eps1, wanted.eps2),
            d=wanted.d,
            weight_decay=wanted.weight_decay,
        )
    if wanted.kind == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=wanted.learning_rate,
            momentum=wanted.momentum,
            nesterov=wanted.nesterov,
            weight_decay=wanted.weight_decay,
        )
    return torch.optim.AdamW(
        parameters,
        lr=wanted.learning_rate,
        betas=wanted.betas,
        eps=wanted.eps,
        weight_decay=wanted.weight_decay,
    )


def padded(rows: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, weights and attention mask, each [rows, longest], padded on the right with 0."""
    longest = max(len(row.tokens) for row in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
    weights = torch.zeros(len(rows), longest)
    mask = torch.zeros(len(rows), longest, dtype=torch.int64)
    for number, row in enumerate(rows):
        length = len(row.tokens)
        tokens[number, :length] = torch.from_numpy(row.tokens)
        weights[number, :length] = torch.from_numpy(row.weights)
        mask[number, :length] = 1
    return tokens, weights, mask
