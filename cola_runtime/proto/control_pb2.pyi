from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class LeaseRef(_message.Message):
    __slots__ = ("job_id", "epoch", "device_id")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    DEVICE_ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    epoch: int
    device_id: str
    def __init__(self, job_id: _Optional[str] = ..., epoch: _Optional[int] = ..., device_id: _Optional[str] = ...) -> None: ...

class AdapterDefinition(_message.Message):
    __slots__ = ("spec_json",)
    SPEC_JSON_FIELD_NUMBER: _ClassVar[int]
    spec_json: str
    def __init__(self, spec_json: _Optional[str] = ...) -> None: ...

class OptimizerDefinition(_message.Message):
    __slots__ = ("kind", "learning_rate", "beta1", "beta2", "eps", "weight_decay", "momentum", "nesterov", "max_grad_norm", "beta2_decay", "eps1", "eps2", "d", "inner_steps")
    KIND_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    BETA1_FIELD_NUMBER: _ClassVar[int]
    BETA2_FIELD_NUMBER: _ClassVar[int]
    EPS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DECAY_FIELD_NUMBER: _ClassVar[int]
    MOMENTUM_FIELD_NUMBER: _ClassVar[int]
    NESTEROV_FIELD_NUMBER: _ClassVar[int]
    MAX_GRAD_NORM_FIELD_NUMBER: _ClassVar[int]
    BETA2_DECAY_FIELD_NUMBER: _ClassVar[int]
    EPS1_FIELD_NUMBER: _ClassVar[int]
    EPS2_FIELD_NUMBER: _ClassVar[int]
    D_FIELD_NUMBER: _ClassVar[int]
    INNER_STEPS_FIELD_NUMBER: _ClassVar[int]
    kind: str
    learning_rate: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    momentum: float
    nesterov: bool
    max_grad_norm: float
    beta2_decay: float
    eps1: float
    eps2: float
    d: float
    inner_steps: int
    def __init__(self, kind: _Optional[str] = ..., learning_rate: _Optional[float] = ..., beta1: _Optional[float] = ..., beta2: _Optional[float] = ..., eps: _Optional[float] = ..., weight_decay: _Optional[float] = ..., momentum: _Optional[float] = ..., nesterov: _Optional[bool] = ..., max_grad_norm: _Optional[float] = ..., beta2_decay: _Optional[float] = ..., eps1: _Optional[float] = ..., eps2: _Optional[float] = ..., d: _Optional[float] = ..., inner_steps: _Optional[int] = ...) -> None: ...

class ScheduleDefinition(_message.Message):
    __slots__ = ("kind", "warmup_steps", "total_steps")
    KIND_FIELD_NUMBER: _ClassVar[int]
    WARMUP_STEPS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_STEPS_FIELD_NUMBER: _ClassVar[int]
    kind: str
    warmup_steps: int
    total_steps: int
    def __init__(self, kind: _Optional[str] = ..., warmup_steps: _Optional[int] = ..., total_steps: _Optional[int] = ...) -> None: ...

