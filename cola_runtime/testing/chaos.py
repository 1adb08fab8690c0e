"""What can go wrong on a stream: one fault at a time, at a chosen unit (a TCP chunk or a frame) a way."""

from __future__ import annotations

import asyncio
import enum
from dataclasses import dataclass


class Way(enum.StrEnum):
    """Which way the bytes go; the client is who dialled."""

    TO_SERVER = "to_server"
    TO_CLIENT = "to_client"


class FaultKind(enum.StrEnum):
    DELAY = "delay"  # from then on every unit waits `seconds`
    THROTTLE = "throttle"  # from then on so many `bytes_per_second`
    STALL = "stall"  # from then on nothing passes, and nobody hangs up
    CUT = "cut"  # both ways end, without a goodbye
    HALF_CLOSE = "half_close"  # this way ends properly, the other one stays open
    DROP = "drop"  # one unit is lost
    DUPLICATE = "duplicate"  # one unit comes twice
    REORDER = "reorder"  # one unit comes behind the next one
    CORRUPT = "corrupt"  # one bit of a unit is flipped


LASTING = frozenset({FaultKind.DELAY, FaultKind.THROTTLE, FaultKind.STALL})


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamFault:
    """At unit `at` (from 1, counted over all connections since `Chaos` was made) a way."""

    kind: FaultKind
    way: Way
    at: int
    seconds: float = 0.05
    bytes_per_second: float = 1e6


class Cut(Exception):
    """End both ways now."""


class HalfClosed(Exception):
    """End this way, keep the other one."""


class Chaos:
    """Decides for each unit what goes on in its place. Belongs to one event loop."""

    def __init__(self, fault: StreamFault | None = None) -> None:
        self._fault = fault
        self.units = dict.fromkeys(Way, 0)
        self.struck = asyncio.Event()  # the fault has happened
        self._cleared = asyncio.Event()
        self._held: bytes | None = None

    def clear(self) -> None:
        """Whatever lasts ends."""
        self._cleared.set()

    def strike_next(self, kind: FaultKind, way: Way) -> None:
        """Let the next unit that way suffer a fault, in place of whatever was to happen."""
        self._fault = StreamFault(kind=kind, way=way, at=self.units[way] + 1)
        self.struck.clear()

    async def pass_on(self, way: Way, unit: bytes) -> list[bytes]:
        """What is sent instead of `unit`, after the wait that is due. Raises Cut, HalfClosed."""
        self.units[way] += 1
        fault = self._fault
        if fault is None or fault.way is not way or self._cleared.is_set():
            return [unit]
        if self._held is not None:
            held, self._held = self._held, None
            return [unit, held]
        number = self.units[way]
        if number < fault.at or (number > fault.at and fault.kind not in LASTING):
            return [unit]
        self.struck.set()
        return await self._strike(fault, unit)

    async def _strike(self, fault: StreamFault, unit: bytes) -> list[bytes]:
        match fault.kind:
            case FaultKind.DELAY:
                await asyncio.sleep(fault.seconds)
            case FaultKind.THROTTLE:
                await asyncio.sleep(len(unit) / fault.bytes_per_second)
            case FaultKind.STALL:
                await self._cleared.wait()
            case FaultKind.CUT:
                raise Cut
            case FaultKind.HALF_CLOSE:
                raise HalfClosed
            case FaultKind.DROP:
                return []
            case FaultKind.DUPLICATE:
                return [unit, unit]
            case FaultKind.REORDER:
                self._held = unit
                return []
            case FaultKind.CORRUPT:
                return [unit[:-1] + bytes([unit[-1] ^ 1])]
        return [unit]


class Recorder(Chaos):
    """Harms nothing, and keeps every unit that went to the server: what somebody on the way would have."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[bytes] = []

    async def pass_on(self, way: Way, unit: bytes) -> list[bytes]:
        if way is Way.TO_SERVER:
            self.sent.append(unit)
        return await super().pass_on(way, unit)
