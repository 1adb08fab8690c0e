"""What a user of peft would do for many tenants on this machine: one after another, or one process each.

Every tenant has a LoRA of its own on the same base model and its own rows, `rows_per_step` a step. One row is
a batch without padding, several are padded to the longest. The base model is in `dtype`, factors too (peft's
own default, float32, is slower beside bfloat16), the optimizer is torch.optim.AdamW.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from cola_runtime.base_model.accelerator import Accelerator
from cola_runtime.demo.memory import memory_bytes
from cola_runtime.rows import Row
from cola_runtime.testing.peft_reference import padded

START_SECONDS = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftSetting:
    """How peft is run; `threads` and `attention` are to be chosen by `fastest`."""

    model: Path
    dtype: str
    target_modules: tuple[str, ...]
    rank: int
    alpha: float
    learning_rate: float
    rows_per_step: int = 1
    accelerator: str = "cpu"
    threads: int = 1
    attention: str = "eager"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What some tenants' training took, from the first adapter made to the last one saved."""

    tokens: int
    seconds: float
    memory_bytes: int = 0  # proportional set size of the processes at the end; 0 where not asked for

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


Tenants = Sequence[Sequence[Row]]
"""Of every tenant the rows of its steps, as many for each step."""


def fastest(setting: PeftSetting, rows: Sequence[Row], *, trials: int = 2) -> PeftSetting:
    """With the attention and threads (1 or 2; on CUDA 1) that train one tenant fastest, by so many trials."""
    choices = [
        replace(setting, threads=threads, attention=attention)
        for threads in ((1, 2) if setting.accelerator == "cpu" else (1,))
        for attention in ("eager", "sdpa")
    ]
    seconds = {choice: min(_trial_seconds(choice, rows) for _ in range(trials)) for choice in choices}
    return min(choices, key=lambda choice: seconds[choice])


def one_after_another(setting: PeftSetting, tenants: Tenants) -> Trained:
    """Each tenant to its end, then the next: one adapter at a time, so that nothing is switched."""
    torch.set_num_threads(setting.threads)
    base = _base_model(setting)
    with TemporaryDirectory() as folder:
        started = time.perf_counter()
        for number, rows in enumerate(tenants):
            _train_one(base, setting, rows, Path(folder) / str(number))
        _wait(setting)
        return Trained(tokens=_tokens(tenants), seconds=time.perf_counter() - started)


def taking_turns(setting: PeftSetting, tenants: Tenants) -> Trained:
    """All adapters in one model, a step of each in turn, with `set_adapter`: all make progress at once."""
    from peft import get_peft_model

    torch.set_num_threads(setting.threads)
    base, config = _base_model(setting), _lora(setting)
    names = [f"tenant{number}" for number in range(len(tenants))]
    with TemporaryDirectory() as folder:
        started = time.perf_counter()
        model = get_peft_model(base, config, adapter_name=names[0], autocast_adapter_dtype=False).eval()
        for name in names[1:]:
            model.add_adapter(name, config, autocast_adapter_dtype=False)
        optimizers = []
        for name in names:
            model.set_adapter(name)
            optimizers.append(_adamw(model, setting))
        for of_step in zip(*(_steps(setting, rows) for rows in tenants), strict=True):
            for name, optimizer, rows in zip(names, optimizers, of_step, strict=True):
                model.set_adapter(name)
                _step(model, optimizer, rows)
        model.save_pretrained(folder)
        _wait(setting)
        return Trained(tokens=_tokens(tenants), seconds=time.perf_counter() - started)


