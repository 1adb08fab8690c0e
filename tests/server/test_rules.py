"""Every verb against every kind of caller: the cases come from the descriptors and the table of rules."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message_factory import GetMessageClass
from serving import ROWS, Served, serving

from cola_runtime.client.sdk import Client
from cola_runtime.errors import ColaError, NotFound, PermissionDenied, Unauthenticated
from cola_runtime.server.grpc_server import SERVICES
from cola_runtime.server.rules import ADMIN, READ, RULES, TENANT_SCOPES, WRITE, Owner, Rule, rules_of
from cola_runtime.spec import JobSpec
from cola_runtime.transport.status import error_from_rpc

VERBS = {method.name: method for service in SERVICES for method in service.methods}
CALLERS = ("own", "other", "nobody", "reader", "revoked", "operator")
SCOPES = {"own": TENANT_SCOPES, "other": TENANT_SCOPES, "reader": (READ,), "operator": (ADMIN,)}
NO_JOB = "job-" + "0" * 32
SECRET = "sapphire"  # in everything that is alice's


class Hall:
    """A service with one job of alice's for each verb, and a key for each kind of caller."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self.channel = grpc.insecure_channel(served.target)
        store = served.store
        owner = {"own": "alice", "reader": "alice", "other": "bob", "operator": "bob"}
        self.keys = {
            name: served.run(store.create_key(owner[name], scopes=scopes)) for name, scopes in SCOPES.items()
        }
        self.keys["revoked"] = served.run(store.create_key("alice"))
        newest = served.run(store.authenticate(self.keys["revoked"])).key_id
        served.run(store.revoke_key(newest))
        with Client(base_url=served.url, api_key=served.keys["alice"]) as alice:
            spec = JobSpec(name=SECRET, base_model="tiny-llama", rows_per_step=4)
            self.jobs = {verb: alice.submit(spec, training=ROWS).job_id for verb in VERBS}

    def call(self, verb: str, caller: str, job_id: str) -> tuple[ColaError | None, str]:
        """The error of the call, if it had one, and its answers as text."""
        method = VERBS[verb]
        request = GetMessageClass(method.input_type)(**_fields(verb, job_id))
        metadata = [("authorization", f"Bearer {self.keys[caller]}")] if caller in self.keys else []
        path = f"/{method.containing_service.full_name}/{verb}"
        answer_type = GetMessageClass(method.output_type)
        kind = "_".join(
            "stream" if streams else "unary" for streams in (method.client_streaming, method.server_streaming)
        )
        multi = getattr(self.channel, kind)(
            path,
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=answer_type.FromString,
        )
        try:
            answer = multi(
                iter([request]) if method.client_streaming else request, metadata=metadata, timeout=10
            )
            return None, " ".join(map(str, answer)) if method.server_streaming else str(answer)
        except grpc.RpcError as failure:
            return error_from_rpc(failure), ""


def _fields(verb: str, job_id: str) -> dict[str, Any]:
    known: dict[str, Any] = {"job_id": job_id, "prompt": "hello", "tenant": "carol", "key_id": "key-0"}
    known |= {"device_id": "d1", "join_token": "join-guess", "certificate_request": b"none"}
    names = VERBS[verb].input_type.fields_by_name.keys()
    return {name: value for name, value in known.items() if name in names}


