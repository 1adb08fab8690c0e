"""One table: what every verb of every service asks of its caller. A verb without a rule does not start.

The door (rpc.py) applies the table before a verb's own code runs: who calls, what the key allows, and whose
the object is that the request names. Another tenant's is not found, in the words of one that never was.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor, ServiceDescriptor

READ = "jobs:read"
WRITE = "jobs:write"
ADMIN = "admin"
TENANT_SCOPES = (READ, WRITE)


class Owner(enum.Enum):
    """Whose objects a verb reaches."""

    TENANT = "tenant"  # what is made for the caller's tenant, or listed of it
    JOB = "job"  # the job that the request's `job_id` names, if it is the caller's tenant's
    SERVICE = "service"  # what every tenant sees alike
    OPERATOR = "operator"  # any tenant's: with the scope `admin` only
    NEWCOMER = "newcomer"  # nobody's: no key is asked for, since the request itself holds what opens it


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    scope: str
    owner: Owner
    deadline: Literal["call_seconds", "upload_seconds", "generate_seconds"] = "call_seconds"
    """The limit on the whole call; in a response stream `chunk_seconds` bounds each message instead."""
    audit: str = ""
    """The kind of the audit entry that it leaves when it has been done."""
    audit_fields: tuple[str, ...] = ()
    """What the entry tells of the answer, or else of the request."""


RULES: Mapping[str, Rule] = {
    "SubmitJob": Rule(
        scope=WRITE,
        owner=Owner.TENANT,
        deadline="upload_seconds",
        audit="job.submitted",
        audit_fields=("name",),
    ),
    "CheckDataset": Rule(scope=WRITE, owner=Owner.TENANT, deadline="upload_seconds"),
    "EstimateJob": Rule(scope=WRITE, owner=Owner.TENANT, deadline="upload_seconds"),
    "GetJob": Rule(scope=READ, owner=Owner.JOB),
    "ListJobs": Rule(scope=READ, owner=Owner.TENANT),
    "CancelJob": Rule(scope=WRITE, owner=Owner.JOB, audit="job.cancelled"),
    "PauseJob": Rule(scope=WRITE, owner=Owner.JOB, audit="job.paused"),
    "ResumeJob": Rule(scope=WRITE, owner=Owner.JOB, audit="job.resumed"),
    "WatchEvents": Rule(scope=READ, owner=Owner.JOB),
    "ListSteps": Rule(scope=READ, owner=Owner.JOB),
    "ListEvaluations": Rule(scope=READ, owner=Owner.JOB),
    "ListCheckpoints": Rule(scope=READ, owner=Owner.JOB),
    "PinCheckpoint": Rule(scope=WRITE, owner=Owner.JOB, audit="checkpoint.pinned", audit_fields=("version",)),
    "UnpinCheckpoint": Rule(
        scope=WRITE, owner=Owner.JOB, audit="checkpoint.unpinned", audit_fields=("version",)
    ),
    "ExportAdapter": Rule(scope=READ, owner=Owner.JOB, audit="adapter.exported"),
    "Generate": Rule(scope=WRITE, owner=Owner.JOB, deadline="generate_seconds"),
    "DescribeService": Rule(scope=READ, owner=Owner.SERVICE),
    "CreateKey": Rule(
        scope=ADMIN, owner=Owner.OPERATOR, audit="key.created", audit_fields=("tenant", "scopes")
    ),
    "ListKeys": Rule(scope=ADMIN, owner=Owner.OPERATOR),
    "RevokeKey": Rule(scope=ADMIN, owner=Owner.OPERATOR, audit="key.revoked", audit_fields=("tenant",)),
    "GetUsage": Rule(scope=READ, owner=Owner.TENANT),
    "ListUsage": Rule(scope=ADMIN, owner=Owner.OPERATOR),
    "StartTrace": Rule(scope=ADMIN, owner=Owner.OPERATOR, audit="trace.started"),
    "StopTrace": Rule(scope=ADMIN, owner=Owner.OPERATOR, audit="trace.stopped"),
    "CreateJoinToken": Rule(
        scope=ADMIN,
        owner=Owner.OPERATOR,
        audit="join_token.created",
        audit_fields=("trust_class", "reusable", "expires_at"),
    ),
    "ListDevices": Rule(scope=ADMIN, owner=Owner.OPERATOR),
    "RevokeDevice": Rule(scope=ADMIN, owner=Owner.OPERATOR, audit="device.revoked"),
    "ReinstateDevice": Rule(scope=ADMIN, owner=Owner.OPERATOR, audit="device.reinstated"),
    "ListAudit": Rule(scope=ADMIN, owner=Owner.OPERATOR),
    "JoinDevice": Rule(
        scope="", owner=Owner.NEWCOMER, audit="device.certified", audit_fields=("trust_class", "expires_at")
    ),
}

OF_ONE_JOB = frozenset({"job_id"})
OF_ANY_TENANT = frozenset({"tenant", "tenant_id", "key_id", "device_id", "token_id"})
"""Fields that name an object; what ends in `_id` and is in neither of them is refused until it is."""


def rules_of(service: ServiceDescriptor, rules: Mapping[str, Rule] = RULES) -> dict[str, Rule]:
    """The rule of each of the service's verbs.

    Raises KeyError for a verb without one, ValueError for one that names an object its rule does not guard.
    """
    found = {method.name: rules[method.name] for method in service.methods}
    for method in service.methods:
        _check_guarded(method, found[method.name])
    return found


def _check_guarded(method: MethodDescriptor, rule: Rule) -> None:
    fields = method.input_type.fields
    names = {field.name for field in fields if field.type == FieldDescriptor.TYPE_STRING}
    unknown = {name for name in names if name.endswith("_id")} - OF_ONE_JOB - OF_ANY_TENANT
    if unknown:
        raise ValueError(f"{method.name} names {unknown}: say in rules.py whose object that is")
    if names & OF_ONE_JOB and (rule.owner is not Owner.JOB or method.client_streaming):
        raise ValueError(f"{method.name} names a job, and its rule does not look whose it is")
    if rule.owner is Owner.NEWCOMER:
        return
    if names & OF_ANY_TENANT and (rule.owner is not Owner.OPERATOR or rule.scope != ADMIN):
        raise ValueError(f"{method.name} names another tenant's object, and is not the operator's alone")
    if rule.owner is Owner.JOB and not names & OF_ONE_JOB:
        raise ValueError(f"{method.name} names no job")
