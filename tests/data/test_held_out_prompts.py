"""How many prompts may be answered at each evaluation."""

from __future__ import annotations

import pytest

from cola_runtime.data import held_out
from cola_runtime.data.formats import parse_dataset
from cola_runtime.errors import InvalidInput


def test_more_prompts_than_an_evaluation_answers_are_refused() -> None:
    line = b'{"prompt": "a", "completion": "b"}\n'
    held_out._check(parse_dataset(line * held_out.MAX_PROMPTS, file_name="held.jsonl"))
    with pytest.raises(InvalidInput) as caught:
        held_out._check(parse_dataset(line * (held_out.MAX_PROMPTS + 1), file_name="held.jsonl"))
    assert (caught.value.reason, caught.value.where) == ("TOO_MANY_PROMPTS", "held.jsonl")
    assert (caught.value.limit, caught.value.actual) == ("1024", "1025")