@pytest.fixture(scope="module")
def hall(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> Iterator[Hall]:
    with serving(tmp_path_factory.mktemp("hall"), tokenizer_path) as served:
        hall = Hall(served)
        yield hall
        hall.channel.close()


def _refusal(rule: Rule, caller: str) -> tuple[type[ColaError], str] | None:
    """What the rule says must happen to this caller; None: the verb is carried out."""
    if rule.owner is Owner.NEWCOMER:
        return None  # no key is asked for, nor does one help: tests/server/test_operators.py
    if caller in ("nobody", "revoked"):
        return Unauthenticated, "KEY_MISSING" if caller == "nobody" else "KEY_UNKNOWN"
    if rule.scope not in SCOPES[caller]:
        return PermissionDenied, "SCOPE_MISSING"
    return (NotFound, "JOB_UNKNOWN") if caller == "other" and rule.owner is Owner.JOB else None


@pytest.mark.parametrize("caller", CALLERS)
@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_asks_every_caller_what_its_rule_says(hall: Hall, verb: str, caller: str) -> None:
    if caller == "own":  # what it does is tested elsewhere; here, that its identity is no obstacle
        error, _ = hall.call(verb, caller, hall.jobs[verb])
        refusal = _refusal(RULES[verb], caller)
        assert refusal is None or (error is not None and (type(error), error.reason) == refusal)
        assert refusal is not None or not isinstance(error, Unauthenticated | PermissionDenied | NotFound)
        return
    before = hall.served.run(hall.served.store.job(hall.jobs[verb]))
    error, answers = hall.call(verb, caller, hall.jobs[verb])
    refusal = _refusal(RULES[verb], caller)
    assert refusal is None or (error is not None and (type(error), error.reason) == refusal)
    if refusal is None:
        assert not isinstance(error, Unauthenticated | PermissionDenied)
    if caller in ("other", "nobody", "revoked"):
        assert SECRET not in answers
        assert SECRET not in str(error)
        assert hall.served.run(hall.served.store.job(hall.jobs[verb])) == before


@pytest.mark.parametrize("verb", [verb for verb, rule in RULES.items() if rule.owner is Owner.JOB])
def test_another_tenants_job_is_not_found_in_the_words_of_one_that_never_was(hall: Hall, verb: str) -> None:
    never, _ = hall.call(verb, "other", NO_JOB)
    assert never is not None
    for ref in (hall.jobs[verb], hall.jobs[verb][:20], SECRET):
        theirs, _ = hall.call(verb, "other", ref)
        assert theirs is not None
        assert {k: (v or "").replace(ref, NO_JOB) for k, v in theirs.as_dict().items()} == {
            k: v or "" for k, v in never.as_dict().items()
        }


def test_the_door_looks_whose_job_it_is_before_the_method_runs(
    hall: Hall, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A method that forgot to look would not be reached with another tenant's job."""

    async def careless(tenant: object, ref: str) -> object:
        return await hall.served.store.job(ref)

    monkeypatch.setattr(hall.served.service, "job", careless)
    error, _ = hall.call("GetJob", "other", hall.jobs["GetJob"])
    assert isinstance(error, NotFound)
    assert hall.call("GetJob", "own", hall.jobs["GetJob"])[0] is None


def test_an_empty_reference_names_no_job(hall: Hall) -> None:
    error, _ = hall.call("GetJob", "own", "")
    assert isinstance(error, NotFound)


def test_no_request_names_a_checkpoint_or_a_dataset_but_by_its_job() -> None:
    """So nobody can name another tenant's."""
    names = {field.name for method in VERBS.values() for field in method.input_type.fields}
    ids = {name for name in names if name.endswith(("_id", "_key"))}
    assert ids == {"job_id", "key_id", "device_id"}
    assert not [name for name in names if any(word in name for word in ("checkpoint", "dataset", "storage"))]


def test_every_verb_has_a_rule_and_no_rule_is_left_over() -> None:
    assert set(VERBS) == set(RULES)
    scopes = {rule.scope for rule in RULES.values() if rule.owner is not Owner.NEWCOMER}
    assert scopes == {READ, WRITE, ADMIN}


def _service(verb: str, **fields: int) -> ServiceDescriptor:
    """The descriptor of a service with one verb, whose request has these fields."""
    file = descriptor_pb2.FileDescriptorProto(name=f"{verb}.proto", package="test", syntax="proto3")
    request = file.message_type.add(name="Request")
    for number, (name, kind) in enumerate(fields.items(), start=1):
        request.field.add(
            name=name, number=number, type=kind, label=descriptor_pb2.FieldDescriptorProto.LABEL_OPTIONAL
        )
    service = file.service.add(name="New")
    service.method.add(name=verb, input_type=".test.Request", output_type=".test.Request")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return pool.FindServiceByName("test.New")


TEXT = descriptor_pb2.FieldDescriptorProto.TYPE_STRING


@pytest.mark.parametrize(
    ("fields", "rule", "complaint"),
    [
        ({"job_id": TEXT}, Rule(scope=READ, owner=Owner.TENANT), "names a job"),
        ({"key_id": TEXT}, Rule(scope=READ, owner=Owner.TENANT), "another tenant's object"),
        ({"tenant": TEXT}, Rule(scope=WRITE, owner=Owner.OPERATOR), "another tenant's object"),
        ({"invoice_id": TEXT}, Rule(scope=READ, owner=Owner.TENANT), "invoice_id"),
        ({"limit": TEXT}, Rule(scope=READ, owner=Owner.JOB), "names no job"),
    ],
)
def test_a_verb_whose_rule_does_not_guard_what_it_names_does_not_start(
    fields: dict[str, int], rule: Rule, complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        rules_of(_service("Peek", **fields), {"Peek": rule})


def test_a_verb_without_a_rule_does_not_start() -> None:
    with pytest.raises(KeyError, match="Peek"):
        rules_of(_service("Peek"))
