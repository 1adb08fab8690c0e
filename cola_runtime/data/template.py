"""A base model's own chat template, taken apart: what is the template's, and what is a message's.

The template is rendered once with marks in place of the contents; the text between the marks is its markup.
Only that is ever read as special tokens, so a message that spells `<|im_end|>` ends nothing.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jinja2 import TemplateError

from cola_runtime.data.records import Message
from cola_runtime.data.violations import Problem

_MARK = re.compile("\ue000([0-9]+)\ue001")
_CACHED_SKELETONS = 1024


@dataclass(frozen=True, slots=True)
class Piece:
    """Text of a row that is encoded by itself."""

    text: str
    is_markup: bool  # the template's own: special tokens in it are special tokens
    is_answer: bool  # what the model shall learn to say; of markup the end of its turn


class ChatTemplate:
    """`render(messages, answer)` is the template itself; `answer` adds the head of an assistant's turn."""

    def __init__(self, render: Callable[[Sequence[Message], bool], str]) -> None:
        self._render = render
        self._skeleton = functools.lru_cache(_CACHED_SKELETONS)(self._make_skeleton)

    def pieces(self, messages: Sequence[Message], *, answer: bool = False) -> list[Piece]:
        """Pieces whose texts add up to exactly what the template renders.

        Raises Problem `ROW_NOT_RENDERED` if the template refuses the messages or rewrites their contents.
        """
        skeleton = self._skeleton(tuple(message.role for message in messages), answer)
        rendered = self._rendered(messages, answer)
        for contents in ([m.content for m in messages], [m.content.strip() for m in messages]):
            texts = [contents[part] if isinstance(part, int) else part for part in skeleton]
            if "".join(texts) == rendered:
                return _pieces(skeleton, texts, messages)
        raise Problem("ROW_NOT_RENDERED", "the base model's chat template rewrites these messages")

    def after_answer(self) -> str:
        """The markup behind the last answer of a conversation; "" without any, or if the template refuses."""
        try:
            last = self._skeleton(("user", "assistant"), False)[-1]
        except Problem:
            return ""
        return last if isinstance(last, str) else ""

    def _make_skeleton(self, roles: tuple[str, ...], answer: bool) -> tuple[str | int, ...]:
        """The template's texts and, where contents stand, the numbers of their messages."""
        marked = [Message(role=role, content=f"\ue000{index}\ue001") for index, role in enumerate(roles)]
        parts = _MARK.split(self._rendered(marked, answer))
        return tuple(int(part) if odd % 2 else part for odd, part in enumerate(parts) if odd % 2 or part)

    def _rendered(self, messages: Sequence[Message], answer: bool) -> str:
        try:
            return self._render(messages, answer)
        except TemplateError as error:
            message = f"the base model's chat template refuses these messages: {error}"
            raise Problem("ROW_NOT_RENDERED", message[:300]) from error


def _pieces(skeleton: Sequence[str | int], texts: Sequence[str], messages: Sequence[Message]) -> list[Piece]:
    pieces = []
    is_answer = False
    for part, text in zip(skeleton, texts, strict=True):
        is_markup = isinstance(part, str)
        if isinstance(part, int):
            is_answer = messages[part].role == "assistant"
        pieces.append(Piece(text, is_markup, is_answer))
        if is_markup:  # only the markup right behind an answer holds the end of its turn
            is_answer = False
    return pieces
