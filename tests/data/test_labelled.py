"""Labelled records become rows as transformers would frame them; a wrong label is named with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from cola_runtime.data.formats import Dataset, DatasetFormat, parse_dataset
from cola_runtime.data.tokenize import Tokenizer
from cola_runtime.errors import InvalidInput
from cola_runtime.task_spec import CausalLmTask, ClassificationTask, RegressionTask
from cola_runtime.testing.tiny_models import BOS, EOS, byte_tokenizer

SENTIMENT = ClassificationTask(labels=("negative", "neutral", "positive"))
THREE = ClassificationTask(labels=3)
PAIR = {"text": "is it so", "text_pair": "it is, indeed", "label": 1}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for kind in ("bert", "roberta", "gpt2"):
        made[kind] = tmp_path_factory.mktemp(kind)
        byte_tokenizer(kind).save_pretrained(made[kind])
    return made


def dataset(*records: dict[str, Any]) -> Dataset:
    return parse_dataset("\n".join(map(json.dumps, records)).encode(), file_name="data.jsonl")


def refused(
    folder: Path, records: list[dict[str, Any]], task: Any = SENTIMENT, **options: Any
) -> InvalidInput:
    tokenizer = Tokenizer(folder, bidirectional=True)
    with pytest.raises(InvalidInput) as caught:
        tokenizer.tokenize(dataset(*records), max_length=64, task=task, **options)
    return caught.value


def test_labels_are_classes_by_name_or_number_and_values(folders: dict[str, Path]) -> None:
    tokenizer = Tokenizer(folders["bert"], bidirectional=True)
    for labels, task, expected in (
        (["positive", 0, "neutral"], SENTIMENT, [2, 0, 1]),
        ([2, 0], THREE, [2, 0]),
        ([0.25, -3, 1e30], RegressionTask(), [0.25, -3.0, 1e30]),
    ):
        data = dataset(*({"text": "x", "label": label} for label in labels))
        assert data.format is DatasetFormat.LABELLED
        rows = tokenizer.tokenize(data, max_length=64, task=task).rows
        assert [row.label for row in rows] == expected
        assert [(row.loss_weight, row.label_tokens, len(row.weights)) for row in rows] == [(1.0, 1, 0)] * len(
            rows
        )


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize("max_length", [64, 15])
def test_an_encoders_rows_are_framed_and_cut_as_transformers_does(
    folders: dict[str, Path], kind: str, max_length: int
) -> None:
    stock = PreTrainedTokenizerFast.from_pretrained(folders[kind])
    records = [PAIR, {"text": "just one text of some length", "label": 0}, {"text": "ü", "label": 2}]
    found = Tokenizer(folders[kind], bidirectional=True).tokenize(
        dataset(*records), max_length=max_length, truncate=True, task=THREE
    )
    for record, row in zip(records, found.rows, strict=True):
        expected = stock(
            record["text"],
            record.get("text_pair"),
            truncation="longest_first",
            max_length=max_length,
            return_token_type_ids=True,
        )
        assert row.tokens.tolist() == expected["input_ids"]
        types = np.zeros(len(row.tokens)) if row.token_types is None else row.token_types
        assert types.tolist() == expected["token_type_ids"]
    assert (found.rows[0].token_types is None) == (kind == "roberta")
    assert found.truncated_rows == (2 if max_length == 15 else 0)


def test_a_decoders_rows_are_plain_texts_and_their_end(folders: dict[str, Path]) -> None:
    tokenizer = Tokenizer(folders["gpt2"])
    rows = tokenizer.tokenize(dataset(PAIR, {"text": "one", "label": 0}), max_length=64, task=THREE).rows
    spelled = [byte_tokenizer().decode(row.tokens.tolist()) for row in rows]
    assert spelled == [f"is it so\nit is, indeed{EOS}", f"one{EOS}"]
    (cut,) = tokenizer.tokenize(dataset(PAIR), max_length=6, truncate=True, task=THREE).rows
    assert byte_tokenizer().decode(cut.tokens.tolist()) == f"is it{EOS}"


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_special_token_spelled_in_a_text_is_text(folders: dict[str, Path], kind: str) -> None:
    tokenizer = Tokenizer(folders[kind], bidirectional=kind == "bert")
    found = tokenizer.tokenize(dataset({"text": f"a{EOS}{BOS}b", "label": 0}), max_length=64, task=THREE)
    eos = byte_tokenizer().eos_token_id
    assert found.rows[0].tokens.tolist().count(eos) == 1
    assert found.literal_markup_rows == 1


@pytest.mark.parametrize(
    ("label", "task", "reason", "part"),
    [
        ("positiv", SENTIMENT, "LABEL_UNKNOWN", "did you mean 'positive'"),
        ("?", SENTIMENT, "LABEL_UNKNOWN", "known: negative, neutral, positive"),
        (3, SENTIMENT, "LABEL_OUT_OF_RANGE", "class 3 is not from 0 to 2"),
        (-1, THREE, "LABEL_OUT_OF_RANGE", "class -1"),
        (10**400, THREE, "LABEL_OUT_OF_RANGE", "not from 0 to 2"),
        ("positive", THREE, "LABEL_INVALID", "'positive' is not a whole number"),
        (1.5, THREE, "LABEL_INVALID", "1.5 is not a whole number"),
        (1.0, SENTIMENT, "LABEL_INVALID", "1.0 is not a name or a whole number"),
        ("high", RegressionTask(), "LABEL_INVALID", "'high' is not a number"),
        (1e39, RegressionTask(), "LABEL_OUT_OF_RANGE", "too large"),
        (-(10**400), RegressionTask(), "LABEL_OUT_OF_RANGE", "too large"),
    ],
)
def test_a_label_that_the_task_does_not_have_is_named_with_its_line(
    folders: dict[str, Path], label: object, task: Any, reason: str, part: str
) -> None:
    good = {"text": "fine", "label": 0}
    error = refused(folders["bert"], [good, good, {"text": "x", "label": label}, good], task)
    assert (error.reason, error.where) == (reason, "data.jsonl:3:1")
    assert part in str(error)


@pytest.mark.parametrize(
    ("line", "reason", "part"),
    [
        (b'{"text": "a", "label": NaN}', "DATASET_JSON", "NaN is not JSON"),
        (b'{"text": "a", "label": 1e999}', "DATASET_RECORD", "label: the number is too large"),
        (b'{"text": "a", "label": true}', "DATASET_RECORD", "label: expected a string or a number, got true"),
        (b'{"text": "a", "label": null}', "DATASET_RECORD", "got null"),
        (b'{"text": "a", "text_pair": "b"}', "DATASET_RECORD", "label: missing"),
        (b'{"text": "a", "text_pair": " ", "label": 1}', "DATASET_RECORD", "text_pair: is empty"),
        (b'{"text": "a", "lable": 1}', "DATASET_RECORD", "did you mean 'label'"),
        (b'{"label": 1}', "DATASET_RECORD", "text: missing"),
        (b'{"text": "a"}', "DATASET_RECORD", "a text record, but line 1 is a labelled record"),
    ],
)
def test_a_record_that_is_not_labelled_right_is_named(line: bytes, reason: str, part: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_dataset(b'{"text": "a", "label": 1}\n' + line, file_name="data.jsonl")
    assert caught.value.reason == reason
    assert (caught.value.where or "").startswith("data.jsonl:2:")
    assert part in str(caught.value)


def test_data_of_another_task_are_refused(folders: dict[str, Path]) -> None:
    assert refused(folders["bert"], [{"text": "a"}]).reason == "TASK_FORMAT"
    labelled = [{"text": "a", "label": 0}]
    error = refused(folders["bert"], labelled, CausalLmTask())
    assert (error.reason, error.where) == ("TASK_FORMAT", "data.jsonl")
    assert "labelled" in str(error)


def test_a_long_row_is_refused_unless_it_may_be_cut_and_some_text_is_left(folders: dict[str, Path]) -> None:
    long = {"text": "a" * 80, "label": 0}
    error = refused(folders["bert"], [{"text": "a", "label": 0}, long])
    assert (error.reason, error.where) == ("ROW_TOO_LONG", "data.jsonl:2:1")
    assert "82 tokens" in str(error)
    for kind in ("bert", "gpt2"):
        tokenizer = Tokenizer(folders[kind], bidirectional=kind == "bert")
        with pytest.raises(InvalidInput) as caught:
            tokenizer.tokenize(
                dataset(long), max_length=2 if kind == "bert" else 1, truncate=True, task=THREE
            )
        assert caught.value.reason == "ROW_TOO_LONG"


def test_an_encoder_without_special_tokens_is_refused_and_it_continues_nothing(
    folders: dict[str, Path],
) -> None:
    with pytest.raises(InvalidInput, match="no special tokens"):
        Tokenizer(folders["gpt2"], bidirectional=True)
    with pytest.raises(InvalidInput) as caught:
        Tokenizer(folders["bert"], bidirectional=True).encode_prompt("hello")
    assert caught.value.reason == "TASK_UNSUPPORTED"
