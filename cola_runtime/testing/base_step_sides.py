"""What the base step's benchmark compares: the bare model, our step in every mode and kind, and stock peft.

Every side computes the same rows, B rows of T tokens, every token a label. Imports peft when it is used.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from statistics import median
from threading import Event
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from cola_runtime.adapter_spec import (
    AdapterKind,
    AdapterPart,
    AdapterSpec,
    LinearizedLoraKind,
    LinearKind,
    LoraKind,
    MlpKind,
)
from cola_runtime.adapters.adapter import initial_weights
from cola_runtime.adapters.shapes import weight_shapes
from cola_runtime.base_model.accelerator import HOST, Accelerator
from cola_runtime.base_model.model import TappedModel
from cola_runtime.encodings import Encoding, TapPlan
from cola_runtime.gradients.taps import Tap
from cola_runtime.rows import Row
from cola_runtime.testing.record import interleaved
from cola_runtime.types import BaseStep, Gang, Lease, Membership, Segment, Site

RANK, ALPHA, WIDE_RANK = 8, 16.0, 64
UNSENT_TAPS = 64
FEW_MODULES = (
    "q_proj",
    "v_proj",
)  # where the full-rank adapters are: everywhere they would be the model again

LORA = LoraKind(rank=RANK, alpha=ALPHA)
WIDE_LORA = LoraKind(rank=WIDE_RANK, alpha=2.0 * WIDE_RANK)
LINEAR = LinearKind()
MLP = MlpKind(hidden=RANK)  # as many numbers as LoRA of that rank, but for the biases
LINEARIZED = LinearizedLoraKind(rank=RANK, alpha=ALPHA)
MIXED_KINDS: tuple[AdapterKind, ...] = (LORA, LINEAR, MLP, LINEARIZED)


class Stock:
    """The bare transformers model: the frozen floor."""

    def __init__(self, path: Path, dtype: str, accelerator: Accelerator = HOST) -> None:
        self._model = _stock_model(path, dtype, "sdpa", accelerator).requires_grad_(False)

    def choose_attention(self, tokens_BT: Tensor) -> str:
        """Set the implementation that is faster for these rows; also warms everything up."""
        names = ("sdpa", "eager")
        timings: dict[str, float] = {}
        for name in names:
            self._model.set_attn_implementation(name)
            timing = interleaved({name: lambda: self.step(tokens_BT)}, rounds=1, warmup=0)
            timings[name] = timing[name].thread_cpu_seconds[0]
        best = min(names, key=lambda name: timings[name])
        self._model.set_attn_implementation(best)
        return best

    def step(self, tokens_BT: Tensor, prompt: int = 1) -> None:
        """Forward and backward down to the input embeddings; the first `prompt` tokens are no labels."""
        embedded_BTD = self._model.get_input_embeddings()(tokens_BT).requires_grad_(True)
        logits_BTV = self._model(inputs_embeds=embedded_BTD, use_cache=False).logits
        _loss(logits_BTV, tokens_BT, prompt).backward()


class Ours:
    """One tapped model and any number of teams of tenants in its bank; a step computes one team's rows."""

    def __init__(self, path: Path, dtype: str, *, accelerator: str = "cpu") -> None:
        self.model = TappedModel.load(
            path, dtype=dtype, attention="eager", threads=1, accelerator=accelerator
        )
        self._itemsize = int(getattr(torch, dtype).itemsize)
        self.attention = self.model.describe("", "").details["attention"]
        self.install_seconds: dict[str, float] = {}  # per adapter, of each team
        self._teams: dict[str, tuple[Segment, ...]] = {}

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.model.sites

    def add_team(
        self,
        name: str,
        rows_BT: NDArray[np.int32],
        *,
        tenants: int,
        kinds: tuple[AdapterKind, ...] = (LORA,),
        merged: bool = False,
        prompt: int = 1,
    ) -> None:
        """Install `tenants` adapters, of each kind in turn, and deal the rows out to them.

        A merged team is one gang. The first `prompt` tokens of a row are no labels.
        """
        gang = Gang(name=f"group/{name}", combine="mean") if merged else None
        segments, seconds = [], []
        drawn = {kind: initial_weights(_spec(kind, self.sites)) for kind in kinds[:tenants]}
        for number, rows in enumerate(np.array_split(rows_BT, tenants)):
            spec = _spec(kinds[number % len(kinds)], self.sites)
            segment = _segment(f"{name}-{number}", rows, gang, prompt)
            weights = drawn[kinds[number % len(kinds)]]
            membership = Membership(gang=gang) if gang else None
            started = time.thread_time()
            self.model.install(segment.lease, spec, 0, weights, membership=membership)
            seconds.append(time.thread_time() - started)
            segments.append(segment)
        self._teams[name] = tuple(segments)
        self.install_seconds[name] = median(seconds)

    def remove_team(self, name: str) -> None:
        for segment in self._teams.pop(name):
            self.model.evict(segment.lease.job_id)

    def adapter_bytes(self, kind: AdapterKind) -> int:
        """Of one adapter's weights in the base model's dtype."""
        numel = sum(prod(shape) for shape in weight_shapes(_spec(kind, self.sites)).values())
        return numel * self._itemsize

    def put_in_place(self, name: str) -> None:
        """Make the base weights those that the team sees, by a forward pass over two tokens."""
        first = self._teams[name][0]
        row = _row(first.rows[0].tokens[:2])
        _run(self.model, BaseStep(number=0, segments=(replace(first, rows=(row,)),), train=False))

    def step(
        self, name: str, encoding: Encoding = Encoding.ADAPTER_GRADIENT, *, wait_for_taps: bool = True
    ) -> None:
        """One base step of the whole team; its taps go to a sender that keeps up."""
        segments = tuple(replace(segment, taps=TapPlan(encoding)) for segment in self._teams[name])
        _run(self.model, BaseStep(number=1, segments=segments), wait_for_taps=wait_for_taps)

    def drained(self) -> None:
        """Return when every tap has been handed out."""
        handed_out = Event()
        self.model.behind_taps(handed_out.set)
        handed_out.wait()


