"""How many bytes blockwise int8 takes. Torch-free: frames are checked against it before allocation.

    payload = scale of every block (bfloat16, little endian) | the values (int8), in row-major order

A block is 64 consecutive values, the last one what is left; value = scale * int8.
"""

from __future__ import annotations

BLOCK_VALUES = 64
SCALE_BYTES = 2


def blocks(elements: int) -> int:
    return -(-elements // BLOCK_VALUES)


def scales_bytes(elements: int) -> int:
    return SCALE_BYTES * blocks(elements)


def payload_bytes(elements: int) -> int:
    """Exactly what a tensor of so many elements takes: 1.03 bytes an element."""
    return scales_bytes(elements) + elements