class DeviceControl(_message.Message):
    __slots__ = ("hello", "welcome", "heartbeat", "lease_grant", "lease_end", "checkpoint_request", "checkpoint_made", "lease_failed", "drain", "record_spans", "recorded_spans")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    LEASE_GRANT_FIELD_NUMBER: _ClassVar[int]
    LEASE_END_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_REQUEST_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_MADE_FIELD_NUMBER: _ClassVar[int]
    LEASE_FAILED_FIELD_NUMBER: _ClassVar[int]
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    RECORD_SPANS_FIELD_NUMBER: _ClassVar[int]
    RECORDED_SPANS_FIELD_NUMBER: _ClassVar[int]
    hello: DeviceHello
    welcome: DeviceWelcome
    heartbeat: Heartbeat
    lease_grant: LeaseGrant
    lease_end: LeaseEnd
    checkpoint_request: CheckpointRequest
    checkpoint_made: CheckpointMade
    lease_failed: LeaseFailed
    drain: Drain
    record_spans: RecordSpans
    recorded_spans: RecordedSpans
    def __init__(self, hello: _Optional[_Union[DeviceHello, _Mapping]] = ..., welcome: _Optional[_Union[DeviceWelcome, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., lease_grant: _Optional[_Union[LeaseGrant, _Mapping]] = ..., lease_end: _Optional[_Union[LeaseEnd, _Mapping]] = ..., checkpoint_request: _Optional[_Union[CheckpointRequest, _Mapping]] = ..., checkpoint_made: _Optional[_Union[CheckpointMade, _Mapping]] = ..., lease_failed: _Optional[_Union[LeaseFailed, _Mapping]] = ..., drain: _Optional[_Union[Drain, _Mapping]] = ..., record_spans: _Optional[_Union[RecordSpans, _Mapping]] = ..., recorded_spans: _Optional[_Union[RecordedSpans, _Mapping]] = ...) -> None: ...

class DeviceHello(_message.Message):
    __slots__ = ("device_id", "join_token", "protocol_version", "threads", "pid", "numbers_per_second")
    DEVICE_ID_FIELD_NUMBER: _ClassVar[int]
    JOIN_TOKEN_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    THREADS_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    NUMBERS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    device_id: str
    join_token: str
    protocol_version: int
    threads: int
    pid: int
    numbers_per_second: float
    def __init__(self, device_id: _Optional[str] = ..., join_token: _Optional[str] = ..., protocol_version: _Optional[int] = ..., threads: _Optional[int] = ..., pid: _Optional[int] = ..., numbers_per_second: _Optional[float] = ...) -> None: ...

class DeviceWelcome(_message.Message):
    __slots__ = ("heartbeat_seconds", "gradient_ticket")
    HEARTBEAT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_TICKET_FIELD_NUMBER: _ClassVar[int]
    heartbeat_seconds: float
    gradient_ticket: str
    def __init__(self, heartbeat_seconds: _Optional[float] = ..., gradient_ticket: _Optional[str] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("busy_seconds", "resident_bytes", "free_bytes")
    BUSY_SECONDS_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    busy_seconds: float
    resident_bytes: int
    free_bytes: int
    def __init__(self, busy_seconds: _Optional[float] = ..., resident_bytes: _Optional[int] = ..., free_bytes: _Optional[int] = ...) -> None: ...

class LeaseGrant(_message.Message):
    __slots__ = ("lease", "adapter", "optimizer", "schedule", "checkpoint_bytes", "checkpoint_every", "max_staleness", "shards", "chain", "gradient_endpoint")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    SCHEDULE_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_EVERY_FIELD_NUMBER: _ClassVar[int]
    MAX_STALENESS_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    CHAIN_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    lease: LeaseRef
    adapter: AdapterDefinition
    optimizer: OptimizerDefinition
    schedule: ScheduleDefinition
    checkpoint_bytes: int
    checkpoint_every: int
    max_staleness: int
    shards: int
    chain: bytes
    gradient_endpoint: str
    def __init__(self, lease: _Optional[_Union[LeaseRef, _Mapping]] = ..., adapter: _Optional[_Union[AdapterDefinition, _Mapping]] = ..., optimizer: _Optional[_Union[OptimizerDefinition, _Mapping]] = ..., schedule: _Optional[_Union[ScheduleDefinition, _Mapping]] = ..., checkpoint_bytes: _Optional[int] = ..., checkpoint_every: _Optional[int] = ..., max_staleness: _Optional[int] = ..., shards: _Optional[int] = ..., chain: _Optional[bytes] = ..., gradient_endpoint: _Optional[str] = ...) -> None: ...

class LeaseEnd(_message.Message):
    __slots__ = ("lease",)
    LEASE_FIELD_NUMBER: _ClassVar[int]
    lease: LeaseRef
    def __init__(self, lease: _Optional[_Union[LeaseRef, _Mapping]] = ...) -> None: ...

class CheckpointRequest(_message.Message):
    __slots__ = ("lease",)
    LEASE_FIELD_NUMBER: _ClassVar[int]
    lease: LeaseRef
    def __init__(self, lease: _Optional[_Union[LeaseRef, _Mapping]] = ...) -> None: ...

class CheckpointMade(_message.Message):
    __slots__ = ("lease", "version", "bytes", "sha256")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    lease: LeaseRef
    version: int
    bytes: int
    sha256: str
    def __init__(self, lease: _Optional[_Union[LeaseRef, _Mapping]] = ..., version: _Optional[int] = ..., bytes: _Optional[int] = ..., sha256: _Optional[str] = ...) -> None: ...

class LeaseFailed(_message.Message):
    __slots__ = ("lease", "reason", "message")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    lease: LeaseRef
    reason: str
    message: str
    def __init__(self, lease: _Optional[_Union[LeaseRef, _Mapping]] = ..., reason: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class Drain(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RecordSpans(_message.Message):
    __slots__ = ("on",)
    ON_FIELD_NUMBER: _ClassVar[int]
    on: bool
    def __init__(self, on: _Optional[bool] = ...) -> None: ...

class RecordedSpans(_message.Message):
    __slots__ = ("now", "spans", "recorded", "last")
    NOW_FIELD_NUMBER: _ClassVar[int]
    SPANS_FIELD_NUMBER: _ClassVar[int]
    RECORDED_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    now: float
    spans: _containers.RepeatedCompositeFieldContainer[RecordedSpan]
    recorded: int
    last: bool
    def __init__(self, now: _Optional[float] = ..., spans: _Optional[_Iterable[_Union[RecordedSpan, _Mapping]]] = ..., recorded: _Optional[int] = ..., last: _Optional[bool] = ...) -> None: ...

class RecordedSpan(_message.Message):
    __slots__ = ("lane", "name", "begin", "end", "job_id", "version")
    LANE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    lane: str
    name: str
    begin: float
    end: float
    job_id: str
    version: int
    def __init__(self, lane: _Optional[str] = ..., name: _Optional[str] = ..., begin: _Optional[float] = ..., end: _Optional[float] = ..., job_id: _Optional[str] = ..., version: _Optional[int] = ...) -> None: ...

class GradientControl(_message.Message):
    __slots__ = ("hello", "welcome", "credit", "microbatch_end", "update_end", "refusal", "shard_norms", "global_norm")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    CREDIT_FIELD_NUMBER: _ClassVar[int]
    MICROBATCH_END_FIELD_NUMBER: _ClassVar[int]
    UPDATE_END_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    SHARD_NORMS_FIELD_NUMBER: _ClassVar[int]
    GLOBAL_NORM_FIELD_NUMBER: _ClassVar[int]
    hello: GradientHello
    welcome: GradientWelcome
    credit: Credit
    microbatch_end: MicrobatchEnd
    update_end: UpdateEnd
    refusal: Refusal
    shard_norms: ShardNorms
    global_norm: GlobalNorm
    def __init__(self, hello: _Optional[_Union[GradientHello, _Mapping]] = ..., welcome: _Optional[_Union[GradientWelcome, _Mapping]] = ..., credit: _Optional[_Union[Credit, _Mapping]] = ..., microbatch_end: _Optional[_Union[MicrobatchEnd, _Mapping]] = ..., update_end: _Optional[_Union[UpdateEnd, _Mapping]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ..., shard_norms: _Optional[_Union[ShardNorms, _Mapping]] = ..., global_norm: _Optional[_Union[GlobalNorm, _Mapping]] = ...) -> None: ...

class GradientHello(_message.Message):
    __slots__ = ("device_id", "ticket", "protocol_version", "credit_bytes")
    DEVICE_ID_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    CREDIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    device_id: str
    ticket: str
    protocol_version: int
    credit_bytes: int
    def __init__(self, device_id: _Optional[str] = ..., ticket: _Optional[str] = ..., protocol_version: _Optional[int] = ..., credit_bytes: _Optional[int] = ...) -> None: ...

class GradientWelcome(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Credit(_message.Message):
    __slots__ = ("bytes",)
    BYTES_FIELD_NUMBER: _ClassVar[int]
    bytes: int
    def __init__(self, bytes: _Optional[int] = ...) -> None: ...

class MicrobatchEnd(_message.Message):
    __slots__ = ("lease", "version", "microbatch", "tensors", "apply", "staleness")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MICROBATCH_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    APPLY_FIELD_NUMBER: _ClassVar[int]
    STALENESS_FIELD_NUMBER: _ClassVar[int]
    lease: LeaseRef
    version: int
    microbatch: int
    tensors: int
    apply: bool
    staleness: int
    def __init__(self, lease: _Optional[_Union[LeaseRef, _Mapping]] = ..., version: _Optional[int] = ..., microbatch: _Optional[int] = ..., tensors: _Optional[int] = ..., apply: _Optional[bool] = ..., staleness: _Optional[int] = ...) -> None: ...

class UpdateEnd(_message.Message):
    __slots__ = ("lease", "version", "learning_rate", "gradient_norm", "device_seconds", "chain")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_NORM_FIELD_NUMBER: _ClassVar[int]
    DEVICE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    CHAIN_FIELD_NUMBER: _ClassVar[int]
    lease: LeaseRef
    version: int
    learning_rate: float
    gradient_norm: float
    device_seconds: float
    chain: bytes
    def __init__(self, lease: _Optional[_Union[LeaseRef, _Mapping]] = ..., version: _Optional[int] = ..., learning_rate: _Optional[float] = ..., gradient_norm: _Optional[float] = ..., device_seconds: _Optional[float] = ..., chain: _Optional[bytes] = ...) -> None: ...

class ShardNorms(_message.Message):
    __slots__ = ("lease", "version", "norms")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NORMS_FIELD_NUMBER: _ClassVar[int]
    lease: LeaseRef
    version: int
    norms: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, lease: _Optional[_Union[LeaseRef, _Mapping]] = ..., version: _Optional[int] = ..., norms: _Optional[_Iterable[float]] = ...) -> None: ...

class GlobalNorm(_message.Message):
    __slots__ = ("lease", "version", "norm")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NORM_FIELD_NUMBER: _ClassVar[int]
    lease: LeaseRef
    version: int
    norm: float
    def __init__(self, lease: _Optional[_Union[LeaseRef, _Mapping]] = ..., version: _Optional[int] = ..., norm: _Optional[float] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("lease", "reason", "message")
    LEASE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    lease: LeaseRef
    reason: str
    message: str
    def __init__(self, lease: _Optional[_Union[LeaseRef, _Mapping]] = ..., reason: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...
