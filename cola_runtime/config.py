"""Every setting, in one frozen tree. The only module that reads a setting from the environment.

Precedence: default < YAML file < environment (`COLA_...`, nested with `__`, of a list's entries with their
numbers) < flag. An unknown key in the file or among the flags is an error that names its path.
"""

from __future__ import annotations

import ipaddress
import os
import re
from itertools import combinations, zip_longest
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    IPvAnyAddress,
    SecretStr,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from cola_runtime.errors import InvalidInput, Violation

DEFAULT_GRPC_PORT = 8421
DEFAULT_DEVICE_PORT = 8423
ENVIRONMENT_PREFIX = "COLA_"
MIB = 1 << 20

HostPort = Annotated[str, StringConstraints(pattern=r"^.+:[0-9]{1,5}$")]
Seconds = Annotated[float, Field(gt=0, le=3600)]
S = TypeVar("S", bound="_Settings")


def _split(value: Any) -> Any:
    """The environment writes a list as `one,two`."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


PythonModules = Annotated[
    tuple[
        Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*$")], ...
    ],
    BeforeValidator(_split),
]


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ClientSettings(_Settings):
    """What the SDK and the CLI need to reach a service."""

    base_url: str = f"grpc://127.0.0.1:{DEFAULT_GRPC_PORT}"
    """`grpcs://` is TLS; `grpc://` is not, and for this machine only."""
    api_key: SecretStr = SecretStr("")
    ca: Path | None = None
    """Certificates (PEM) that the service's must come from; None: those the system trusts."""


class BaseModelSettings(_Settings):
    """A frozen base model and how it is computed."""

    name: Annotated[str, Field(min_length=1, max_length=200)] = "smollm2-135m-instruct"
    """A known alias, or the name that jobs give when `path` is set."""
    path: Path | None = None
    """A local folder in transformers' format; None looks the alias up."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    attention: Literal["auto", "eager", "sdpa"] = "auto"
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """Where it computes (docs/accelerators.md); auto: on a CUDA device where there is one."""
    quantization: Literal["none", "int8", "nf4"] = "none"
    """How the adapted layers' frozen weights are held (docs/base_precision.md); needs bitsandbytes."""
    activation_checkpointing: bool = False
    """Keep each layer's input only and compute the layer again in the backward pass: less memory, more time
    (docs/performance.md)."""
    tiled_weights: bool = True
    """In bfloat16 on a CPU: keep the weights of a Llama's layers and of the vocabulary projection in the
    processor's own layout too, where a trial finds that faster. Costs twice their memory once more
    (docs/performance.md)."""
    threads: Annotated[int, Field(ge=1, le=256)] = 1
    replicas: Annotated[int, Field(ge=1, le=64)] = 1
    """Processes that compute it, each with base steps of its own (docs/scheduling.md)."""
    token_budget: Annotated[int, Field(ge=1, le=1 << 24)] | None = None
    """Instead of `scheduler.token_budget`."""
    bank_bytes: Annotated[int, Field(ge=1, le=1 << 45)] | None = None
    """Of adapters' weights on its device at a time, in each replica; None: of all that train."""
    bind: HostPort = "127.0.0.1:0"
    """Where its gradient server listens; replica n at the port + n, and each at a free one for port 0."""
    advertise: HostPort | None = None
    """host:port that devices use to reach `bind`, of replica n at the port + n; None: the same."""

    @property
    def listens_at(self) -> set[int]:
        """The fixed ports of all replicas."""
        first = int(self.bind.rpartition(":")[2])
        return set(range(first, first + self.replicas)) if first else set()

    def of_replica(self, number: int) -> BaseModelSettings:
        """What one replica is started with."""
        ends = {"bind": _shifted(self.bind, number)}
        if self.advertise is not None:
            ends["advertise"] = _shifted(self.advertise, number)
        return self.model_copy(update=ends)


class DeviceSettings(_Settings):
    """The trusted devices that Ray places; others join with `cola device`."""

    count: Annotated[int, Field(ge=0, le=4096)] = 2
    threads: Annotated[int, Field(ge=1, le=256)] = 1
    credit_bytes: Annotated[int, Field(ge=MIB, le=64 << 30)] = 64 * MIB
    """Gradient bytes that may be in flight towards one device."""
    heartbeat_seconds: Seconds = 2.0
    lease_timeout_seconds: Seconds = 10.0
    """Silence after which a device counts as lost."""
    rebalance_seconds: Seconds = 30.0
    """At most one job in so many seconds is moved to a device that would be through with it sooner."""
    listen: str | None = None
    """With TLS: where devices dial in; None: port 8423 beside `listen`."""
    advertise: str | None = None
    """host:port that devices use to reach it; None: the same."""
    certificate_days: Annotated[int, Field(ge=1, le=825)] = 30
    """Life of a device's certificate; it renews it by itself."""


