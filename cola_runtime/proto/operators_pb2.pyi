from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class CreateJoinTokenRequest(_message.Message):
    __slots__ = ("trust_class", "reusable", "valid_seconds")
    TRUST_CLASS_FIELD_NUMBER: _ClassVar[int]
    REUSABLE_FIELD_NUMBER: _ClassVar[int]
    VALID_SECONDS_FIELD_NUMBER: _ClassVar[int]
    trust_class: str
    reusable: bool
    valid_seconds: int
    def __init__(self, trust_class: _Optional[str] = ..., reusable: _Optional[bool] = ..., valid_seconds: _Optional[int] = ...) -> None: ...

class JoinToken(_message.Message):
    __slots__ = ("token", "token_id", "trust_class", "reusable", "expires_at")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    TRUST_CLASS_FIELD_NUMBER: _ClassVar[int]
    REUSABLE_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    token: str
    token_id: str
    trust_class: str
    reusable: bool
    expires_at: str
    def __init__(self, token: _Optional[str] = ..., token_id: _Optional[str] = ..., trust_class: _Optional[str] = ..., reusable: _Optional[bool] = ..., expires_at: _Optional[str] = ...) -> None: ...

class ListDevicesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RegisteredDevice(_message.Message):
    __slots__ = ("device_id", "trust_class", "joined_at", "expires_at", "revoked_at", "quarantined_at", "quarantine_reason", "quarantine_message")
    DEVICE_ID_FIELD_NUMBER: _ClassVar[int]
    TRUST_CLASS_FIELD_NUMBER: _ClassVar[int]
    JOINED_AT_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    REVOKED_AT_FIELD_NUMBER: _ClassVar[int]
    QUARANTINED_AT_FIELD_NUMBER: _ClassVar[int]
    QUARANTINE_REASON_FIELD_NUMBER: _ClassVar[int]
    QUARANTINE_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    device_id: str
    trust_class: str
    joined_at: str
    expires_at: str
    revoked_at: str
    quarantined_at: str
    quarantine_reason: str
    quarantine_message: str
    def __init__(self, device_id: _Optional[str] = ..., trust_class: _Optional[str] = ..., joined_at: _Optional[str] = ..., expires_at: _Optional[str] = ..., revoked_at: _Optional[str] = ..., quarantined_at: _Optional[str] = ..., quarantine_reason: _Optional[str] = ..., quarantine_message: _Optional[str] = ...) -> None: ...

class ListDevicesResponse(_message.Message):
    __slots__ = ("devices",)
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    devices: _containers.RepeatedCompositeFieldContainer[RegisteredDevice]
    def __init__(self, devices: _Optional[_Iterable[_Union[RegisteredDevice, _Mapping]]] = ...) -> None: ...

class RevokeDeviceRequest(_message.Message):
    __slots__ = ("device_id",)
    DEVICE_ID_FIELD_NUMBER: _ClassVar[int]
    device_id: str
    def __init__(self, device_id: _Optional[str] = ...) -> None: ...

class ReinstateDeviceRequest(_message.Message):
    __slots__ = ("device_id",)
    DEVICE_ID_FIELD_NUMBER: _ClassVar[int]
    device_id: str
    def __init__(self, device_id: _Optional[str] = ...) -> None: ...

class ListAuditRequest(_message.Message):
    __slots__ = ("after", "limit")
    AFTER_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    after: int
    limit: int
    def __init__(self, after: _Optional[int] = ..., limit: _Optional[int] = ...) -> None: ...

class AuditEntry(_message.Message):
    __slots__ = ("id", "created_at", "kind", "actor", "tenant", "subject", "message")
    ID_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    ACTOR_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    SUBJECT_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    id: int
    created_at: str
    kind: str
    actor: str
    tenant: str
    subject: str
    message: str
    def __init__(self, id: _Optional[int] = ..., created_at: _Optional[str] = ..., kind: _Optional[str] = ..., actor: _Optional[str] = ..., tenant: _Optional[str] = ..., subject: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class ListAuditResponse(_message.Message):
    __slots__ = ("entries",)
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[AuditEntry]
    def __init__(self, entries: _Optional[_Iterable[_Union[AuditEntry, _Mapping]]] = ...) -> None: ...

class JoinDeviceRequest(_message.Message):
    __slots__ = ("join_token", "device_id", "certificate_request")
    JOIN_TOKEN_FIELD_NUMBER: _ClassVar[int]
    DEVICE_ID_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_REQUEST_FIELD_NUMBER: _ClassVar[int]
    join_token: str
    device_id: str
    certificate_request: bytes
    def __init__(self, join_token: _Optional[str] = ..., device_id: _Optional[str] = ..., certificate_request: _Optional[bytes] = ...) -> None: ...

class JoinDeviceResponse(_message.Message):
    __slots__ = ("certificate", "authority", "device_endpoint", "trust_class", "expires_at")
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    AUTHORITY_FIELD_NUMBER: _ClassVar[int]
    DEVICE_ENDPOINT_FIELD_NUMBER: _ClassVar[int]
    TRUST_CLASS_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    certificate: bytes
    authority: bytes
    device_endpoint: str
    trust_class: str
    expires_at: str
    def __init__(self, certificate: _Optional[bytes] = ..., authority: _Optional[bytes] = ..., device_endpoint: _Optional[str] = ..., trust_class: _Optional[str] = ..., expires_at: _Optional[str] = ...) -> None: ...