def process_each(setting: PeftSetting, tenants: Tenants) -> Trained:
    """A process a tenant, all at once; each loads the base model for itself, which is not in the seconds."""
    context = multiprocessing.get_context("spawn")
    on_cpu = setting.accelerator == "cpu"
    threads = max(1, multiprocessing.cpu_count() // len(tenants)) if on_cpu else 1
    barrier = context.Barrier(len(tenants))
    with context.Pool(len(tenants), _set_barrier, (barrier,)) as pool:
        work = [(replace(setting, threads=threads), rows) for rows in tenants]
        begun, ended, kept = zip(*pool.starmap(_train_at_barrier, work, chunksize=1), strict=True)
    return Trained(tokens=_tokens(tenants), seconds=max(ended) - min(begun), memory_bytes=sum(kept))


_barrier: Any = None


def _set_barrier(barrier: Any) -> None:
    global _barrier  # a pool's workers inherit it in no other way
    _barrier = barrier


def _train_at_barrier(setting: PeftSetting, rows: Sequence[Row]) -> tuple[float, float, int]:
    """Begin and end of the training, by the machine's monotonic clock, and this process's memory then.

    A look at the page tables costs CPU that others need, so nobody looks before the end. On CUDA a first
    step is not counted: it loads kernels, which the other ways of training have loaded in their trials.
    """
    torch.set_num_threads(setting.threads)
    base = _base_model(setting)
    with TemporaryDirectory() as folder:
        if setting.accelerator == "cuda":
            _train_one(base, setting, rows[: setting.rows_per_step], Path(folder) / "first")
            _wait(setting)
        _barrier.wait(START_SECONDS)
        begin = time.monotonic()
        _train_one(base, setting, rows, Path(folder) / "adapter")
        _wait(setting)
        end = time.monotonic()
        _barrier.wait(START_SECONDS)
        return begin, end, memory_bytes()


def _train_one(base: Any, setting: PeftSetting, rows: Sequence[Row], folder: Path) -> None:
    """Leaves the base model as it was."""
    from peft import get_peft_model

    model = get_peft_model(base, _lora(setting), autocast_adapter_dtype=False).eval()
    optimizer = _adamw(model, setting)
    for of_step in _steps(setting, rows):
        _step(model, optimizer, of_step)
    model.save_pretrained(folder)
    model.unload()


def _trial_seconds(setting: PeftSetting, rows: Sequence[Row]) -> float:
    """Of one tenant's steps, the model's loading and a first step left out."""
    from peft import get_peft_model

    torch.set_num_threads(setting.threads)
    model = get_peft_model(_base_model(setting), _lora(setting), autocast_adapter_dtype=False).eval()
    optimizer = _adamw(model, setting)
    steps = _steps(setting, rows)
    _step(model, optimizer, steps[0])
    _wait(setting)
    started = time.perf_counter()
    for of_step in steps:
        _step(model, optimizer, of_step)
    _wait(setting)
    return time.perf_counter() - started


def _base_model(setting: PeftSetting) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        setting.model, dtype=getattr(torch, setting.dtype), attn_implementation=setting.attention
    )
    return model.to(Accelerator.of(setting.accelerator).device).eval().requires_grad_(False)


def _lora(setting: PeftSetting) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=setting.rank,
        lora_alpha=setting.alpha,
        target_modules=list(setting.target_modules),
        task_type="CAUSAL_LM",
    )


def _adamw(model: Any, setting: PeftSetting) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=setting.learning_rate, weight_decay=0.0)


def _steps(setting: PeftSetting, rows: Sequence[Row]) -> list[Sequence[Row]]:
    size = setting.rows_per_step
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _step(model: Any, optimizer: torch.optim.Optimizer, rows: Sequence[Row]) -> None:
    loss = step_loss(model, rows)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def step_loss(model: Any, rows: Sequence[Row]) -> Tensor:
    """The mean over all label tokens of the rows, as the runtime's is."""
    if len(rows) > 1:
        return _padded_loss(model, rows)
    [row] = rows
    placed = Accelerator(model.device).placed
    tokens_1T = placed(torch.from_numpy(row.tokens).long()[None])
    labels_K = placed(torch.from_numpy(row.weights[1:]).nonzero().squeeze(1))
    logits_KV = model(input_ids=tokens_1T, use_cache=False).logits[0, labels_K].float()
    return cross_entropy(logits_KV, tokens_1T[0, labels_K + 1])


def _padded_loss(model: Any, rows: Sequence[Row]) -> Tensor:
    tokens_BT, weights_BT, mask_BT = padded(rows)
    found_K = weights_BT.flatten().nonzero().squeeze(1)  # none is a row's first token
    tokens_BT, mask_BT, labels_K = map(Accelerator(model.device).placed, (tokens_BT, mask_BT, found_K))
    logits_BTV = model(input_ids=tokens_BT, attention_mask=mask_BT, use_cache=False).logits
    logits_KV = logits_BTV.flatten(0, 1)[labels_K - 1].float()
    return cross_entropy(logits_KV, tokens_BT.flatten()[labels_K])


def _wait(setting: PeftSetting) -> None:
    """Until everything asked for is computed: before a clock is read."""
    Accelerator.of(setting.accelerator).wait()


def _tokens(tenants: Tenants) -> int:
    return sum(row.length for rows in tenants for row in rows)
