"""One adapter in training: weights, optimizer state and the gradient sum of the step under way.

Plain and synchronous; knows nothing of streams, leases or other adapters.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from cola_runtime.adapters.adapter import initial_weights, torch_dtype
from cola_runtime.adapters.checkpoint_format import (
    CheckpointContent,
    TrainingDefinition,
    decode_checkpoint,
    encode_checkpoint,
)
from cola_runtime.adapters.flat_layout import FlatLayout
from cola_runtime.adapters.optimizer_state import training_bytes
from cola_runtime.adapters.schedule import learning_rate
from cola_runtime.device.optimizer import build_optimizer
from cola_runtime.errors import Conflict
from cola_runtime.gradients.accumulate import GradientAccumulator
from cola_runtime.gradients.norms import global_norm, tensor_norms
from cola_runtime.gradients.packed import PackedKeys
from cola_runtime.types import TensorKey

CLIP_EPS = 1e-6  # torch's own


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """One step. `seconds` covers clip, optimizer and inner steps, not the sums of what arrived."""

    version: int
    learning_rate: float
    gradient_norm: float  # of the exact gradient, over all sites, before clipping
    seconds: float


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """What a step with inner steps started from."""

    weights_P: Tensor
    states: dict[str, Tensor]


class AdapterSession:
    """Trains one adapter exactly as torch.optim alone would, given the same gradients (bitwise, tested).

    With `inner_steps` above 1, a step is several of torch.optim's: the first is the exact one, the others
    train the surrogate of the same taps (gradients/surrogate.py). All of them have the step's learning rate,
    each is clipped and decayed by itself, and the optimizer's own counter counts each.
    """

    def __init__(
        self,
        definition: TrainingDefinition,
        weights: dict[TensorKey, Tensor],
        *,
        version: int = 0,
        max_staleness: int = 0,
    ) -> None:
        self.definition = definition
        self.version = version
        self._max_staleness = max_staleness
        self._previous: dict[TensorKey, Tensor] | None = None  # with max_staleness, the version before's
        self._layout = FlatLayout(definition.spec)
        self._weights_P = self._layout.flat(weights)
        self._weights = self._layout.views(self._weights_P)
        self._accumulator = GradientAccumulator(
            definition.spec, keep_taps=definition.optimizer.inner_steps > 1
        )
        self._optimizer = build_optimizer(definition.optimizer, self._layout, self._weights_P)

    @classmethod
    def create(cls, definition: TrainingDefinition, *, max_staleness: int = 0) -> AdapterSession:
        """A new adapter at version 0, from the spec's seed alone."""
        return cls(definition, initial_weights(definition.spec), max_staleness=max_staleness)

    @classmethod
    def restore(cls, data: bytes, *, max_staleness: int = 0) -> AdapterSession:
        """Continue from `checkpoint()`: the next steps are bit for bit those of the session that made it.

        Raises InvalidInput CHECKPOINT_INVALID.
        """
        content = decode_checkpoint(data)
        weights = {key: _tensor(array) for key, array in content.weights.items()}
        session = cls(content.definition, weights, version=content.version, max_staleness=max_staleness)
        session._optimizer.load({name: _tensor(state) for name, state in content.states.items()})
        return session

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and gradients."""
        return torch_dtype(self.definition.spec)

    @property
    def resident_bytes(self) -> int:
        """Weights (with max_staleness two versions), gradient sums and optimizer state, from step 1 on.

        Inner steps need more while a step lasts: a copy of all that, and the step's taps
        (at most `gradients.surrogate.MAX_KEPT_BYTES`).
        """
        return training_bytes(
            self.definition.optimizer,
            self._layout.shapes.values(),
            itemsize=self.dtype.itemsize,
            versions=1 + self._max_staleness,
        )

    def add(self, key: TensorKey, tensor: Tensor, *, version: int) -> None:
        """Add one tensor of a tap of `version`: the session's, or with max_staleness 1 the one before.

        Its gradient is taken at the weights of that version. Raises Conflict VERSION_MISMATCH for any other.
        """
        self._accumulator.add(key, tensor, self._weights_of(version))

    def add_packed(self, packed: PackedKeys, vector: Tensor, *, version: int) -> None:
        """As `add`, of every tensor in `vector`."""
        self._accumulator.add_packed(packed, vector, self._weights_of(version))

    def gradient_norms(self) -> Tensor:
        """[tensors]: the norm of the gradient of each weight, in catalogue order.

        Raises ProtocolError `TAP_INCOMPLETE` while a tap is open.
        """
        return tensor_norms(self._accumulator.gradients().values())

    def apply(self, *, version: int, norm: float | None = None) -> Applied:
        """Clip, step from `version`, which must be the session's, and start the next version's sums.

        `norm` is what to clip by where this is one shard of an adapter: that of all shards' gradients.
        Raises Conflict VERSION_MISMATCH or NON_FINITE_GRADIENT; nothing has changed then.
        """
        self._check_version(version)
        started = time.perf_counter()
        hyper = self.definition.optimizer
        rate = learning_rate(self.definition.schedule, hyper.learning_rate, self.version)
        if self._max_staleness:
            self._previous = self.weights()
        start = self._snapshot() if hyper.inner_steps > 1 else None
        norm = self._step(self._accumulator.gradient_vector(), rate, norm)
        if start is not None:
            self._more_steps(hyper.inner_steps - 1, rate, start)
        self.version += 1
        self._accumulator.clear()
        seconds = time.perf_counter() - started
        return Applied(version=self.version, learning_rate=rate, gradient_norm=norm, seconds=seconds)

    def discard(self) -> None:
        """Forget the taps of the step under way."""
        self._accumulator.clear()

    def weights(self) -> dict[TensorKey, Tensor]:
        """A copy of the weights, which later steps do not change."""
        return self._layout.views(self._weights_P.clone())

    @property
    def weights_vector(self) -> Tensor:
        """[P]: the weights in catalogue order, on the session's own memory."""
        return self._weights_P

    def checkpoint(self) -> bytes:
        """Everything `restore` needs, without the taps of the step under way."""
        content = CheckpointContent(
            definition=self.definition,
            version=self.version,
            weights_P=self._weights_P.numpy(),
            states={name: state.numpy() for name, state in self._optimizer.states().items()},
        )
        return encode_checkpoint(content)

    def _weights_of(self, version: int) -> dict[TensorKey, Tensor]:
        if self._previous is not None and version == self.version - 1:
            return self._previous
        self._check_version(version)
        return self._weights

    def _check_version(self, version: int) -> None:
        if version != self.version:
            raise Conflict(
                "VERSION_MISMATCH",
                f"a tap of version {version} cannot train version {self.version}",
                limit=self.version,
                actual=version,
            )

    def _more_steps(self, count: int, rate: float, start: _Snapshot) -> None:
        """Train the surrogate of the step's taps. All or nothing: back to `start` when one fails."""
        before = self._layout.views(start.weights_P)
        try:
            for _ in range(count):
                gradients = self._accumulator.surrogate_gradients(self._weights, before)
                in_order = {key: gradients[key.gradient] for key in self._weights}
                self._step(self._layout.flat(in_order), rate)
        except BaseException:
            self._weights_P.copy_(start.weights_P)
            self._optimizer.load(start.states)
            raise

    def _snapshot(self) -> _Snapshot:
        states = self._optimizer.states()
        return _Snapshot(
            self._weights_P.clone(),
            {name: state.clone() for name, state in states.items()},
        )

    def _step(self, gradient_P: Tensor, rate: float, norm: float | None = None) -> float:
        """Clip and apply; returns the norm before clipping. Raises Conflict NON_FINITE_GRADIENT."""
        if norm is None:
            norm_of_all = global_norm(tensor_norms(torch.split(gradient_P, self._layout.sizes)))
        else:
            norm_of_all = torch.tensor(norm, dtype=self.dtype)
        clip = self._clip(norm_of_all)
        self._optimizer.step(self._weights_P, gradient_P, rate=rate, clip=clip)
        return float(norm_of_all) if norm is None else norm

    def _clip(self, norm: Tensor) -> Tensor | None:
        """What to multiply the gradient by, as torch.nn.utils.clip_grads_with_norm_ does; None for 1."""
        if not torch.isfinite(norm):
            raise Conflict(
                "NON_FINITE_GRADIENT",
                f"the gradient's norm at version {self.version} is {norm.item()}",
                remedy="Lower the learning rate or check the data; the weights are unchanged.",
            )
        limit = self.definition.optimizer.max_grad_norm
        if limit is None:
            return None
        factor = limit / (norm + CLIP_EPS)
        return factor if factor < 1 else None


def _tensor(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(array.copy())
