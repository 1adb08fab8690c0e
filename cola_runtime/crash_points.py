"""Named places at which a process can be told to die, so that every recovery is tried where it matters.

`COLA_CRASH_AT=point[:n[:marker]]` kills the process with SIGKILL when it reaches the point for the n-th time
(the first, unless said). With a marker, a file, only the process that can create it dies: whatever starts in
its place lives, and the file shows that the point was reached. Several, separated by commas, are tried in
turn by whoever comes to live long enough. Not set, a point costs a loop over nothing.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path

from cola_runtime.errors import InvalidInput

_STORE_WRITES = (
    "job", "transition", "lease", "rewind", "step", "evaluation", "checkpoint", "retirement", "event",
)  # fmt: skip

COORDINATOR_POINTS = (
    *(f"store.{write}.uncommitted" for write in _STORE_WRITES),  # all of the transaction but its commit
    *(f"store.{write}.committed" for write in _STORE_WRITES),  # durable, and nobody knows yet
    "storage.written",  # an object's bytes are on disk under a temporary name
    "storage.renamed",  # the object is there, its record is not
    "lease.base_told",  # the base model honours the lease, its device does not know of it
    "lease.device_told",
)
DEVICE_POINTS = (
    "device.granted",  # the adapter is made or restored, its weights are not sent
    "device.step_complete",  # all taps of the step are there, it is not applied
    "device.step_applied",  # applied, its update is not sent
    "device.update_begun",  # the update's weights are queued, its end is not
    "device.update_sent",
    "device.checkpoint_made",
    "device.checkpoint_sent",  # its bytes are queued, its message is not
)
BASE_MODEL_POINTS = (
    "base_model.leased",
    "base_model.forward",  # a batch is packed, its forward pass begins
    "base_model.backward",  # losses are known, no gradient is
    "base_model.tap",  # in the backward pass: the first tap has left, others have not
    "base_model.step_done",  # every tap is queued, the result is not told
    "base_model.update_complete",  # a version arrived whole, it is not installed
    "base_model.installed",  # it is, and nobody was told
)
POINTS = frozenset((*COORDINATOR_POINTS, *DEVICE_POINTS, *BASE_MODEL_POINTS))


@dataclass(slots=True)
class _Armed:
    point: str
    left: int
    marker: Path | None


_armed: tuple[_Armed, ...] = ()


def arm(setting: str | None) -> None:
    """Die at a point that `setting` names; None disarms. Raises InvalidInput `CRASH_POINT_INVALID`."""
    global _armed
    _armed = () if setting is None else tuple(map(_parse, setting.split(",")))


def reach(point: str) -> None:
    """This process is at `point`: it may end here, without a chance to clean up."""
    for armed in _armed:
        if armed.point == point:
            armed.left -= 1
            if armed.left == 0 and _first(armed.marker):
                os.kill(os.getpid(), signal.SIGKILL)


def _parse(setting: str) -> _Armed:
    point, _, rest = setting.partition(":")
    number, _, marker = rest.partition(":")
    if point not in POINTS or not (number or "1").isdecimal() or int(number or 1) < 1:
        raise InvalidInput(
            "CRASH_POINT_INVALID",
            f"{setting!r} is not point[:n[:marker]]",
            where="COLA_CRASH_AT",
            limit=", ".join(sorted(POINTS)),
        )
    return _Armed(point, int(number or 1), Path(marker) if marker else None)


def _first(marker: Path | None) -> bool:
    if marker is None:
        return True
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
