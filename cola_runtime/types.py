"""Values that travel between the layers: sites, tensors, leases, base steps and what came of them.

Imports neither torch nor ray nor grpc.

Words are those of the glossary in README.md: a *site* is one module of the base model that an adapter
is attached to, a *segment* the contiguous rows of a mixed batch that belong to one adapter, a *tap* what
is captured at one site for one segment, *version* the number of optimizer steps applied to an adapter.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from cola_runtime.encodings import ADAPTER_GRADIENTS, TapPlan
from cola_runtime.job_choices import Task
from cola_runtime.rows import Row

JOB_ID_PREFIX = "job-"
MAX_DEVICES_CHARACTERS = 200
PRODUCT_FLOPS = "matrix_product_flops"
"""Of a base model's details: FLOP/s of matrix products in its dtype, as measured where it was loaded."""

QUANTIZATION = "quantization"
"""Of a base model's details: how its sites' weights are held."""
UNQUANTIZED = "none"


class SiteKind(enum.StrEnum):
    """How a site stores its weight: `linear` is [out, in], `conv1d` (GPT-2) is [in, out].

    `conv2d` is a linear map of patches, one row per position of its output; `embedding` ([in, out]) one of
    one-hot rows, which are held as their ids. `head` is no module of the base model: a task's own head over
    the pooled hidden state.
    """

    LINEAR = "linear"
    CONV1D = "conv1d"
    CONV2D = "conv2d"
    EMBEDDING = "embedding"
    HEAD = "head"


