"""How taps travel from the base model to a device (docs/encodings.md)."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Encoding(enum.StrEnum):
    """How a tap travels from the base model to a device."""

    ACTIVATIONS = "activations"  # x and g: for every kind
    WEIGHT_GRADIENT = "weight_gradient"  # G = g^T x: for kinds that are linear in x
    ADAPTER_GRADIENT = "adapter_gradient"  # the weights' own gradients: for kinds that the bank can derive


class Compression(enum.StrEnum):
    """What a job agrees to lose between base model and device; weights always come back exact."""

    NONE = "none"
    BFLOAT16 = "bfloat16"  # every tensor of a tap rounded to bfloat16
    INT8 = "int8"  # blocks of 64 values as int8 times one scale
    LOW_RANK = "low_rank"  # weight gradients of full-rank kinds as two factors, with error feedback


@dataclass(frozen=True, slots=True)
class TapPlan:
    """In which encoding the taps of an adapter travel; the sites of one part that share an x go alike."""

    encoding: Encoding
    exceptions: tuple[tuple[int, Encoding], ...] = ()  # (input group, encoding)
    compression: Compression = Compression.NONE

    def encoding_of(self, input_group: int) -> Encoding:
        return next((e for group, e in self.exceptions if group == input_group), self.encoding)

    def __str__(self) -> str:
        """`adapter_gradient`; `mixed` with exceptions; `activations+int8` where something is lost."""
        name = "mixed" if self.exceptions else self.encoding.value
        return name if self.compression is Compression.NONE else f"{name}+{self.compression}"


ADAPTER_GRADIENTS = TapPlan(Encoding.ADAPTER_GRADIENT)
