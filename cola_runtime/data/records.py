"""The kinds of records, and the check of one parsed line against them."""

from __future__ import annotations

import base64
import difflib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from cola_runtime.data.violations import Problem
from cola_runtime.errors import InvalidInput

MAX_MESSAGES = 1024
ROLES = ("system", "user", "assistant")

_SHAPES = (
    '{"messages": [...]}, {"prompt": ..., "completion": ...}, {"text": ...}, {"text": ..., "label": ...}, '
    '{"image": ..., "label": ...}'
)
_KNOWN_FIELDS = ("messages", "prompt", "completion", "text", "text_pair", "image", "label")


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a conversation."""

    role: str  # "system", "user" or "assistant"
    content: str  # never blank


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRecord:
    """A conversation with at least one assistant turn; a system message can only be the first."""

    line: int  # in the file, from 1
    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRecord:
    """A prompt and what should follow it, joined without anything between."""

    line: int
    prompt: str
    completion: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRecord:
    """Plain text, trained on as it is."""

    line: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledRecord:
    """A text, or a pair of texts, and what is to be told of it."""

    line: int
    text: str
    text_pair: str | None
    label: str | int | float  # as written; finite

    @property
    def texts(self) -> tuple[str, ...]:
        return (self.text,) if self.text_pair is None else (self.text, self.text_pair)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageRecord:
    """An image, and what is to be told of it."""

    line: int
    image: bytes  # PNG or JPEG, not looked into yet
    label: str | int | float  # as written; finite


Record = ChatRecord | CompletionRecord | TextRecord | LabelledRecord | ImageRecord


def read_record(value: Any, *, line: int) -> Record:
    """The record that a line holds. Raises Problem `DATASET_RECORD` with the path of what is wrong."""
    if not isinstance(value, dict):
        raise _wrong(f"a record is an object {_SHAPES}, not {_kind(value)}")
    if "messages" in value:
        _check_fields(value, ("messages",), path="")
        messages = _messages(value["messages"])
        if all(message.role != "assistant" for message in messages):
            raise _wrong("messages: there is no assistant turn to learn from")
        return ChatRecord(line=line, messages=messages)
    if "prompt" in value or "completion" in value:
        _check_fields(value, ("prompt", "completion"), path="")
        prompt, completion = (_text(value, field, path="") for field in ("prompt", "completion"))
        return CompletionRecord(line=line, prompt=prompt, completion=completion)
    if "image" in value:
        _check_fields(value, ("image", "label"), path="", known=_KNOWN_FIELDS)
        return ImageRecord(line=line, image=_image(value), label=_label(value))
    if "label" in value or "text_pair" in value:
        return _labelled(value, line)
    _check_fields(value, ("text",), path="", known=_KNOWN_FIELDS)
    return TextRecord(line=line, text=_text(value, "text", path=""))


def _labelled(value: Mapping[str, Any], line: int) -> LabelledRecord:
    texts = ("text", "text_pair") if "text_pair" in value else ("text",)
    _check_fields(value, (*texts, "label"), path="", known=_KNOWN_FIELDS)
    text, pair = (_text(value, field, path="") if field in texts else None for field in ("text", "text_pair"))
    assert text is not None
    return LabelledRecord(line=line, text=text, text_pair=pair, label=_label(value))


def _label(value: Mapping[str, Any]) -> str | int | float:
    label: Any = value["label"]
    if isinstance(label, bool) or not isinstance(label, str | int | float):
        raise _wrong(f"label: expected a string or a number, got {_kind(label)}")
    if isinstance(label, float) and not math.isfinite(label):
        raise _wrong("label: the number is too large")
    return label


def _image(value: Mapping[str, Any]) -> bytes:
    """Its bytes. An address is not fetched, a path not read."""
    text = _text(value, "image", path="")
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise _wrong("image: expected the bytes of a PNG or JPEG in base64 and nothing else") from error


def read_prompt_messages(value: Any) -> tuple[Message, ...]:
    """Messages to answer, checked as in a dataset. Raises InvalidInput `MESSAGES_INVALID`."""
    try:
        return _messages(value)
    except Problem as problem:
        raise InvalidInput("MESSAGES_INVALID", problem.message) from problem


def _messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise _wrong(f"messages: expected a list of messages, got {_kind(value)}")
    if len(value) > MAX_MESSAGES:
        raise _wrong(f"messages: more than {MAX_MESSAGES} messages in one conversation")
    messages = tuple(_message(each, path=f"messages[{index}]") for index, each in enumerate(value))
    _check_order([message.role for message in messages])
    return messages


def _message(value: Any, *, path: str) -> Message:
    if not isinstance(value, dict):
        raise _wrong(f"{path}: expected an object with role and content, got {_kind(value)}")
    _check_fields(value, ("role", "content"), path=f"{path}.")
    role = value["role"]
    if role not in ROLES:
        raise _wrong(f"{path}.role: {_shown(role)} is none of {', '.join(ROLES)}")
    return Message(role=role, content=_text(value, "content", path=f"{path}."))


def _check_order(roles: list[str]) -> None:
    """A system message first or never, and a user before the first assistant; otherwise roles may repeat."""
    if "system" in roles[1:]:
        raise _wrong(f"messages[{roles.index('system', 1)}].role: a system message can only be the first")
    turns = [role for role in roles if role != "system"]
    if turns[:1] == ["assistant"]:
        raise _wrong(
            f"messages[{roles.index('assistant')}].role: a user turn comes before the first assistant turn"
        )


def _check_fields(
    value: Mapping[str, Any], fields: Collection[str], *, path: str, known: Collection[str] | None = None
) -> None:
    """Exactly these fields are there; a stranger is named with the nearest of the `known` ones."""
    for name in value:
        if name not in fields:
            near = difflib.get_close_matches(name, known or fields, n=1)
            hint = (
                f"did you mean {near[0]!r}?"
                if near
                else f"expected {' and '.join(fields) if path else _SHAPES}"
            )
            raise _wrong(f"{path}{_shown(name).strip(chr(39))}: unknown field; {hint}")
    for name in fields:
        if name not in value:
            raise _wrong(f"{path}{name}: missing; expected {' and '.join(fields) if path else _SHAPES}")


def _text(value: Mapping[str, Any], field: str, *, path: str) -> str:
    text = value[field]
    if not isinstance(text, str):
        raise _wrong(f"{path}{field}: expected a string, got {_kind(text)}")
    if not text.strip():
        raise _wrong(f"{path}{field}: is empty")
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise _wrong(f"{path}{field}: an escape \\ud800 to \\udfff without its partner is no character")
    return text


def _kind(value: Any) -> str:
    if value == [] and isinstance(value, list):
        return "an empty list"
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _shown(value: Any) -> str:
    return repr(value)[:80]


def _wrong(message: str) -> Problem:
    return Problem("DATASET_RECORD", message)
