"""Join tokens and the devices that joined with them, as functions of a connection inside a transaction."""

from __future__ import annotations

import hmac
from dataclasses import dataclass

from sqlalchemy import Connection, select

from cola_runtime import ids
from cola_runtime.errors import Conflict, NotFound, Unauthenticated
from cola_runtime.job_choices import TrustClass
from cola_runtime.jobs import schema

COORDINATOR = "coordinator"
"""Who has the devices join that the service itself starts."""

_tokens = schema.join_tokens
_devices = schema.devices


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRecord:
    """What is known of a join token; the token itself is shown once and never stored."""

    token_id: str
    trust_class: TrustClass
    reusable: bool  # otherwise it makes one device
    created_by: str  # a key's id
    created_at: str
    expires_at: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRecord:
    """A device that holds a certificate of this service."""

    device_id: str
    trust_class: TrustClass
    key_sha256: str  # of its public key: the device is its key
    joined_by: str  # who made the token it joined with, or COORDINATOR
    joined_at: str
    expires_at: str  # of its newest certificate
    revoked_at: str | None


def insert_token(connection: Connection, record: TokenRecord) -> str:
    """The new token, which is stored nowhere."""
    token = ids.new_join_token()
    values = {name: getattr(record, name) for name in TokenRecord.__slots__}
    connection.execute(_tokens.insert().values(**values, token_sha256=ids.api_key_digest(token)))
    return token


def use_token(
    connection: Connection, token: str, device_id: str, *, at: str, again: bool = False
) -> TokenRecord:
    """The token's record, if this device may join with it; with `again`, as often as it likes.

    Raises Unauthenticated `JOIN_TOKEN_WRONG`, whichever way it is.
    """
    digest = ids.api_key_digest(token)
    row = connection.execute(select(_tokens).where(_tokens.c.token_sha256 == digest)).mappings().one_or_none()
    if row is None or not hmac.compare_digest(row["token_sha256"], digest) or row["expires_at"] <= at:
        raise wrong_token()
    if row["used_by"] is not None and not row["reusable"] and not (again and row["used_by"] == device_id):
        raise wrong_token()
    connection.execute(
        _tokens.update().where(_tokens.c.token_id == row["token_id"]).values(used_by=device_id)
    )
    fields = {name: row[name] for name in TokenRecord.__slots__}
    return TokenRecord(**fields | {"trust_class": TrustClass(row["trust_class"])})


def insert_device(connection: Connection, new: DeviceRecord) -> DeviceRecord:
    """Register a device. Its id may be its own already, or one that the coordinator gave another key before.

    Raises Conflict `DEVICE_ID_TAKEN`.
    """
    found = find_device(connection, new.device_id)
    if found is not None:
        same = found.key_sha256 == new.key_sha256 or found.joined_by == new.joined_by == COORDINATOR
        if not same or found.revoked_at is not None or found.trust_class is not new.trust_class:
            raise Conflict(
                "DEVICE_ID_TAKEN",
                f"there is a device {new.device_id!r} already",
                where="device_id",
                remedy="Join under another id.",
            )
        connection.execute(_devices.delete().where(_devices.c.device_id == new.device_id))
    connection.execute(
        _devices.insert().values(**{name: getattr(new, name) for name in DeviceRecord.__slots__})
    )
    return new


def admitted_device(connection: Connection, device_id: str, key_sha256: str, *, at: str) -> DeviceRecord:
    """The device with this id and key. Raises Unauthenticated `DEVICE_UNKNOWN`, `DEVICE_REVOKED`."""
    return check_admitted(find_device(connection, device_id), key_sha256, at=at)


def check_admitted(found: DeviceRecord | None, key_sha256: str, *, at: str) -> DeviceRecord:
    """What is known of the id is this key's, and valid. Raises as `admitted_device`."""
    if found is None or not hmac.compare_digest(found.key_sha256, key_sha256) or found.expires_at <= at:
        raise Unauthenticated(
            "DEVICE_UNKNOWN",
            "no device of this id has this key, or its certificate has expired",
            remedy="Join again with a new join token.",
        )
    if found.revoked_at is not None:
        raise Unauthenticated(
            "DEVICE_REVOKED",
            "an operator has revoked this device",
            remedy="Ask the operator for a new join token, and join under another id.",
        )
    return found


def renew_device(connection: Connection, device_id: str, *, expires_at: str) -> None:
    connection.execute(
        _devices.update().where(_devices.c.device_id == device_id).values(expires_at=expires_at)
    )


def mark_device_revoked(connection: Connection, device_id: str, *, at: str) -> DeviceRecord:
    """It is let in no more; a second time changes nothing. Raises NotFound `DEVICE_NOT_REGISTERED`."""
    connection.execute(
        _devices.update()
        .where(_devices.c.device_id == device_id, _devices.c.revoked_at.is_(None))
        .values(revoked_at=at)
    )
    found = find_device(connection, device_id)
    if found is None:
        raise NotFound(
            "DEVICE_NOT_REGISTERED",
            f"no device {device_id!r} has joined with a certificate",
            remedy="`cola devices list` shows those that have.",
        )
    return found


def read_devices(connection: Connection) -> list[DeviceRecord]:
    rows = connection.execute(select(_devices).order_by(_devices.c.device_id)).mappings()
    return [DeviceRecord(**dict(row) | {"trust_class": TrustClass(row["trust_class"])}) for row in rows]


def find_device(connection: Connection, device_id: str) -> DeviceRecord | None:
    row = (
        connection.execute(select(_devices).where(_devices.c.device_id == device_id)).mappings().one_or_none()
    )
    return (
        None if row is None else DeviceRecord(**dict(row) | {"trust_class": TrustClass(row["trust_class"])})
    )


def wrong_token() -> Unauthenticated:
    return Unauthenticated(
        "JOIN_TOKEN_WRONG",
        "the join token is unknown, used or expired",
        remedy="Ask the operator for one: `cola devices token`.",
    )
