"""Nothing that a tenant or a device writes can steer a terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from serving import ROWS, Served

from cola_runtime.cli.output import clean, clean_block
from cola_runtime.client.sdk import Client
from cola_runtime.spec import JobSpec

EVIL = "\x1b]0;owned\x07\x1b[31mred\x1b[0m [bold]markup[/bold] \u202eesrever \x9b2J\x00"


def harmless(text: str) -> bool:
    return not any(mark in text for mark in ("\x1b", "\x07", "\u202e", "\x9b", "\x00"))


def test_clean_takes_out_whatever_is_not_text() -> None:
    assert harmless(clean(EVIL))
    assert clean(EVIL) == "]0;owned[31mred[0m [bold]markup[/bold] esrever 2J"
    assert clean("Grüße, 你好 🙂\tx\ny") == "Grüße, 你好 🙂 x y"
    assert clean_block("a\x1b\nb\r\nc") == "a\nb\nc"


@pytest.mark.parametrize("command", ["logs", "events", "get"])
def test_escapes_in_events_and_devices_are_inert(
    cola: Callable[..., Any], client: Client, served: Served, spec: JobSpec, command: str
) -> None:
    handle = client.submit(spec, training=ROWS)
    served.run(served.store.add_event(handle.job_id, "device.said", EVIL, data={EVIL: EVIL}))
    ran = cola("jobs", command, handle.job_id)
    assert ran.code == 0
    assert harmless(ran.out)
    if command != "get":
        assert "[bold]markup[/bold]" in ran.out  # shown, not obeyed


def test_escapes_in_an_error_are_inert(cola: Callable[..., Any]) -> None:
    ran = cola("jobs", "get", EVIL.replace("\0", ""))
    assert ran.code == 5
    assert harmless(ran.err)


def test_escapes_in_generated_text_are_inert(cola: Callable[..., Any]) -> None:
    ran = cola("generate", "\x1b[31mab")
    assert ran.code == 0
    assert harmless(ran.out)
