"""Watching a job live, and leaving it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from serving import ROWS, Served

from cola_runtime.cli.job_views import sparkline
from cola_runtime.cli.watch import LiveView
from cola_runtime.client.sdk import Client, Job
from cola_runtime.jobs.state import JobState
from cola_runtime.spec import JobSpec


@pytest.fixture
def job(client: Client, spec: JobSpec) -> Job:
    return client.submit(spec, training=ROWS).job


def shown(view: LiveView) -> str:
    console = Console(width=120, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(view)
    return console.export_text()


def test_the_view_shows_step_loss_rate_device_and_reason(job: Job) -> None:
    view = LiveView()
    running = replace(job, state="running", device_id="device-0", waiting_reason="two tenants are ahead")
    for second, step in enumerate((0, 1, 2, 3)):
        loss = 4.0 - step if step else None
        view.update(replace(running, version=step, last_loss=loss, tokens=100 * step), now=float(second))
    text = shown(view)
    for part in (
        "greeter",
        "step 3/5",
        "loss 1.0000 █▅▁",
        "100 tokens/s",
        "on device-0",
        "waiting: two tenants",
    ):
        assert part in text


def test_the_rate_is_of_the_last_seconds_and_never_negative(job: Job) -> None:
    view = LiveView()
    for second, tokens in ((0, 0), (50, 50_000), (55, 50_100), (60, 50_200)):
        view.update(replace(job, tokens=tokens), now=float(second))
    assert view.tokens_per_second == pytest.approx(20)
    view.update(replace(job, tokens=10), now=61.0)  # rewound
    assert view.tokens_per_second == 0


def test_a_sparkline_spans_its_values_in_eight_heights() -> None:
    assert sparkline([]) == ""
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert sparkline([0, 7, 3]) == "▁█▄"
    assert len(sparkline([float(n) for n in range(1000)])) == 40


def _heed_ctrl_c() -> None:
    """In the child: a shell starts background commands, and so CI's tests, with SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (("run", "-f", "job.yaml"), "cola jobs watch job-"),
        (("jobs", "logs", "greeter", "--follow"), "cola jobs logs greeter --follow --after"),
    ],
)
def test_ctrl_c_leaves_the_job_running_and_says_how_to_come_back(
    client: Client, served: Served, job_file: Path, spec: JobSpec, arguments: tuple[str, ...], advice: str
) -> None:
    if arguments[0] != "run":
        client.submit(spec, training=ROWS)
    environment = {**os.environ, "COLA_BASE_URL": served.url, "COLA_API_KEY": served.keys["alice"]}
    with subprocess.Popen(
        [sys.executable, "-m", "cola_runtime.cli.main", *arguments],
        cwd=job_file.parent,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_heed_ctrl_c,
    ) as command:
        try:
            assert command.stdout is not None
            while "encoding.chosen" not in command.stdout.readline():
                assert command.poll() is None
            command.send_signal(signal.SIGINT)
            out, err = command.communicate(timeout=20)
        finally:
            command.kill()  # nothing to a process that has ended; otherwise leaving would wait for it
    assert command.returncode == 130
    assert advice in out + err
    assert "Traceback" not in err
    assert [job.state for job in served.run(served.store.jobs())] == [JobState.QUEUED]
