"""Watching a job live: step, loss, tokens per second, device, and why it waits."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cola_runtime.cli.connect import connected_async
from cola_runtime.cli.job_views import event_line, sparkline
from cola_runtime.cli.output import byte_size, clean, number, print_text, state_text

if TYPE_CHECKING:
    from cola_runtime.client.sdk import AsyncJobHandle, Job

REFRESH_SECONDS = 0.5
RATE_WINDOW_SECONDS = 10.0
BAR_CHARACTERS = 30
KEPT_LOSSES = 400


def watch_job(job_id: str, *, url: str | None, quiet: bool = False) -> Job | None:
    """The job once it has ended; None if the watcher left with Ctrl-C: the job goes on."""
    try:
        return asyncio.run(_watch(job_id, url, quiet))
    except KeyboardInterrupt:
        if not quiet:
            print_text(
                ("Detached", "bold"),
                "; the job goes on. Watch it again: ",
                (f"cola jobs watch {job_id}", "cyan"),
            )
        return None


async def _watch(job_id: str, url: str | None, quiet: bool) -> Job:
    console = Console(highlight=False)
    async with connected_async(url) as client:
        handle = await client.job(job_id)
        if quiet:
            return await handle.wait(check=False)
        if not console.is_terminal:
            return await _print_events(handle, console)
        return await _show_live(handle, console)


async def _print_events(handle: AsyncJobHandle, console: Console) -> Job:
    async for event in handle.events():
        console.print(event_line(event), soft_wrap=True)
    return await handle.refresh()


async def _show_live(handle: AsyncJobHandle, console: Console) -> Job:
    view = LiveView()
    view.update(handle.job, now=time.monotonic())
    with Live(view, console=console, auto_refresh=False) as live:
        refreshing = asyncio.create_task(_refresh_forever(handle, view, live))
        try:
            async for event in handle.events():
                if event.kind != "step.applied":
                    console.print(event_line(event))
        finally:
            refreshing.cancel()
            await asyncio.wait({refreshing})
        view.update(await handle.refresh(), now=time.monotonic())
        live.refresh()
    return handle.job


async def _refresh_forever(handle: AsyncJobHandle, view: LiveView, live: Live) -> None:
    while True:
        view.update(await handle.refresh(), now=time.monotonic())
        live.refresh()
        await asyncio.sleep(REFRESH_SECONDS)


class LiveView:
    """What is shown of a running job; `update` takes each new state of it."""

    def __init__(self) -> None:
        self._job: Job | None = None
        self._losses: deque[float] = deque(maxlen=KEPT_LOSSES)
        self._tokens: deque[tuple[float, int]] = deque()

    def update(self, job: Job, *, now: float) -> None:
        moved = self._job is None or job.version > self._job.version
        if moved and job.last_loss is not None:
            self._losses.append(job.last_loss)
        self._tokens.append((now, job.tokens))
        while now - self._tokens[0][0] > RATE_WINDOW_SECONDS and len(self._tokens) > 2:
            self._tokens.popleft()
        self._job = job

    @property
    def tokens_per_second(self) -> float:
        """Over the last few seconds; a rewind counts as nothing."""
        (begun, before), (now, after) = self._tokens[0], self._tokens[-1]
        return max(after - before, 0) / (now - begun) if now > begun else 0.0

    def __rich__(self) -> RenderableType:
        job = self._job
        if job is None:
            return Text("")
        bar = ProgressBar(
            total=job.total_steps,
            completed=job.version,
            width=BAR_CHARACTERS,
            complete_style="cyan",
            finished_style="green",
        )
        head = Table.grid(padding=(0, 2, 0, 0))
        head.add_row(
            Text(clean(job.name), style="bold"),
            state_text(job.state),
            bar,
            Text(f"step {job.version}/{job.total_steps}"),
        )
        facts = [f"loss {number(job.last_loss)} {sparkline(self._losses)}".rstrip()]
        if not job.ended:
            facts.append(f"{self.tokens_per_second:,.0f} tokens/s")
        facts += [f"{byte_size(job.bytes_up)} up", f"{byte_size(job.bytes_down)} down"]
        if job.device_id:
            facts.append(f"on {clean(job.device_id)}")
        lines: list[RenderableType] = [head, Text("  ".join(facts))]
        if job.waiting_reason:
            lines.append(Text(f"waiting: {clean(job.waiting_reason)}", style="yellow"))
        return Group(*lines)