class HostSettings(_Settings):
    """What one host may have under way at the coordinator's ports, and at each base model's."""

    calls: Annotated[int, Field(ge=1)] = 1024
    unknown_calls: Annotated[int, Field(ge=1)] = 512
    """Of these, whose key, token or certificate has not been looked at yet."""
    proxies: tuple[IPvAnyAddress, ...] = ()
    """Whose connections are many hosts'. They have no cap here: the proxy must have one."""


class TlsSettings(_Settings):
    """The operator's certificate (docs/security.md). Without one the service listens on loopback only."""

    certificate: Path | None = None
    """PEM, with its chain. Read again when the file changes, for connections from then on."""
    key: Path | None = None

    @model_validator(mode="after")
    def _both_or_none(self) -> TlsSettings:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("give certificate and key, or neither")
        return self


class SchedulerSettings(_Settings):
    token_budget: Annotated[int, Field(ge=1, le=1 << 24)] = 1024
    """Most tokens, padding included, in one base step."""
    base_steps_in_flight: Annotated[int, Field(ge=1, le=16)] = 2
    rebalance_seconds: Seconds = 30.0
    """How often jobs may be moved to a replica of their base model that has less to do."""


class PlannerSettings(_Settings):
    """What the encodings' cost model takes as given (docs/encodings.md)."""

    link_bytes_per_second: Annotated[float, Field(gt=0, le=1e15)] = 125e6
    """From the base model to one device; the default is 1 Gbit/s."""
    accelerator_flops: Annotated[float, Field(gt=0, le=1e18)] | None = None
    """Matrix products of the base model's machine; None: as measured when the base model was loaded."""
    device_flops: Annotated[float, Field(gt=0, le=1e18)] = 5e10
    """Float32 matrix products of one device; the default is about one CPU core's."""


class SpotCheckSettings(_Settings):
    """Share of a device's steps that a trusted device makes again, by trust class (docs/security.md)."""

    community: Annotated[float, Field(ge=0, le=1)] = 0.02
    trusted: Annotated[float, Field(ge=0, le=1)] = 0.0


class RetentionSettings(_Settings):
    """Which of a job's checkpoints are kept, beside the best evaluation's and the newest: None keeps all."""

    keep_last: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    max_bytes_per_job: Annotated[int, Field(ge=MIB, le=1 << 50)] | None = None


class ServiceSettings(_Settings):
    """Everything that `cola serve` runs with."""

    data_dir: Path = Path("cola-data")
    """Job store, datasets, checkpoints, join token."""
    database: SecretStr | None = None
    """`postgresql://user@host/name` of the job store; None: SQLite, in the data folder (docs/deploy.md)."""
    listen: str = f"127.0.0.1:{DEFAULT_GRPC_PORT}"
    """Where SDK and CLI dial in, and without TLS devices."""
    base_models: Annotated[tuple[BaseModelSettings, ...], Field(min_length=1)] = (BaseModelSettings(),)
    """The first is meant where a request names none. `COLA_BASE_MODELS__0__NAME` and flags are its."""
    devices: DeviceSettings = DeviceSettings()
    scheduler: SchedulerSettings = SchedulerSettings()
    planner: PlannerSettings = PlannerSettings()
    retention: RetentionSettings = RetentionSettings()
    active_jobs: Annotated[int, Field(ge=1, le=100_000)] = 64
    """Of one tenant, that have not ended; one more is refused (`QUOTA_JOBS`). Each has its rows in memory."""
    spot_checks: SpotCheckSettings = SpotCheckSettings()
    tls: TlsSettings = TlsSettings()
    hosts: HostSettings = HostSettings()
    ray_address: str | None = None
    """An existing cluster; None starts one on this machine."""
    cache_dir: Path = Path(".cache/models")
    """Converted base models."""
    adapter_modules: PythonModules = ()
    """Python modules of the operator that register adapter modules (docs/adapter_kinds.md)."""

    @field_validator("database")
    @classmethod
    def _is_postgresql(cls, url: SecretStr | None) -> SecretStr | None:
        if url is not None and not url.get_secret_value().startswith("postgresql://"):
            raise ValueError("it begins with postgresql://")  # it holds a password: not repeated here
        return url

    @property
    def store_file(self) -> Path:
        """Where SQLite keeps the job store, unless there is a `database`."""
        return self.data_dir / "jobs.sqlite"

    @property
    def ray_token(self) -> Path:
        """What a Ray of our own asks its callers for."""
        return self.data_dir / "ray-token"

    @property
    def store_url(self) -> str:
        """May hold a password."""
        if self.database is not None:
            return self.database.get_secret_value()
        return f"sqlite:///{self.store_file.resolve()}"

    @model_validator(mode="after")
    def _distinct_base_models(self) -> ServiceSettings:
        for one, other in combinations(self.base_models, 2):
            if one.name == other.name:
                raise ValueError(f"two base models are named {one.name}; use `replicas` for more of one")
            common = one.listens_at & other.listens_at
            if common:
                raise ValueError(f"{one.name} and {other.name} both listen on port {min(common)}")
        return self


