"""A base model that starts again computes with the attention that its first trial chose."""

from __future__ import annotations

from pathlib import Path

import pytest

from cola_runtime.base_model import load
from cola_runtime.base_model.kept_choice import KeptAttention
from cola_runtime.config import BaseModelSettings, HostSettings
from cola_runtime.runtime.actors import BaseModelActor
from cola_runtime.testing.tiny_models import save_tiny_model


def kept_in(folder: Path, *, dtype: str = "float32") -> KeptAttention:
    return KeptAttention(folder, folder / "model", dtype=dtype, accelerator="cpu")


def test_a_choice_is_kept_for_who_asks_for_auto_and_for_that_model_and_dtype_only(tmp_path: Path) -> None:
    kept_in(tmp_path).keep("eager")
    assert kept_in(tmp_path).instead_of("auto") == "eager"
    assert kept_in(tmp_path).instead_of("sdpa") == "sdpa"
    assert kept_in(tmp_path, dtype="bfloat16").instead_of("auto") == "auto"


def test_what_is_no_choice_is_neither_kept_nor_taken(tmp_path: Path) -> None:
    kept_in(tmp_path).keep(None)
    assert list(tmp_path.iterdir()) == []
    kept_in(tmp_path).keep("sdpa")
    (file,) = tmp_path.iterdir()
    file.write_bytes(b"\xff nonsense")
    assert kept_in(tmp_path).instead_of("auto") == "auto"
    (tmp_path / "file").touch()
    kept_in(tmp_path / "file").keep("sdpa")  # no folder to keep it in


async def test_a_second_start_takes_the_first_ones_attention_whatever_is_faster_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny_model("gpt2", tmp_path / "model")

    async def started(faster: str) -> str:
        monkeypatch.setattr(load, "_trial_seconds", lambda _, name, *rest: 1.0 if name == faster else 2.0)
        settings = BaseModelSettings(name="tiny", path=model)
        actor = BaseModelActor(settings, tmp_path / "cache", "token", (), hosts=HostSettings())
        return (await actor._service.describe()).details["attention"]

    assert [await started("eager"), await started("sdpa")] == ["eager", "eager"]
