"""Held-out losses of exported PEFT folders, by stock transformers and peft in a process of its own.

    python -m cola_runtime.demo.check BASE_MODEL_FOLDER ADAPTER_FOLDER=HELD_OUT.jsonl ...

Prints one JSON object: adapter folder -> mean loss over label tokens. Shares nothing with a running service.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cola_runtime.data.formats import parse_dataset
from cola_runtime.data.tokenize import Tokenizer
from cola_runtime.rows import Row

MAX_LENGTH = 4096  # the demo's rows are far shorter


def peft_losses(base_folder: Path, pairs: Sequence[tuple[Path, Path]]) -> dict[str, float]:
    """Mean held-out loss of each (adapter folder, JSONL file), in float32, one adapter after the other."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    tokenizer = Tokenizer(base_folder)
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    losses = {}
    for folder, held_out in pairs:
        dataset = parse_dataset(held_out.read_bytes(), file_name=held_out.name)
        rows = tokenizer.tokenize(dataset, max_length=MAX_LENGTH).rows
        model = PeftModel.from_pretrained(base, folder).eval()
        with torch.no_grad():
            losses[str(folder)] = _mean_loss(model, rows)
        base = model.unload()
    return losses


def _mean_loss(model: Any, rows: Sequence[Row]) -> float:
    sums = [_row_loss(model, row) for row in rows]
    return sum(loss for loss, _ in sums) / sum(weight for _, weight in sums)


def _row_loss(model: Any, row: Row) -> tuple[float, float]:
    """Sum of weighted cross-entropies and of weights, of one row alone: no padding."""
    import torch
    from torch.nn.functional import cross_entropy

    tokens = torch.from_numpy(row.tokens).long()
    weights = torch.from_numpy(row.weights)[1:]
    logits = model(input_ids=tokens[None], use_cache=False).logits[0, :-1]
    losses = cross_entropy(logits, tokens[1:], reduction="none")
    return float((weights * losses).sum()), float(weights.sum())


def main(arguments: Sequence[str]) -> None:
    base_folder, *pairs = arguments
    split = [pair.split("=", 1) for pair in pairs]
    print(json.dumps(peft_losses(Path(base_folder), [(Path(a), Path(b)) for a, b in split])))


if __name__ == "__main__":
    main(sys.argv[1:])