class Peft:
    """peft on the stock model, all tenants' adapters loaded, with an optimizer for each."""

    def __init__(
        self, path: Path, dtype: str, attention: str, *, tenants: int, accelerator: Accelerator = HOST
    ) -> None:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
        self._names = [f"tenant{k}" for k in range(tenants)]
        base = _stock_model(path, dtype, attention, accelerator)
        # Factors in the model's dtype, as in our forward; peft's own default (float32) is slower in bfloat16.
        self._model = get_peft_model(
            base, config, adapter_name=self._names[0], autocast_adapter_dtype=False
        ).eval()
        for name in self._names[1:]:
            self._model.add_adapter(name, config, autocast_adapter_dtype=False)

    def joint(self, tokens_BT: Tensor) -> None:
        self._model.set_adapter(self._names[0])
        self._step(tokens_BT)

    def sequential(self, tokens_BT: Tensor) -> None:
        for name, tokens_T in zip(self._names, tokens_BT, strict=True):
            self._model.set_adapter(name)
            self._step(tokens_T[None])

    def train(self, number: int, tokens_BT: Tensor) -> tuple[list[Tensor], torch.optim.Optimizer]:
        """One real AdamW step of one tenant; its parameters, with their gradients, and its optimizer."""
        name = self._names[number]
        self._model.set_adapter(name)
        parameters = [p for p in self._model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters)
        self._backward(tokens_BT)
        optimizer.step()
        return parameters, optimizer

    def _step(self, tokens_BT: Tensor) -> None:
        self._backward(tokens_BT)
        self._model.zero_grad(set_to_none=True)

    def _backward(self, tokens_BT: Tensor) -> None:
        _loss(self._model(input_ids=tokens_BT, use_cache=False).logits, tokens_BT).backward()


def random_rows(rows: int, tokens: int, seed: int) -> NDArray[np.int32]:
    return np.random.default_rng(seed).integers(0, 49_152, (rows, tokens), dtype=np.int32)


def tokens_of(rows_BT: NDArray[np.int32]) -> Tensor:
    return torch.from_numpy(rows_BT).long()


def kind_sites(kind: AdapterKind, sites: tuple[Site, ...]) -> tuple[Site, ...]:
    """All sites; the few ones for a full-rank kind."""
    if not isinstance(kind, LinearKind):
        return sites
    return tuple(site for site in sites if site.name.endswith(FEW_MODULES))


def merge_seconds(ours: Ours, name: str, bare: str, *, repeats: int) -> Mapping[str, float]:
    """Thread CPU of putting a merged team's weights in place, and of the pristine ones' return.

    `bare`: an unmerged team. Both include a forward pass over two tokens, which is told apart.
    """
    pass_alone = min(_seconds(partial(ours.put_in_place, bare)) for _ in range(repeats))
    pairs = [
        (_seconds(partial(ours.put_in_place, name)), _seconds(partial(ours.put_in_place, bare)))
        for _ in range(repeats)
    ]
    merge, restore = (median(seconds) - pass_alone for seconds in zip(*pairs, strict=True))
    return {"merge_seconds": merge, "restore_seconds": restore, "two_token_pass_seconds": pass_alone}


def _seconds(work: Any) -> float:
    started = time.thread_time()
    work()
    return time.thread_time() - started


def _spec(kind: AdapterKind, sites: tuple[Site, ...]) -> AdapterSpec:
    return AdapterSpec(parts=(AdapterPart(kind=kind, sites=kind_sites(kind, sites)),), seed=0)


def _segment(job_id: str, rows_BT: NDArray[np.int32], gang: Gang | None, prompt: int) -> Segment:
    rows = tuple(_row(row_T, prompt) for row_T in rows_BT)
    return Segment(
        lease=Lease(job_id=job_id, epoch=1, device_id="device"),
        version=0,
        rows=rows,
        loss_denominator=float(sum(row.label_tokens for row in rows)),
        gang=gang,
    )


def _row(tokens_T: NDArray[np.int32], prompt: int = 1) -> Row:
    weights_T = np.ones(len(tokens_T), np.float32)
    weights_T[:prompt] = 0.0
    return Row(tokens=tokens_T, weights=weights_T)


def _run(model: TappedModel, step: BaseStep, *, wait_for_taps: bool = True) -> None:
    taps: deque[Tap] = deque(maxlen=UNSENT_TAPS)  # what a sender that keeps up has sent is freed
    result = model.run(step, taps.append, then=None if wait_for_taps else lambda _result: None)
    assert all(loss.reason is None for loss in result.losses)


def _stock_model(path: Path, dtype: str, attention: str, accelerator: Accelerator) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=getattr(torch, dtype), attn_implementation=attention
    )
    return model.to(accelerator.device).eval()


def _loss(logits_BTV: Tensor, tokens_BT: Tensor, prompt: int = 1) -> Any:
    flat_KV = logits_BTV[:, prompt - 1 : -1].float().flatten(0, 1)
    return cross_entropy(flat_KV, tokens_BT[:, prompt:].flatten())
