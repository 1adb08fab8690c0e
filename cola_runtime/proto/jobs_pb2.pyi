from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SubmitJobRequest(_message.Message):
    __slots__ = ("header", "training_chunk", "evaluation_chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    TRAINING_CHUNK_FIELD_NUMBER: _ClassVar[int]
    EVALUATION_CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: JobHeader
    training_chunk: bytes
    evaluation_chunk: bytes
    def __init__(self, header: _Optional[_Union[JobHeader, _Mapping]] = ..., training_chunk: _Optional[bytes] = ..., evaluation_chunk: _Optional[bytes] = ...) -> None: ...

class JobHeader(_message.Message):
    __slots__ = ("spec_json", "training_name", "evaluation_name", "idempotency_key")
    SPEC_JSON_FIELD_NUMBER: _ClassVar[int]
    TRAINING_NAME_FIELD_NUMBER: _ClassVar[int]
    EVALUATION_NAME_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCY_KEY_FIELD_NUMBER: _ClassVar[int]
    spec_json: str
    training_name: str
    evaluation_name: str
    idempotency_key: str
    def __init__(self, spec_json: _Optional[str] = ..., training_name: _Optional[str] = ..., evaluation_name: _Optional[str] = ..., idempotency_key: _Optional[str] = ...) -> None: ...

class DatasetReport(_message.Message):
    __slots__ = ("rows", "tokens", "label_tokens", "longest", "median", "truncated", "steps", "format", "literal_markup_rows")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    LABEL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LONGEST_FIELD_NUMBER: _ClassVar[int]
    MEDIAN_FIELD_NUMBER: _ClassVar[int]
    TRUNCATED_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    LITERAL_MARKUP_ROWS_FIELD_NUMBER: _ClassVar[int]
    rows: int
    tokens: int
    label_tokens: int
    longest: int
    median: int
    truncated: int
    steps: int
    format: str
    literal_markup_rows: int
    def __init__(self, rows: _Optional[int] = ..., tokens: _Optional[int] = ..., label_tokens: _Optional[int] = ..., longest: _Optional[int] = ..., median: _Optional[int] = ..., truncated: _Optional[int] = ..., steps: _Optional[int] = ..., format: _Optional[str] = ..., literal_markup_rows: _Optional[int] = ...) -> None: ...

class JobEstimate(_message.Message):
    __slots__ = ("steps", "tokens", "label_tokens", "evaluation_tokens", "encoding", "bytes_up", "bytes_down", "bank_bytes", "base_seconds", "seconds", "share", "meets_deadline", "assumptions")
    STEPS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    LABEL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    EVALUATION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    BYTES_UP_FIELD_NUMBER: _ClassVar[int]
    BYTES_DOWN_FIELD_NUMBER: _ClassVar[int]
    BANK_BYTES_FIELD_NUMBER: _ClassVar[int]
    BASE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    MEETS_DEADLINE_FIELD_NUMBER: _ClassVar[int]
    ASSUMPTIONS_FIELD_NUMBER: _ClassVar[int]
    steps: int
    tokens: int
    label_tokens: int
    evaluation_tokens: int
    encoding: str
    bytes_up: int
    bytes_down: int
    bank_bytes: int
    base_seconds: float
    seconds: float
    share: float
    meets_deadline: bool
    assumptions: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, steps: _Optional[int] = ..., tokens: _Optional[int] = ..., label_tokens: _Optional[int] = ..., evaluation_tokens: _Optional[int] = ..., encoding: _Optional[str] = ..., bytes_up: _Optional[int] = ..., bytes_down: _Optional[int] = ..., bank_bytes: _Optional[int] = ..., base_seconds: _Optional[float] = ..., seconds: _Optional[float] = ..., share: _Optional[float] = ..., meets_deadline: _Optional[bool] = ..., assumptions: _Optional[_Iterable[str]] = ...) -> None: ...

class JobRef(_message.Message):
    __slots__ = ("job_id",)
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    def __init__(self, job_id: _Optional[str] = ...) -> None: ...

