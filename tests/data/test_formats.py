from __future__ import annotations

import contextlib
import io
import json
import tarfile
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cola_runtime.data import formats
from cola_runtime.data.formats import Dataset, DatasetFormat, parse_dataset
from cola_runtime.data.records import ChatRecord, CompletionRecord, Message, TextRecord, read_prompt_messages
from cola_runtime.errors import InvalidInput

GOOD = b'{"text": "a"}\n'


def refused(content: bytes) -> InvalidInput:
    with pytest.raises(InvalidInput) as caught:
        parse_dataset(content, file_name="data.jsonl")
    return caught.value


def chat(*turns: object, **more: object) -> bytes:
    return json.dumps({"messages": list(turns), **more}).encode()


def turn(role: str, content: object = "x", **more: object) -> dict[str, object]:
    return {"role": role, "content": content, **more}


def test_chat_records() -> None:
    line = chat(turn("system", "be kind"), turn("user", "hi"), turn("assistant", "hello"))
    dataset = parse_dataset(line, file_name="data.jsonl")
    messages = (
        Message(role="system", content="be kind"),
        Message(role="user", content="hi"),
        Message(role="assistant", content="hello"),
    )
    assert dataset == Dataset(
        file_name="data.jsonl",
        format=DatasetFormat.CHAT,
        records=(ChatRecord(line=1, messages=messages),),
    )


def test_prompt_and_completion_and_text_records() -> None:
    pairs = parse_dataset(b'{"completion": "c", "prompt": "p"}', file_name="x")
    assert (pairs.format, pairs.records) == (
        "prompt_completion",
        (CompletionRecord(line=1, prompt="p", completion="c"),),
    )
    texts = parse_dataset(GOOD, file_name="x")
    assert (texts.format, texts.records) == ("text", (TextRecord(line=1, text="a"),))


@pytest.mark.parametrize(
    "content",
    [
        b'{"text": "a"}\n\n \t\n{"text": "b"}\n',
        b'{"text": "a"}\r\n\r\n  \r\n{"text": "b"}\r\n',
        b'\xef\xbb\xbf{"text": "a"}\n\n\n{"text": "b"}',
    ],
    ids=["blank lines", "CRLF", "BOM and no final newline"],
)
def test_harmless_differences_are_accepted_and_blank_lines_counted(content: bytes) -> None:
    dataset = parse_dataset(content, file_name="x")
    assert dataset.records == (TextRecord(line=1, text="a"), TextRecord(line=4, text="b"))


def test_line_separators_inside_a_string_do_not_end_a_line() -> None:
    text = "a\u2028b\u0085c\x0bd"
    content = json.dumps({"text": text}, ensure_ascii=False).replace("\x0b", "\\u000b").encode()
    (record,) = parse_dataset(content, file_name="x").records
    assert record == TextRecord(line=1, text=text)


@pytest.mark.parametrize("content", [b"", b"\n", b" \r\n\t\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"])
def test_a_file_without_records_is_empty(content: bytes) -> None:
    assert refused(content).reason == "DATASET_EMPTY"


def test_broken_json_is_named_with_line_and_column() -> None:
    content = GOOD * 117 + b'{"text": "abc", "other": }\n' + GOOD + b"{\n" * 3
    error = refused(content)
    assert error.reason == "DATASET_JSON"
    assert error.where == "data.jsonl:118:26"
    assert str(error).startswith("data.jsonl:118:26: invalid JSON: Expecting value; 3 more lines have errors")
    assert [violation.where for violation in error.violations] == [
        "data.jsonl:118:26",
        "data.jsonl:120:2",
        "data.jsonl:121:2",
        "data.jsonl:122:2",
    ]


def test_the_first_twenty_errors_are_listed_and_all_counted() -> None:
    error = refused(GOOD + b"nonsense\n" * 50)
    assert len(error.violations) == 20
    assert error.violations[-1].where == "data.jsonl:21:1"
    assert "49 more lines have errors" in error.message


def test_one_more_error_is_singular() -> None:
    assert refused(b"x\ny\n").message.endswith("; 1 more line has an error")
    assert ";" not in refused(b"x\n").message


@pytest.mark.parametrize(
    ("line", "column", "part"),
    [
        (b'{"text": NaN}', 10, "NaN is not JSON"),
        (b'{"text": "NaN", "x": -Infinity}', 22, "-Infinity is not JSON"),
        (b'{"text": "a", "text": "b"}', 15, "key 'text' occurs twice"),
        (b'{"a":' * 100_000, 1, "nested too deep"),
        (b'{"text": 1' + b"0" * 5000 + b"}", 1, "too many digits"),
        (b'{"text": "a"} trailing', 15, "Extra data"),
        (b"{'text': 'a'}", 2, "double quotes"),
    ],
    ids=["NaN", "Infinity", "duplicate key", "deep", "long number", "trailing", "single quotes"],
)
def test_json_that_is_not_strict_is_refused(line: bytes, column: int, part: str) -> None:
    error = refused(GOOD + line)
    assert (error.reason, error.where) == ("DATASET_JSON", f"data.jsonl:2:{column}")
    assert part in error.message


def test_a_byte_that_is_not_utf8_is_named_with_line_and_offset() -> None:
    error = refused(GOOD + '{"text": "é'.encode() + b'\xff"}\n')
    assert (error.reason, error.where) == ("DATASET_UTF8", "data.jsonl:2:12")
    assert "byte 0xff at offset 12" in error.message