class JoinSettings(_Settings):
    """What `cola device` needs to join a service."""

    coordinator: str = f"127.0.0.1:{DEFAULT_GRPC_PORT}"
    """`grpcs://host:port` is TLS."""
    ca: Path | None = None
    """Certificates (PEM) that the service's must come from; None: those the system trusts."""
    identity_dir: Path = Path("cola-device")
    """With TLS: where the device keeps its certificate and key."""
    join_token: SecretStr = SecretStr("")
    device_id: str | None = None
    threads: Annotated[int, Field(ge=1, le=256)] = 1
    credit_bytes: Annotated[int, Field(ge=MIB, le=64 << 30)] = 64 * MIB
    adapter_modules: PythonModules = ()
    """As the service's: a device trains only what is registered in its own process."""


def client_settings(**flags: Any) -> ClientSettings:
    return _load(ClientSettings, {}, flags, source="settings")


def join_settings(**flags: Any) -> JoinSettings:
    return _load(JoinSettings, {}, flags, source="settings")


def service_settings(file: Path | None = None, **flags: Any) -> ServiceSettings:
    """Merge file, environment and flags. Flags are nested dicts; None means not given."""
    flags.setdefault("ray_address", os.environ.get("RAY_ADDRESS"))
    return _load(ServiceSettings, _read_file(file), flags, source=str(file or "settings"))


def log_level() -> str:
    return os.environ.get(f"{ENVIRONMENT_PREFIX}LOG", "WARNING")


def crash_setting() -> str | None:
    """Where this process is to die, for tests of recovery (crash_points.py); None: nowhere."""
    return os.environ.get(f"{ENVIRONMENT_PREFIX}CRASH_AT") or None


def is_loopback(endpoint: str) -> bool:
    """`host:port` is reached from this machine only."""
    host = endpoint.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _load(model: type[S], file: dict[str, Any], flags: dict[str, Any], *, source: str) -> S:
    merged = _merge(_merge(file, _environment(model)), _without_none(flags))
    try:
        return model.model_validate(merged)
    except ValidationError as error:
        violations = tuple(
            Violation(where=".".join(str(part) for part in item["loc"]), message=item["msg"])
            for item in error.errors(include_url=False)
        )
        text = "; ".join(f"{violation.where}: {violation.message}" for violation in violations)
        raise InvalidInput(
            "SETTING_INVALID",
            text,
            where=source,
            remedy="`cola config schema` lists every setting.",
            violations=violations,
        ) from error


def _environment(model: type[_Settings], prefix: str = ENVIRONMENT_PREFIX) -> dict[str, Any]:
    """Values of `COLA_FIELD` and `COLA_GROUP__FIELD` for the fields of `model`."""
    values: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        key = prefix + name.upper()
        element = next(iter(get_args(field.annotation)), None)
        if isinstance(field.annotation, type) and issubclass(field.annotation, _Settings):
            values[name] = _environment(field.annotation, f"{key}__")
        elif isinstance(element, type) and issubclass(element, _Settings):
            given = (re.match(rf"{key}__(\d{{1,3}})__", each) for each in os.environ)
            count = max((int(found[1]) + 1 for found in given if found), default=0)
            entries = [_environment(element, f"{key}__{number}__") for number in range(count)]
            values[name] = entries or {}
        elif os.environ.get(key):
            values[name] = os.environ[key]
    return {name: value for name, value in values.items() if value != {}}


def _read_file(file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidInput("SETTING_FILE", f"cannot read settings: {error}", where=str(file)) from error
    if not isinstance(content, dict | None):
        raise InvalidInput("SETTING_FILE", "settings must be a mapping of names to values", where=str(file))
    return content or {}


def _merge(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    merged = dict(low)
    for name, value in high.items():
        below = merged.get(name)
        if isinstance(value, dict) and isinstance(below, dict):
            merged[name] = _merge(below, value)
        elif _are_entries(value) and _are_entries(below):
            nothing: dict[str, Any] = {}
            both = zip_longest(below or (), value, fillvalue=nothing)
            merged[name] = [_merge(one, other) for one, other in both]
        else:
            merged[name] = value
    return merged


def _are_entries(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)


def _shifted(endpoint: str, by: int) -> str:
    """`host:port + by`; of port 0 the same."""
    host, _, port = endpoint.rpartition(":")
    return f"{host}:{int(port) + by if int(port) else 0}"


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            kept[name] = _without_none(value)
        elif _are_entries(value):
            entries = [_without_none(entry) for entry in value]
            kept[name] = entries if any(entries) else {}
        else:
            kept[name] = value
    return {name: value for name, value in kept.items() if value is not None and value != {}}