class Job(_message.Message):
    __slots__ = ("job_id", "name", "state", "base_model", "version", "total_steps", "device_id", "waiting_reason", "created_at", "finished_at", "failure_reason", "failure_message", "evaluation_loss_before", "evaluation_loss_after", "last_loss", "tokens", "label_tokens", "bytes_up", "bytes_down", "spec_json", "tenant", "encoding", "base_seconds", "device_seconds", "evaluation_tokens", "repeated_steps", "deadline_at", "deadline_missed_at", "replica", "stale")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    BASE_MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TOTAL_STEPS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_ID_FIELD_NUMBER: _ClassVar[int]
    WAITING_REASON_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    FINISHED_AT_FIELD_NUMBER: _ClassVar[int]
    FAILURE_REASON_FIELD_NUMBER: _ClassVar[int]
    FAILURE_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    EVALUATION_LOSS_BEFORE_FIELD_NUMBER: _ClassVar[int]
    EVALUATION_LOSS_AFTER_FIELD_NUMBER: _ClassVar[int]
    LAST_LOSS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    LABEL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BYTES_UP_FIELD_NUMBER: _ClassVar[int]
    BYTES_DOWN_FIELD_NUMBER: _ClassVar[int]
    SPEC_JSON_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    BASE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    EVALUATION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REPEATED_STEPS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_AT_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MISSED_AT_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    STALE_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    name: str
    state: str
    base_model: str
    version: int
    total_steps: int
    device_id: str
    waiting_reason: str
    created_at: str
    finished_at: str
    failure_reason: str
    failure_message: str
    evaluation_loss_before: float
    evaluation_loss_after: float
    last_loss: float
    tokens: int
    label_tokens: int
    bytes_up: int
    bytes_down: int
    spec_json: str
    tenant: str
    encoding: str
    base_seconds: float
    device_seconds: float
    evaluation_tokens: int
    repeated_steps: int
    deadline_at: str
    deadline_missed_at: str
    replica: str
    stale: bool
    def __init__(self, job_id: _Optional[str] = ..., name: _Optional[str] = ..., state: _Optional[str] = ..., base_model: _Optional[str] = ..., version: _Optional[int] = ..., total_steps: _Optional[int] = ..., device_id: _Optional[str] = ..., waiting_reason: _Optional[str] = ..., created_at: _Optional[str] = ..., finished_at: _Optional[str] = ..., failure_reason: _Optional[str] = ..., failure_message: _Optional[str] = ..., evaluation_loss_before: _Optional[float] = ..., evaluation_loss_after: _Optional[float] = ..., last_loss: _Optional[float] = ..., tokens: _Optional[int] = ..., label_tokens: _Optional[int] = ..., bytes_up: _Optional[int] = ..., bytes_down: _Optional[int] = ..., spec_json: _Optional[str] = ..., tenant: _Optional[str] = ..., encoding: _Optional[str] = ..., base_seconds: _Optional[float] = ..., device_seconds: _Optional[float] = ..., evaluation_tokens: _Optional[int] = ..., repeated_steps: _Optional[int] = ..., deadline_at: _Optional[str] = ..., deadline_missed_at: _Optional[str] = ..., replica: _Optional[str] = ..., stale: _Optional[bool] = ...) -> None: ...

class ListJobsRequest(_message.Message):
    __slots__ = ("limit", "after")
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    limit: int
    after: str
    def __init__(self, limit: _Optional[int] = ..., after: _Optional[str] = ...) -> None: ...

class ListJobsResponse(_message.Message):
    __slots__ = ("jobs",)
    JOBS_FIELD_NUMBER: _ClassVar[int]
    jobs: _containers.RepeatedCompositeFieldContainer[Job]
    def __init__(self, jobs: _Optional[_Iterable[_Union[Job, _Mapping]]] = ...) -> None: ...