def test_a_long_line_is_named_with_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "MAX_LINE_BYTES", 13)
    parse_dataset(b'{"text":"abc"}'[:-1].replace(b"c", b"") + b"}\r\n", file_name="x")
    error = refused(GOOD + b'{"text": "abc"}\n')
    assert (error.reason, error.where) == ("DATASET_LINE_TOO_LONG", "data.jsonl:2:1")
    assert (error.limit, error.actual) == ("13 bytes", "15 bytes")


def test_limits_of_bytes_and_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "MAX_ROWS", 2)
    parse_dataset(GOOD * 2, file_name="x")
    assert refused(GOOD * 3).reason == "DATASET_TOO_MANY_ROWS"
    monkeypatch.setattr(formats, "MAX_DATASET_BYTES", 27)
    error = refused(GOOD * 2)
    assert (error.reason, error.limit, error.actual) == ("DATASET_TOO_LARGE", "27 bytes", "28 bytes")


def _archive(kind: str) -> bytes:
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("data.jsonl", GOOD)
    else:
        with tarfile.open(fileobj=buffer, mode=f"w:{kind.removeprefix('tar')}") as archive:
            archive.addfile(tarfile.TarInfo("data.jsonl"), io.BytesIO(GOOD))
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["zip", "tar", "targz", "tarbz2", "tarxz"])
def test_archives_are_refused(kind: str) -> None:
    assert refused(_archive(kind)).reason == "DATASET_FORMAT"


@pytest.mark.parametrize("content", [b"PAR1" + b"\0" * 50, b"ARROW1\0\0", '{"text": "a"}'.encode("utf-16")])
def test_other_formats_are_refused(content: bytes) -> None:
    assert refused(content).reason == "DATASET_FORMAT"


def test_one_json_array_is_explained() -> None:
    error = refused(b' [\n {"text": "a"},\n {"text": "b"}\n]')
    assert error.reason == "DATASET_FORMAT"
    assert "one JSON array" in error.message


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"3", "a record is an object"),
        (b"{}", "text: missing"),
        (b'{"mesages": []}', "mesages: unknown field; did you mean 'messages'?"),
        (b'{"prompt": "a", "complettion": "b"}', "complettion: unknown field; did you mean 'completion'?"),
        (b'{"prompt": "a"}', "completion: missing"),
        (b'{"completion": "a"}', "prompt: missing"),
        (b'{"text": 3}', "text: expected a string, got a number"),
        (b'{"text": " \\n"}', "text: is empty"),
        (b'{"text": "\\ud800"}', "text: an escape"),
        (b'{"messages": {}}', "messages: expected a list of messages, got an object"),
        (b'{"messages": []}', "messages: expected a list of messages, got an empty list"),
        (chat(turn("user")), "messages: there is no assistant turn"),
        (chat(turn("user"), turn("assistant"), more=1), "more: unknown field"),
        (chat(turn("user"), "hi"), "messages[1]: expected an object with role and content, got a string"),
        (chat(turn("user"), turn("asistant")), "messages[1].role: 'asistant' is none of"),
        (chat(turn("user"), turn("tool")), "messages[1].role: 'tool' is none of"),
        (chat(turn("user"), {"role": "assistant"}), "messages[1].content: missing"),
        (chat(turn("user"), turn("assistant", None)), "messages[1].content: expected a string, got null"),
        (chat(turn("user"), turn("assistant", "")), "messages[1].content: is empty"),
        (chat(turn("user", [{"type": "text"}])), "messages[0].content: expected a string, got a list"),
        (chat(turn("user"), turn("assistant", tool_calls=[])), "messages[1].tool_calls: unknown field"),
        (chat(turn("user"), turn("system"), turn("assistant")), "messages[1].role: a system message"),
        (chat(turn("assistant"), turn("user")), "messages[0].role: a user turn comes before"),
        (chat(turn("system"), turn("assistant")), "messages[1].role: a user turn comes before"),
        (chat(*[turn("user")] * 1025), "messages: more than 1024"),
    ],
)
def test_a_wrong_record_is_named_with_its_path(line: bytes, message: str) -> None:
    error = refused(b"\n" + line)
    assert (error.reason, error.where) == ("DATASET_RECORD", "data.jsonl:2:1")
    assert error.message.startswith(message)


def test_repeated_user_and_assistant_turns_are_accepted() -> None:
    line = chat(turn("user"), turn("user"), turn("assistant"), turn("assistant"), turn("user"))
    assert len(parse_dataset(line, file_name="x").records) == 1


def test_formats_do_not_mix() -> None:
    error = refused(b"\n" + GOOD + b'{"prompt": "a", "completion": "b"}\n')
    assert (error.reason, error.where) == ("DATASET_RECORD", "data.jsonl:3:1")
    assert error.message == "a prompt_completion record, but line 2 is a text record"


def test_messages_of_a_prompt_need_no_answer() -> None:
    assert read_prompt_messages([turn("user", "hi")]) == (Message(role="user", content="hi"),)
    with pytest.raises(InvalidInput, match=r"messages\[0\].role") as caught:
        read_prompt_messages([turn("robot", "hi")])
    assert caught.value.reason == "MESSAGES_INVALID"


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.binary(max_size=60)
    | st.text(alphabet='{}[]":,\\ntrue u0d8\r\n\ufeffé\ud7ff', max_size=60).map(str.encode)
)
def test_any_bytes_are_either_records_or_a_named_error(content: bytes) -> None:
    with contextlib.suppress(InvalidInput):
        assert parse_dataset(content, file_name="data.jsonl").records
