"""Random messages of any descriptor, from values that have broken services before."""

from __future__ import annotations

import json
import random
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

TEXTS = [
    "", "a", "../../etc/passwd", "%", "_", "job-", "\x00", "\x1b[2J", "‮gpj", "é" * 300, "x" * 5000, "CON",
    "' OR 1=1 --", "{{7*7}}", "<img onerror=1>", "NaN", "-0", "null", "[]", "{", "💥", "%2e%2e", "a\nb", " ",
    "jobs:read", "admin", "*", "trusted", "community", "tml-guess", "join-guess",
]  # fmt: skip
NUMBERS = [0, 1, -1, 2, 7, 255, 2**31 - 1, -(2**31), 2**32 - 1, 2**53, 2**63 - 1, -(2**63), 2**64 - 1]
REALS = [0.0, -0.0, 1.0, -1.0, 0.5, 1e-320, 1e308, float("inf"), float("-inf"), float("nan")]
RANGES = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}
SPEC: dict[str, Any] = {"name": "fuzz", "base_model": "tiny-llama", "rows_per_step": 4}


class Messages:
    """Draws messages; the same seed draws the same ones."""

    def __init__(self, seed: int, references: list[str]) -> None:
        self.draw = random.Random(seed)
        self._texts = [*TEXTS, *references * 4]

    def message(self, descriptor: Descriptor) -> Message:
        fields: dict[str, Any] = {}
        for field in descriptor.fields:
            if self.draw.random() < 0.7:
                fields[field.name] = self._values(field)
        return GetMessageClass(descriptor)(**fields)

    def spec_json(self) -> str:
        """A job's spec, nearly right."""
        spec = dict(SPEC)
        for _ in range(self.draw.randrange(3)):
            name = self.draw.choice([*SPEC, "adapter", "optimizer", "steps", "trust", "task", "seed", "xyz"])
            spec[name] = self.draw.choice(
                [*TEXTS, *NUMBERS, None, [], {}, [{}], {"kind": "lora", "rank": -1}]
            )
        return json.dumps(spec)

    def _values(self, field: FieldDescriptor) -> Any:
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            return {}
        if field.is_repeated:
            return [self._value(field) for _ in range(self.draw.randrange(4))]
        return self._value(field)

    def _value(self, field: FieldDescriptor) -> Any:
        kind = field.cpp_type
        if kind == FieldDescriptor.CPPTYPE_MESSAGE:
            return self.message(field.message_type)
        if kind in RANGES:
            low, high = RANGES[kind]
            return max(low, min(high, self.draw.choice(NUMBERS)))
        if kind == FieldDescriptor.CPPTYPE_BOOL:
            return self.draw.random() < 0.5
        if kind in (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT):
            return self.draw.choice(REALS)
        if field.type == FieldDescriptor.TYPE_BYTES:
            return self.draw.randbytes(self.draw.choice([0, 1, 30, 3000]))
        if field.name == "spec_json" and self.draw.random() < 0.7:
            return self.spec_json()
        return self.draw.choice(self._texts)
