"""Which tensors lie one behind the other in a vector. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from cola_runtime.types import TensorKey


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class PackedKeys:
    """Names and shapes, in the vector's order. Identity is equality: the taps of every step are packed alike,
    so that whatever is worked out about them is worked out once.
    """

    keys: tuple[TensorKey, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def sizes(self) -> list[int]:
        """Numbers of each tensor."""
        return [prod(shape) for shape in self.shapes]
