"""What a timed trial chose, kept on the machine: a base model that starts again computes as it did before.

Implementations of attention differ in their sums' last digits. A trial under another load may end otherwise;
a job that lost its base model in the middle would then end with other bits than one that did not.
"""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

import torch

from cola_runtime.base_model.load import ATTENTIONS

logger = logging.getLogger(__name__)


class KeptAttention:
    """The choice for one base model, dtype and accelerator with this torch, as a file in `cache_dir`."""

    def __init__(self, cache_dir: Path, model: Path, *, dtype: str, accelerator: str) -> None:
        named = "\n".join((str(model.resolve()), dtype, accelerator, torch.__version__))
        self._file = cache_dir / f"attention-{hashlib.sha256(named.encode()).hexdigest()[:16]}"

    def instead_of(self, asked: str) -> str:
        """What was kept, where `auto` is asked for and something was."""
        if asked != "auto":
            return asked
        try:
            kept = self._file.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError):
            return asked
        return kept if kept in ATTENTIONS else asked

    def keep(self, chosen: str | None) -> None:
        """A folder that cannot be written keeps nothing: then each start tries anew."""
        if chosen not in ATTENTIONS:
            return
        fresh = self._file.with_name(f"{self._file.name}.{os.getpid()}")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            fresh.write_text(chosen, encoding="ascii")
            fresh.replace(self._file)
        except OSError as error:
            logger.warning("attention's trial is not kept: %s", error, extra={"event": "base.trial_not_kept"})