@dataclass(frozen=True, slots=True, kw_only=True)
class Patch:
    """What a conv2d site sees at each position of its output: `in_features` numbers, channel by channel."""

    kernel: tuple[int, int]  # height, width; so are stride and dilation
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]  # zeros left, right, above and below the image
    dilation: tuple[int, int]
    groups: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One module of the base model that can carry an adapter."""

    index: int  # position in the base model's catalogue; names the site on the wire
    name: str  # the module's full name, as in `model.named_modules()`
    kind: SiteKind
    in_features: int
    out_features: int
    input_group: int  # sites with one number receive the very same input x (q, k, v; gate, up)
    patch: Patch | None = None  # of a conv2d site
    positions: int | None = None  # rows of x that an image has there; None: one for every token
    padding_index: int | None = None  # of an embedding: the id whose weights never train, as in torch

    @property
    def groups(self) -> int:
        """Into how many equal runs inputs and outputs are divided, without weights from one to another."""
        return 1 if self.patch is None else self.patch.groups

    @property
    def takes_ids(self) -> bool:
        """Its x is held as ids, int [rows, 1], which stand for one-hot rows [rows, in_features]."""
        return self.kind is SiteKind.EMBEDDING


class TensorKind(enum.IntEnum):
    """What a tensor on the wire is. The value is the frame header's tensor id.

    A weight's gradient has its shape and its id plus 64.
    """

    LORA_A = 1  # [rank, in_features]; conv2d: adapters/shapes.py
    LORA_B = 2  # [out_features, rank]
    WEIGHT = 3  # linear: [out_features, in_features]
    BIAS = 4  # linear: [out_features]
    MLP_IN = 5  # [hidden, in_features]
    MLP_IN_BIAS = 6  # [hidden]
    MLP_OUT = 7  # [out_features, hidden]
    MLP_OUT_BIAS = 8  # [out_features]
    DELTA_A = 9  # linearized LoRA: [rank, in_features]
    DELTA_B = 10  # linearized LoRA: [out_features, rank]
    MODULE = 11  # a registered module's parameter; its slot says which

    GRAD_LORA_A = 65
    GRAD_LORA_B = 66
    GRAD_WEIGHT = 67
    GRAD_BIAS = 68
    GRAD_MLP_IN = 69
    GRAD_MLP_IN_BIAS = 70
    GRAD_MLP_OUT = 71
    GRAD_MLP_OUT_BIAS = 72
    GRAD_DELTA_A = 73
    GRAD_DELTA_B = 74
    GRAD_MODULE = 75

    INPUT = 128  # x, [rows, in_features]; its site is the first one of those that share it (dropout: its own)
    # (embedding: ids, int32 [rows, 1])
    OUTPUT_GRADIENT = 129  # g, [rows, out_features]
    WEIGHT_GRADIENT = 130  # g^T [x, 1], [out_features, in_features + 1]: G, and the sum of g for a bias
    WEIGHT_GRADIENT_FACTORS = (
        131  # P [out, k] above Q [in + 1, k], as one; P Q^T approximates WEIGHT_GRADIENT
    )
    WEIGHTS = 132  # every weight of an adapter, one behind the other in catalogue order, [P]
    BLOB = 255  # opaque bytes (a checkpoint), uint8 [bytes]

    __hash__ = int.__hash__  # Enum's own is a Python call, and keys are hashed per tensor

    @property
    def gradient(self) -> TensorKind:
        """The gradient of this weight. Raises ValueError for what is no weight."""
        if self > TensorKind.MODULE:
            raise ValueError(f"{self.name} is no weight")
        return TensorKind(self + 64)


@dataclass(frozen=True, slots=True)
class TensorKey:
    """Names one tensor of one adapter: which site, and which of its tensors."""

    site: int
    kind: TensorKind
    slot: int = 0  # which parameter of a registered module; 0 otherwise

    @property
    def gradient(self) -> TensorKey:
        return TensorKey(self.site, self.kind.gradient, self.slot)


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerHyperparameters:
    """`torch.optim` names; `max_grad_norm` clips the global norm over all sites of one adapter."""

    kind: str  # "adamw", "sgd" or "adafactor"
    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0
    nesterov: bool = False
    max_grad_norm: float | None = None
    beta2_decay: float = -0.8
    eps1: float | None = None  # None: the machine epsilon of the weights' dtype
    eps2: float = 1e-3
    d: float = 1.0
    inner_steps: int = (
        1  # optimizer steps on the taps of one step; above 1 not exact (gradients/surrogate.py)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningRateSchedule:
    """`constant`, or `linear` or `cosine` decay to zero at `total_steps`; before it a linear warm-up."""

    kind: str
    warmup_steps: int
    total_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """The right of one device to train one adapter. A message with an older epoch is fenced.

    A sharded adapter has one lease, too, of several devices; each of them knows its own part only.
    """

    job_id: str
    epoch: int
    device_id: str  # of a sharded adapter: the one that holds its first shard
    further_device_ids: tuple[str, ...] = ()  # of a sharded adapter: those of its other shards, in order

    @property
    def device_ids(self) -> tuple[str, ...]:
        """By shard; all different."""
        return self.device_id, *self.further_device_ids

    @property
    def devices(self) -> str:
        """Their names, as records and people have them; at most MAX_DEVICES_CHARACTERS."""
        names = ", ".join(self.device_ids)
        fits = len(names) <= MAX_DEVICES_CHARACTERS
        return names if fits else f"{self.device_id} and {len(self.further_device_ids)} more"

    @property
    def parts(self) -> tuple[Lease, ...]:
        """By shard: the lease as that shard's device knows it."""
        return tuple(
            Lease(job_id=self.job_id, epoch=self.epoch, device_id=device_id) for device_id in self.device_ids
        )

    def covers(self, part: Lease) -> bool:
        """`part` is this lease, or the part of one of its devices."""
        same = (self.job_id, self.epoch) == (part.job_id, part.epoch)
        return same and part.device_id in self.device_ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """Steps of another lease that a trusted device makes again, to see whether they were made right."""

    lease: Lease
    first: int  # the version that the first of them left
    last: int  # the version that the last of them led to


@dataclass(frozen=True, slots=True, kw_only=True)
class Gang:
    """Adapters that are merged into the base weights together: W = W0 + sum_k p_k delta_k.

    Jobs with equal gangs are in one. A base step belongs to one gang, or to none.
    """

    name: str  # "job/<job id>" of a merged job alone, "group/<name>" of a collaboration
    combine: str  # "mean": p_k = weight_k / sum of the present members' weights; "sum": p_k = weight_k


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """One adapter's place in its gang."""

    gang: Gang
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LossScaling:
    """What a job's loss is multiplied by in the backward pass; its taps are divided by it again."""

    scale: float = 1.0  # a power of two; where `dynamic`, the first one
    dynamic: bool = False  # halved while a gradient overflows, doubled after many steps without


