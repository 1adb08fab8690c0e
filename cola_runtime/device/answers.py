"""What the device's worker hands back to be sent."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field

from cola_runtime.transport.frames import Frame
from cola_runtime.types import Lease


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """The weights of one version, on their way to the base model: frames of their own memory."""

    lease: Lease
    version: int
    frames: tuple[Frame, ...]
    link: Future[bytes]  # in the adapter's update chain
    learning_rate: float = 0.0
    gradient_norm: float = 0.0
    seconds: float = 0.0
    checkpoint_due: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Norms:
    """A shard's step is complete; it is applied once the base model has the norms of all shards."""

    lease: Lease
    version: int  # that the step leaves
    norms: tuple[float, ...]  # of each of the shard's gradients, in catalogue order


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    lease: Lease
    version: int
    data: bytes
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """Something of this lease could not be done; the coordinator decides what follows."""

    lease: Lease
    reason: str
    message: str


Answer = Update | Norms | Refused


@dataclass(slots=True)
class Consumed:
    """What a batch of arrivals led to, in order."""

    credit_bytes: int = 0
    answers: list[Answer] = field(default_factory=list)