class WatchEventsRequest(_message.Message):
    __slots__ = ("job_id", "after", "follow")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    FOLLOW_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    after: int
    follow: bool
    def __init__(self, job_id: _Optional[str] = ..., after: _Optional[int] = ..., follow: _Optional[bool] = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("id", "job_id", "created_at", "kind", "level", "message", "data_json")
    ID_FIELD_NUMBER: _ClassVar[int]
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    DATA_JSON_FIELD_NUMBER: _ClassVar[int]
    id: int
    job_id: str
    created_at: str
    kind: str
    level: str
    message: str
    data_json: str
    def __init__(self, id: _Optional[int] = ..., job_id: _Optional[str] = ..., created_at: _Optional[str] = ..., kind: _Optional[str] = ..., level: _Optional[str] = ..., message: _Optional[str] = ..., data_json: _Optional[str] = ...) -> None: ...

class ListStepsRequest(_message.Message):
    __slots__ = ("job_id", "after", "limit")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    after: int
    limit: int
    def __init__(self, job_id: _Optional[str] = ..., after: _Optional[int] = ..., limit: _Optional[int] = ...) -> None: ...

class Step(_message.Message):
    __slots__ = ("step", "loss", "learning_rate", "gradient_norm", "tokens", "label_tokens", "bytes_up", "bytes_down", "base_seconds", "device_seconds", "device_id", "epoch", "applied_at")
    STEP_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_NORM_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    LABEL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BYTES_UP_FIELD_NUMBER: _ClassVar[int]
    BYTES_DOWN_FIELD_NUMBER: _ClassVar[int]
    BASE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    APPLIED_AT_FIELD_NUMBER: _ClassVar[int]
    step: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    label_tokens: int
    bytes_up: int
    bytes_down: int
    base_seconds: float
    device_seconds: float
    device_id: str
    epoch: int
    applied_at: str
    def __init__(self, step: _Optional[int] = ..., loss: _Optional[float] = ..., learning_rate: _Optional[float] = ..., gradient_norm: _Optional[float] = ..., tokens: _Optional[int] = ..., label_tokens: _Optional[int] = ..., bytes_up: _Optional[int] = ..., bytes_down: _Optional[int] = ..., base_seconds: _Optional[float] = ..., device_seconds: _Optional[float] = ..., device_id: _Optional[str] = ..., epoch: _Optional[int] = ..., applied_at: _Optional[str] = ...) -> None: ...

class ListStepsResponse(_message.Message):
    __slots__ = ("steps",)
    STEPS_FIELD_NUMBER: _ClassVar[int]
    steps: _containers.RepeatedCompositeFieldContainer[Step]
    def __init__(self, steps: _Optional[_Iterable[_Union[Step, _Mapping]]] = ...) -> None: ...

class ListEvaluationsRequest(_message.Message):
    __slots__ = ("job_id", "after", "limit")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    after: int
    limit: int
    def __init__(self, job_id: _Optional[str] = ..., after: _Optional[int] = ..., limit: _Optional[int] = ...) -> None: ...

class Evaluation(_message.Message):
    __slots__ = ("step", "metrics", "primary", "greater_is_better", "best", "created_at")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    STEP_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    PRIMARY_FIELD_NUMBER: _ClassVar[int]
    GREATER_IS_BETTER_FIELD_NUMBER: _ClassVar[int]
    BEST_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    step: int
    metrics: _containers.ScalarMap[str, float]
    primary: str
    greater_is_better: bool
    best: bool
    created_at: str
    def __init__(self, step: _Optional[int] = ..., metrics: _Optional[_Mapping[str, float]] = ..., primary: _Optional[str] = ..., greater_is_better: _Optional[bool] = ..., best: _Optional[bool] = ..., created_at: _Optional[str] = ...) -> None: ...

class ListEvaluationsResponse(_message.Message):
    __slots__ = ("evaluations",)
    EVALUATIONS_FIELD_NUMBER: _ClassVar[int]
    evaluations: _containers.RepeatedCompositeFieldContainer[Evaluation]
    def __init__(self, evaluations: _Optional[_Iterable[_Union[Evaluation, _Mapping]]] = ...) -> None: ...

class Checkpoint(_message.Message):
    __slots__ = ("version", "bytes", "sha256", "created_at", "best", "pinned")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    BEST_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    version: int
    bytes: int
    sha256: str
    created_at: str
    best: bool
    pinned: bool
    def __init__(self, version: _Optional[int] = ..., bytes: _Optional[int] = ..., sha256: _Optional[str] = ..., created_at: _Optional[str] = ..., best: _Optional[bool] = ..., pinned: _Optional[bool] = ...) -> None: ...

class PinCheckpointRequest(_message.Message):
    __slots__ = ("job_id", "version")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    version: int
    def __init__(self, job_id: _Optional[str] = ..., version: _Optional[int] = ...) -> None: ...

class UnpinCheckpointRequest(_message.Message):
    __slots__ = ("job_id", "version")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    version: int
    def __init__(self, job_id: _Optional[str] = ..., version: _Optional[int] = ...) -> None: ...

class ListCheckpointsResponse(_message.Message):
    __slots__ = ("checkpoints",)
    CHECKPOINTS_FIELD_NUMBER: _ClassVar[int]
    checkpoints: _containers.RepeatedCompositeFieldContainer[Checkpoint]
    def __init__(self, checkpoints: _Optional[_Iterable[_Union[Checkpoint, _Mapping]]] = ...) -> None: ...

class ExportAdapterRequest(_message.Message):
    __slots__ = ("job_id", "version", "best")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    BEST_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    version: int
    best: bool
    def __init__(self, job_id: _Optional[str] = ..., version: _Optional[int] = ..., best: _Optional[bool] = ...) -> None: ...

class FileChunk(_message.Message):
    __slots__ = ("file_name", "content")
    FILE_NAME_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    file_name: str
    content: bytes
    def __init__(self, file_name: _Optional[str] = ..., content: _Optional[bytes] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("job_id", "base_model", "prompt", "messages_json", "max_new_tokens", "temperature", "seed")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    BASE_MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_JSON_FIELD_NUMBER: _ClassVar[int]
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    base_model: str
    prompt: str
    messages_json: str
    max_new_tokens: int
    temperature: float
    seed: int
    def __init__(self, job_id: _Optional[str] = ..., base_model: _Optional[str] = ..., prompt: _Optional[str] = ..., messages_json: _Optional[str] = ..., max_new_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., seed: _Optional[int] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("text", "prompt_tokens", "completion_tokens", "adapter_version")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_VERSION_FIELD_NUMBER: _ClassVar[int]
    text: str
    prompt_tokens: int
    completion_tokens: int
    adapter_version: int
    def __init__(self, text: _Optional[str] = ..., prompt_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., adapter_version: _Optional[int] = ...) -> None: ...

class DescribeServiceRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class BaseModelInfo(_message.Message):
    __slots__ = ("name", "architecture", "context_length", "dtype", "parameters", "sites", "details", "replicas")
    class DetailsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    SITES_FIELD_NUMBER: _ClassVar[int]
    DETAILS_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    name: str
    architecture: str
    context_length: int
    dtype: str
    parameters: int
    sites: _containers.RepeatedScalarFieldContainer[str]
    details: _containers.ScalarMap[str, str]
    replicas: _containers.RepeatedCompositeFieldContainer[ReplicaInfo]
    def __init__(self, name: _Optional[str] = ..., architecture: _Optional[str] = ..., context_length: _Optional[int] = ..., dtype: _Optional[str] = ..., parameters: _Optional[int] = ..., sites: _Optional[_Iterable[str]] = ..., details: _Optional[_Mapping[str, str]] = ..., replicas: _Optional[_Iterable[_Union[ReplicaInfo, _Mapping]]] = ...) -> None: ...

class ReplicaInfo(_message.Message):
    __slots__ = ("replica", "state", "jobs", "base_busy_seconds", "base_steps", "tokens", "bank_hits", "bank_misses", "bank_evicted_bytes", "bank_resident_bytes")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    JOBS_FIELD_NUMBER: _ClassVar[int]
    BASE_BUSY_SECONDS_FIELD_NUMBER: _ClassVar[int]
    BASE_STEPS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    BANK_HITS_FIELD_NUMBER: _ClassVar[int]
    BANK_MISSES_FIELD_NUMBER: _ClassVar[int]
    BANK_EVICTED_BYTES_FIELD_NUMBER: _ClassVar[int]
    BANK_RESIDENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    replica: str
    state: str
    jobs: int
    base_busy_seconds: float
    base_steps: int
    tokens: int
    bank_hits: int
    bank_misses: int
    bank_evicted_bytes: int
    bank_resident_bytes: int
    def __init__(self, replica: _Optional[str] = ..., state: _Optional[str] = ..., jobs: _Optional[int] = ..., base_busy_seconds: _Optional[float] = ..., base_steps: _Optional[int] = ..., tokens: _Optional[int] = ..., bank_hits: _Optional[int] = ..., bank_misses: _Optional[int] = ..., bank_evicted_bytes: _Optional[int] = ..., bank_resident_bytes: _Optional[int] = ...) -> None: ...

class DeviceInfo(_message.Message):
    __slots__ = ("device_id", "state", "jobs", "busy_seconds", "trust_class", "pid")
    DEVICE_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    JOBS_FIELD_NUMBER: _ClassVar[int]
    BUSY_SECONDS_FIELD_NUMBER: _ClassVar[int]
    TRUST_CLASS_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    device_id: str
    state: str
    jobs: int
    busy_seconds: float
    trust_class: str
    pid: int
    def __init__(self, device_id: _Optional[str] = ..., state: _Optional[str] = ..., jobs: _Optional[int] = ..., busy_seconds: _Optional[float] = ..., trust_class: _Optional[str] = ..., pid: _Optional[int] = ...) -> None: ...

class ServiceDescription(_message.Message):
    __slots__ = ("version", "tenant", "base_models", "devices", "base_busy_seconds", "uptime_seconds", "base_steps", "quarantined_devices", "degraded")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    BASE_MODELS_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    BASE_BUSY_SECONDS_FIELD_NUMBER: _ClassVar[int]
    UPTIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    BASE_STEPS_FIELD_NUMBER: _ClassVar[int]
    QUARANTINED_DEVICES_FIELD_NUMBER: _ClassVar[int]
    DEGRADED_FIELD_NUMBER: _ClassVar[int]
    version: str
    tenant: str
    base_models: _containers.RepeatedCompositeFieldContainer[BaseModelInfo]
    devices: _containers.RepeatedCompositeFieldContainer[DeviceInfo]
    base_busy_seconds: float
    uptime_seconds: float
    base_steps: int
    quarantined_devices: _containers.RepeatedScalarFieldContainer[str]
    degraded: str
    def __init__(self, version: _Optional[str] = ..., tenant: _Optional[str] = ..., base_models: _Optional[_Iterable[_Union[BaseModelInfo, _Mapping]]] = ..., devices: _Optional[_Iterable[_Union[DeviceInfo, _Mapping]]] = ..., base_busy_seconds: _Optional[float] = ..., uptime_seconds: _Optional[float] = ..., base_steps: _Optional[int] = ..., quarantined_devices: _Optional[_Iterable[str]] = ..., degraded: _Optional[str] = ...) -> None: ...

class GetUsageRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListUsageRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListUsageResponse(_message.Message):
    __slots__ = ("usage",)
    USAGE_FIELD_NUMBER: _ClassVar[int]
    usage: _containers.RepeatedCompositeFieldContainer[Usage]
    def __init__(self, usage: _Optional[_Iterable[_Union[Usage, _Mapping]]] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("tenant", "jobs", "steps", "repeated_steps", "tokens", "label_tokens", "evaluation_tokens", "base_seconds", "device_seconds", "bytes_up", "bytes_down")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    JOBS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    REPEATED_STEPS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    LABEL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    EVALUATION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BASE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    BYTES_UP_FIELD_NUMBER: _ClassVar[int]
    BYTES_DOWN_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    jobs: int
    steps: int
    repeated_steps: int
    tokens: int
    label_tokens: int
    evaluation_tokens: int
    base_seconds: float
    device_seconds: float
    bytes_up: int
    bytes_down: int
    def __init__(self, tenant: _Optional[str] = ..., jobs: _Optional[int] = ..., steps: _Optional[int] = ..., repeated_steps: _Optional[int] = ..., tokens: _Optional[int] = ..., label_tokens: _Optional[int] = ..., evaluation_tokens: _Optional[int] = ..., base_seconds: _Optional[float] = ..., device_seconds: _Optional[float] = ..., bytes_up: _Optional[int] = ..., bytes_down: _Optional[int] = ...) -> None: ...

class StartTraceRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StartTraceResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StopTraceRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CreateKeyRequest(_message.Message):
    __slots__ = ("tenant", "scopes", "weight", "tokens_per_minute", "concurrent_jobs", "total_steps", "pinned_bytes", "expires_in_seconds")
    TENANT_FIELD_NUMBER: _ClassVar[int]
    SCOPES_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_MINUTE_FIELD_NUMBER: _ClassVar[int]
    CONCURRENT_JOBS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_STEPS_FIELD_NUMBER: _ClassVar[int]
    PINNED_BYTES_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_IN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    tenant: str
    scopes: _containers.RepeatedScalarFieldContainer[str]
    weight: float
    tokens_per_minute: int
    concurrent_jobs: int
    total_steps: int
    pinned_bytes: int
    expires_in_seconds: int
    def __init__(self, tenant: _Optional[str] = ..., scopes: _Optional[_Iterable[str]] = ..., weight: _Optional[float] = ..., tokens_per_minute: _Optional[int] = ..., concurrent_jobs: _Optional[int] = ..., total_steps: _Optional[int] = ..., pinned_bytes: _Optional[int] = ..., expires_in_seconds: _Optional[int] = ...) -> None: ...

class Key(_message.Message):
    __slots__ = ("key_id", "tenant", "scopes", "created_at", "last_used_at", "revoked_at", "expires_at")
    KEY_ID_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    SCOPES_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    LAST_USED_AT_FIELD_NUMBER: _ClassVar[int]
    REVOKED_AT_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    key_id: str
    tenant: str
    scopes: _containers.RepeatedScalarFieldContainer[str]
    created_at: str
    last_used_at: str
    revoked_at: str
    expires_at: str
    def __init__(self, key_id: _Optional[str] = ..., tenant: _Optional[str] = ..., scopes: _Optional[_Iterable[str]] = ..., created_at: _Optional[str] = ..., last_used_at: _Optional[str] = ..., revoked_at: _Optional[str] = ..., expires_at: _Optional[str] = ...) -> None: ...

class NewKey(_message.Message):
    __slots__ = ("key", "tenant", "scopes", "weight", "tokens_per_minute", "concurrent_jobs", "total_steps", "pinned_bytes")
    KEY_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    SCOPES_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_MINUTE_FIELD_NUMBER: _ClassVar[int]
    CONCURRENT_JOBS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_STEPS_FIELD_NUMBER: _ClassVar[int]
    PINNED_BYTES_FIELD_NUMBER: _ClassVar[int]
    key: str
    tenant: str
    scopes: _containers.RepeatedScalarFieldContainer[str]
    weight: float
    tokens_per_minute: int
    concurrent_jobs: int
    total_steps: int
    pinned_bytes: int
    def __init__(self, key: _Optional[str] = ..., tenant: _Optional[str] = ..., scopes: _Optional[_Iterable[str]] = ..., weight: _Optional[float] = ..., tokens_per_minute: _Optional[int] = ..., concurrent_jobs: _Optional[int] = ..., total_steps: _Optional[int] = ..., pinned_bytes: _Optional[int] = ...) -> None: ...

class ListKeysRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListKeysResponse(_message.Message):
    __slots__ = ("keys",)
    KEYS_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedCompositeFieldContainer[Key]
    def __init__(self, keys: _Optional[_Iterable[_Union[Key, _Mapping]]] = ...) -> None: ...

class RevokeKeyRequest(_message.Message):
    __slots__ = ("key_id",)
    KEY_ID_FIELD_NUMBER: _ClassVar[int]
    key_id: str
    def __init__(self, key_id: _Optional[str] = ...) -> None: ...
