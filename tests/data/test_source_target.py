"""Prompt and completion become the source and the labels that transformers' own classes make of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    MBart50Tokenizer,
    MBartTokenizer,
    NllbTokenizer,
    T5Tokenizer,
)

from cola_runtime.data.formats import Dataset, parse_dataset
from cola_runtime.data.tokenize import Tokenizer
from cola_runtime.errors import InvalidInput
from cola_runtime.task_spec import SequenceToSequenceTask
from cola_runtime.testing.tiny_encoder_decoders import framing_tokenizer

TASK = SequenceToSequenceTask()
PIECES = ["▁", *"abcdehilnoprstv", "▁the", "▁river", "▁a"]
RECORDS = [("the river", "a stone"), ("  river ", "the\nother  one"), ("ü", "rivers are there, in the plain")]
START = 7
ROMANIAN = {"src_lang": "en_XX", "tgt_lang": "ro_RO"}


def t5() -> Any:
    scored = [(piece, -float(place)) for place, piece in enumerate(["<pad>", "</s>", "<unk>", *PIECES])]
    return T5Tokenizer(vocab=scored, extra_ids=2)


def mbart(made: Any) -> Any:
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    return made(vocab=[(piece, -float(n)) for n, piece in enumerate([*special, *PIECES])], **ROMANIAN)


def nllb() -> Any:
    pieces = ["<s>", "<pad>", "</s>", "<unk>", *PIECES]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    return NllbTokenizer(vocab=vocabulary, merges=[], src_lang="eng_Latn", tgt_lang="fra_Latn")


MADE = {
    "t5": (t5, "t5"),
    "byte t5": (lambda: framing_tokenizer("t5"), "t5"),
    "bart": (lambda: framing_tokenizer("bart"), "bart"),
    "mbart": (lambda: mbart(MBartTokenizer), "mbart"),
    "mbart50": (lambda: mbart(MBart50Tokenizer), "mbart"),
    "nllb": (nllb, "m2m_100"),
}


def save(name: str, folder: Path, **config: Any) -> Path:
    make, model_type = MADE[name]
    make().save_pretrained(folder)
    fields = {"model_type": model_type, "decoder_start_token_id": START, **config}
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def dataset(records: list[tuple[str, str]]) -> Dataset:
    lines = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in records]
    return parse_dataset("\n".join(lines).encode(), file_name="data.jsonl")


def stock_ids(folder: Path, prompt: str, completion: str, **cut: Any) -> tuple[list[int], list[int]]:
    """Source and labels."""
    stock = AutoTokenizer.from_pretrained(folder)
    source = stock(prompt, max_length=cut["max_length"] + 1, truncation=True) if cut else stock(prompt)
    return source["input_ids"], stock(text_target=completion, truncation=bool(cut), **cut)["input_ids"]


def shifted(model_type: str, labels: list[int]) -> list[int]:
    """What the stock model of that type feeds its decoder for these labels."""
    sizes = {"d_model": 8, "num_layers": 1, "num_heads": 1, "d_ff": 8, "d_kv": 8, "encoder_layers": 1}
    sizes |= {"decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "max_position_embeddings": 64}
    heads = {"encoder_attention_heads": 1, "decoder_attention_heads": 1, "pad_token_id": 1}
    config = AutoConfig.for_model(model_type, vocab_size=300, decoder_start_token_id=START, **sizes, **heads)
    with torch.random.fork_rng():
        model = AutoModelForSeq2SeqLM.from_config(config)
    fed: list[int] = []
    model.get_decoder().register_forward_pre_hook(
        lambda _module, _args, inputs: fed.extend(inputs["input_ids"][0].tolist()), with_kwargs=True
    )
    model(input_ids=torch.tensor([labels]), labels=torch.tensor([labels]))
    return fed


@pytest.mark.parametrize("name", MADE)
def test_rows_are_transformers_inputs_and_labels(name: str, tmp_path: Path) -> None:
    folder = save(name, tmp_path)
    tokenized = Tokenizer(folder, encoder_decoder=True).tokenize(dataset(RECORDS), max_length=256, task=TASK)
    for row, (prompt, completion) in zip(tokenized.rows, RECORDS, strict=True):
        source, labels = stock_ids(folder, prompt, completion)
        assert row.source is not None and row.source.tolist() == source
        assert row.tokens[1:].tolist() == labels
        assert row.weights.tolist() == [0.0, *[1.0] * len(labels)]
        assert row.length == len(source) + 1 + len(labels)
    first = tokenized.rows[0].tokens.tolist()
    assert shifted(MADE[name][1], first[1:]) == first[:-1]


@pytest.mark.parametrize("name", ["t5", "bart", "nllb"])
def test_too_long_texts_lose_their_end_and_keep_their_frame(name: str, tmp_path: Path) -> None:
    folder = save(name, tmp_path)
    tokenizer = Tokenizer(folder, encoder_decoder=True)
    found = tokenizer.tokenize(dataset(RECORDS), max_length=8, truncate=True, task=TASK)
    assert found.truncated_rows > 0
    for row, (prompt, completion) in zip(found.rows, RECORDS, strict=True):
        source, labels = stock_ids(folder, prompt, completion, max_length=7)
        assert row.source is not None
        assert (row.source.tolist(), row.tokens[1:].tolist()) == (source, labels)


def test_a_row_that_is_too_long_is_named_with_its_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer(save("bart", tmp_path), encoder_decoder=True)
    fits, prompt, completion = ("aaa", "bb"), ("a" * 4, "b"), ("a", "bbb")
    for record, told in ((prompt, "the prompt has 6 tokens, 5 tokens"), (completion, "the completion has 6")):
        with pytest.raises(InvalidInput) as caught:
            tokenizer.tokenize(dataset([fits, record]), max_length=5, task=TASK)
        assert (caught.value.reason, caught.value.where) == ("ROW_TOO_LONG", "data.jsonl:2:1")
        assert told in str(caught.value)
    with pytest.raises(InvalidInput) as caught:  # a frame, a start and one token do not fit
        tokenizer.tokenize(dataset([fits]), max_length=3, truncate=True, task=TASK)
    assert caught.value.reason == "ROW_TOO_LONG"


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_the_spelling_of_a_special_token_is_text(name: str, tmp_path: Path) -> None:
    folder = save(name, tmp_path)
    tokenizer = Tokenizer(folder, encoder_decoder=True)
    end = AutoTokenizer.from_pretrained(folder).eos_token_id
    found = tokenizer.tokenize(dataset([("the </s> river", "a</s>")]), max_length=256, task=TASK)
    assert found.literal_markup_rows == 1
    assert found.rows[0].tokens.tolist().count(end) == 1
    assert tokenizer.encode_prompt("the </s> river").count(end) == 1


def test_a_prompt_is_a_source_and_what_ends_an_answer_is_known(tmp_path: Path) -> None:
    folder = save("bart", tmp_path)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 9], "decoder_start_token_id": 3}')
    tokenizer = Tokenizer(folder, encoder_decoder=True)
    source = stock_ids(folder, "the river", "x")[0]
    assert tokenizer.encode_prompt("the river") == source
    assert tokenizer.decode(source) == "the river"
    assert tokenizer.stop_ids == (2, 9)


def test_the_start_may_stand_in_the_generation_settings_and_must_stand_somewhere(tmp_path: Path) -> None:
    folder = save("bart", tmp_path, decoder_start_token_id=None)
    with pytest.raises(InvalidInput) as caught:
        Tokenizer(folder, encoder_decoder=True)
    assert caught.value.reason == "TOKENIZER_UNSUPPORTED" and "decoder_start_token_id" in str(caught.value)
    (folder / "generation_config.json").write_text('{"decoder_start_token_id": 3}')
    [row] = (
        Tokenizer(folder, encoder_decoder=True).tokenize(dataset([("a", "b")]), max_length=8, task=TASK).rows
    )
    assert row.tokens[0] == 3


def test_reading_sources_and_targets_does_not_import_torch(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from cola_runtime.data.tokenize import Tokenizer\n"
        "Tokenizer(sys.argv[1], encoder_decoder=True).encode_prompt('the river')\n"
        "assert 'torch' not in sys.modules"
    )
    folder = save("mbart", tmp_path)
    subprocess.run([sys.executable, "-c", program, str(folder)], check=True, timeout=60)
