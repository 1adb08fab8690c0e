"""Identifiers that the service makes: unguessable, and safe in paths, URLs and terminals."""

from __future__ import annotations

import hashlib
import secrets
import uuid

from cola_runtime.types import JOB_ID_PREFIX

API_KEY_PREFIX = "tml-"
JOIN_TOKEN_PREFIX = "join-"  # noqa: S105 (what all of them begin with)
API_KEY_RANDOM_BYTES = 32


def new_job_id() -> str:
    return JOB_ID_PREFIX + uuid.uuid4().hex


def new_tenant_id() -> str:
    return f"tenant-{uuid.uuid4().hex}"


def key_id_of(key: str) -> str:
    """Names the key without revealing it."""
    return f"key-{api_key_digest(key)[:16]}"


def new_api_key() -> str:
    """A fresh secret with 256 random bits, so that its bare SHA-256 is safe to store."""
    return API_KEY_PREFIX + secrets.token_urlsafe(API_KEY_RANDOM_BYTES)


def new_token_id() -> str:
    return f"token-{uuid.uuid4().hex[:16]}"


def new_join_token() -> str:
    """A fresh secret, as an API key is, that no API takes for one."""
    return JOIN_TOKEN_PREFIX + secrets.token_urlsafe(API_KEY_RANDOM_BYTES)


def api_key_digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