UNSCALED = LossScaling()


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """The rows of one adapter inside a mixed batch, and what to do with their taps."""

    lease: Lease
    version: int  # the adapter version that these rows must see; anything else in the bank is refused
    rows: tuple[Row, ...]
    loss_denominator: float  # sum of the rows' loss weights over the whole step: gradients simply add up
    taps: TapPlan = ADAPTER_GRADIENTS
    microbatch: int = 0  # position within the step, 0-based
    last_microbatch: bool = True  # the device applies the optimizer step after this one
    gang: Gang | None = None  # whose merged weights these rows must see; None: adapters beside the base
    first_row: int = 0  # position of the first row within the step, 0-based; dropout's masks go by it
    staleness: int = 0  # steps that the device has applied since `version` when it applies these taps
    loss_scaling: LossScaling = UNSCALED
    retained: bool = False  # the base model keeps what it sends, for a spot check

    @property
    def trained_version(self) -> int:
        """The version that the step of these taps leaves."""
        return self.version + self.staleness

    @property
    def tokens(self) -> int:
        return sum(row.length for row in self.rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseStep:
    """One mixed batch. `train=False` computes losses only: no backward pass, no taps."""

    number: int
    segments: tuple[Segment, ...]
    train: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentLoss:
    """Outcome of one segment; `reason` is None, or the stable error reason for which it was not computed."""

    job_id: str
    loss_sum: float = 0.0  # sum over label tokens of weight * cross-entropy, or over labelled rows
    weight_sum: float = 0.0
    reason: str | None = None
    predictions: tuple[float, ...] = ()  # of labelled rows in a forward-only step: classes, or values


@dataclass(frozen=True, slots=True, kw_only=True)
class BankUse:
    """What became of adapters' weights in a bank with a byte limit, since its process started."""

    hits: int = 0  # adapters of base steps whose weights were there
    misses: int = 0  # whose weights had to be brought first
    prefetched: int = 0  # brought beside an earlier step
    evicted_bytes: int = 0
    resident_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseStepResult:
    number: int
    losses: tuple[SegmentLoss, ...]  # in the order of the segments
    started: float  # time.monotonic() of the base process
    seconds: float
    computed_tokens: int  # rows x padded length
    real_tokens: int
    bank: BankUse = BankUse()  # up to this step


@dataclass(frozen=True, slots=True, kw_only=True)
class StepApplied:
    """A device, or each shard's, applied an optimizer step and the new weights are current in the bank."""

    lease: Lease
    version: int  # after the step; the start version right after a lease is granted
    learning_rate: float = 0.0
    gradient_norm: float = 0.0  # before clipping
    device_seconds: float = 0.0  # of all its devices together
    bytes_up: int = 0  # base model -> device for this step, frame headers included
    bytes_down: int = 0  # device -> base model
    links: tuple[str, ...] = ()  # of the version in the update chain, by shard, hex
    deviation: float = 0.0  # of a Replay: the greatest so far, relative to the weights' norm


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceLinkChanged:
    """A device's gradient stream opened, closed, ran out of credit (parked) or got it back."""

    device_id: str
    connected: bool
    parked: bool
    fault: str = ""  # the reason, if what the device sent ended it


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRefused:
    """A device or the base model refused something of this lease; the job must recover or fail."""

    lease: Lease
    reason: str
    message: str


BaseEvent = StepApplied | DeviceLinkChanged | StepRefused


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseModelDescription:
    """What the coordinator must know of a base model to check a job before accepting it."""

    name: str
    architecture: str
    context_length: int  # tokens of the longest row; of images, which are all alike, those of every row
    vocabulary_size: int
    dtype: str
    sites: tuple[Site, ...]
    gradient_endpoint: str  # host:port of the gradient stream server
    tokenizer_path: str
    parameters: int
    hidden_size: int = 0
    tasks: tuple[Task, ...] = (Task.CAUSAL_LM,)
    bank_bytes: int | None = None  # of adapters' weights on its device at a time; None: no limit
    details: dict[str, str] = field(default_factory=dict)  # attention implementation, threads, device
    unpadded: bool = False  # base steps cost about the tokens that their rows have; else rows are padded
    tied_sites: tuple[int, ...] = ()  # their weights are other modules' too, so nothing may be merged there
    source_groups: tuple[
        int, ...
    ] = ()  # of an encoder-decoder: input groups whose x is of the source's tokens

    @property
    def takes_images(self) -> bool:
        """Its rows are images, and nothing else."""
        return Task.IMAGE_CLASSIFICATION in self.tasks

    @property
    def encoder_decoder(self) -> bool:
        """Its rows have a source, and their tokens begin with its decoder's start."""
        return Task.SEQUENCE_TO_SEQUENCE in self.tasks

    @property
    def bidirectional(self) -> bool:
        """An encoder: it predicts no tokens."""
        return not {Task.CAUSAL_LM, Task.SEQUENCE_TO_SEQUENCE} & set(self.tasks)
