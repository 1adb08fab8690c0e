"""Every command against a real service, for people and as JSON."""

from __future__ import annotations

import csv
import io
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from serving import BASE_MODEL, ROWS, Served

from cola_runtime.client.sdk import Client, JobHandle
from cola_runtime.jobs.state import JobState, Trigger
from cola_runtime.spec import JobSpec

Cola = Callable[..., Any]


@pytest.fixture
def trained(client: Client, spec: JobSpec, served: Served) -> JobHandle:
    """A job that has ended well, with a checkpoint."""
    handle = client.submit(spec, training=ROWS)
    served.train(handle.job_id, steps=5)
    served.checkpoint(handle.job_id)
    served.train(handle.job_id, steps=0, succeed=True)
    return handle


def in_background(served: Served, act: Callable[[str], None]) -> threading.Thread:
    """Do something with the next job that starts."""

    def wait_and_act() -> None:
        while not served.runner.started:
            threading.Event().wait(0.01)
        act(served.runner.started[-1])

    thread = threading.Thread(target=wait_and_act, daemon=True)
    thread.start()
    return thread


def test_run_submits_and_follows_to_the_end(cola: Cola, served: Served, job_file: Path) -> None:
    thread = in_background(served, lambda job_id: served.train(job_id, steps=5, succeed=True))
    ran = cola("run", "-f", job_file)
    thread.join()
    assert ran.code == 0
    for part in (
        "Submitted greeter as job-",
        "5 steps",
        "step 5 of 5",
        "Done.",
        "cola adapters export greeter",
    ):
        assert part in ran.out


def test_run_as_json_prints_the_ended_job_alone(cola: Cola, served: Served, job_file: Path) -> None:
    thread = in_background(served, lambda job_id: served.train(job_id, steps=5, succeed=True))
    ran = cola("run", "-f", job_file, "--json")
    thread.join()
    assert (ran.code, ran.err) == (0, "")
    assert (ran.json["state"], ran.json["version"], ran.json["spec"]["rows_per_step"]) == ("succeeded", 5, 4)


def test_run_ends_with_8_when_the_job_failed(cola: Cola, served: Served, job_file: Path) -> None:
    def fail(job_id: str) -> None:
        served.run(
            served.store.transition(
                job_id, Trigger.FAIL, failure_reason="LOSS_DIVERGED", failure_message="loss is 1e9"
            )
        )

    thread = in_background(served, fail)
    ran = cola("run", "-f", job_file)
    thread.join()
    assert ran.code == 8
    for part in ("LOSS_DIVERGED", "loss is 1e9", "cola jobs logs job-"):
        assert part in ran.err
    as_json = cola("jobs", "watch", "greeter", "--json")
    assert (as_json.code, as_json.json["failure_reason"]) == (8, "LOSS_DIVERGED")


def test_run_detached_says_how_to_watch(cola: Cola, served: Served, job_file: Path) -> None:
    ran = cola("run", "-f", job_file, "--detach")
    assert ran.code == 0
    assert f"cola jobs watch {served.runner.started[0]}" in ran.out


def test_an_interrupt_leaves_the_job_and_says_how_to_come_back(
    cola: Cola, served: Served, job_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cola_runtime.cli.watch._watch", interrupted)
    ran = cola("run", "-f", job_file)
    assert ran.code == 130
    assert f"cola jobs watch {served.runner.started[0]}" in ran.out
    assert served.run(served.store.jobs())[0].state is JobState.QUEUED


def test_submitting_again_with_the_same_key_gives_the_same_job(cola: Cola, job_file: Path) -> None:
    first, second = (
        cola("jobs", "submit", "-f", job_file, "--idempotency-key", "k", "--json").json for _ in range(2)
    )
    assert first["job_id"] == second["job_id"]
    job_file.write_text(job_file.read_text() + "seed: 1\n")
    conflict = cola("jobs", "submit", "-f", job_file, "--idempotency-key", "k")
    assert (conflict.code, "IDEMPOTENCY_CONFLICT" in conflict.err) == (6, True)


def test_jobs_list(cola: Cola, trained: JobHandle) -> None:
    (job,) = cola("jobs", "list", "--json").json
    assert (job["job_id"], job["state"], job["tenant"]) == (trained.job_id, "succeeded", "alice")
    text = cola("jobs", "list").out
    for part in (trained.job_id[:12], "greeter", "succeeded", "5/5", "0.8000"):
        assert part in text


def test_an_empty_list_says_what_to_do(cola: Cola) -> None:
    assert cola("jobs", "list", "--json").json == []
    assert "cola run -f job.yaml" in cola("jobs", "list").out
    assert "No adapters yet" in cola("adapters", "list").out


def test_jobs_get(cola: Cola, trained: JobHandle) -> None:
    assert cola("jobs", "get", "greeter", "--json").json["spec"]["name"] == "greeter"
    text = cola("jobs", "get", trained.job_id[:10]).out
    for part in (trained.job_id, "lora, rank 8", "5 of 5", "adapter_gradient, 10.0 KiB up, 5.0 KiB down"):
        assert part in text


def test_jobs_are_steered(cola: Cola, client: Client, spec: JobSpec) -> None:
    client.submit(spec, training=ROWS)
    for command, state in (("pause", "paused"), ("resume", "queued"), ("cancel", "cancelled")):
        assert cola("jobs", command, "greeter", "--json").json["state"] == state
    ran = cola("jobs", "pause", "greeter")
    assert (ran.code, "JOB_ENDED" in ran.err) == (6, True)


def test_logs_and_events(cola: Cola, trained: JobHandle) -> None:
    logs = cola("jobs", "logs", "greeter").out.splitlines()
    assert "job.queued" in logs[0]
    assert "job.succeeded" in logs[-1]
    events = cola("jobs", "events", "greeter", "--json").json
    assert len(events) == len(logs)
    assert events == cola("jobs", "logs", "greeter", "--json").json
    (last,) = cola("jobs", "events", "greeter", "--after", events[-2]["id"], "--json").json
    assert last == events[-1]
    followed = cola("jobs", "logs", "greeter", "--follow", "--json").out.splitlines()
    assert [json.loads(line) for line in followed] == events
    assert '"step": 5' in cola("jobs", "events", "greeter").out


def test_metrics_as_table_csv_and_json(cola: Cola, trained: JobHandle) -> None:
    steps = cola("jobs", "metrics", "greeter", "--json").json
    assert [step["loss"] for step in steps] == [4.0 / n for n in range(1, 6)]
    rows = list(csv.DictReader(io.StringIO(cola("jobs", "metrics", "greeter", "--csv").out)))
    assert [float(row["loss"]) for row in rows] == [step["loss"] for step in steps]
    text = cola("jobs", "metrics", "greeter").out
    assert "█" in text
    assert "0.8000" in text


def test_evaluations_and_the_best_adapter(
    cola: Cola, client: Client, spec: JobSpec, served: Served, tmp_path: Path
) -> None:
    handle = client.submit(spec, training=ROWS, evaluation=ROWS)
    assert "No evaluations" in cola("jobs", "evaluations", "greeter").out
    for loss in (1.5, 2.5):
        served.train(handle.job_id, steps=1)
        served.evaluate(handle.job_id, loss=loss, improved=loss == 1.5)
        served.checkpoint(handle.job_id)
    first, second = cola("jobs", "evaluations", "greeter", "--json").json
    assert (first["metrics"], first["best"]) == ({"loss": 1.5, "perplexity": 2.0}, True)
    assert (second["metrics"]["loss"], second["best"]) == (2.5, False)
    head, *lines = cola("jobs", "evaluations", "greeter").out.splitlines()
    assert head.split() == ["STEP", "LOSS", "PERPLEXITY", "BEST", "MADE"]
    assert ("1.5000" in lines[0], "best" in lines[0], "best" in lines[1]) == (True, True, False)
    marked = [each["best"] for each in cola("jobs", "checkpoints", "greeter", "--json").json]
    assert marked == [True, False]
    exported = cola("adapters", "export", "greeter", "--best", "--to", tmp_path / "best", "--json")
    assert exported.code == 0
    for version, same in ((1, True), (2, False)):
        cola("adapters", "export", "greeter", "--version", version, "--to", tmp_path / str(version))
        files = [tmp_path / name / "adapter_model.safetensors" for name in ("best", str(version))]
        assert (files[0].read_bytes() == files[1].read_bytes()) is same
    both = cola("adapters", "export", "greeter", "--best", "--version", "1", "--to", tmp_path / "x")
    assert both.code == 2


def test_checkpoints_and_adapters(cola: Cola, trained: JobHandle, tmp_path: Path) -> None:
    (checkpoint,) = cola("jobs", "checkpoints", "greeter", "--json").json
    assert checkpoint["version"] == 5
    assert checkpoint["sha256"][:16] in cola("jobs", "checkpoints", "greeter").out
    (adapter,) = cola("adapters", "list", "--json").json
    assert (adapter["name"], adapter["checkpoint"]) == ("greeter", checkpoint)
    assert "greeter" in cola("adapters", "list").out
    exported = cola("adapters", "export", "greeter", "--to", tmp_path / "a", "--json").json
    assert set(exported["files"]) == {"adapter_config.json", "adapter_model.safetensors"}
    again = cola("adapters", "export", "greeter", "--to", tmp_path / "a")
    assert (again.code, "--overwrite" in again.err) == (6, True)
    ran = cola("adapters", "export", "greeter", "--to", tmp_path / "a", "--overwrite")
    assert (ran.code, "adapter_model.safetensors" in ran.out) == (0, True)


def test_dataset_check(cola: Cola, served: Served, job_file: Path) -> None:
    report = cola("dataset", "check", "-f", job_file, "--json").json
    assert (report["rows"], report["steps"], report["format"]) == (20, 5, "prompt_completion")
    text = cola("dataset", "check", job_file.parent / "train.jsonl", "--base-model", BASE_MODEL).out
    assert "can be trained on" in text
    assert "median" in text
    assert cola("dataset", "check").code == 2
    assert served.nothing_exists()


def test_generate(cola: Cola, trained: JobHandle, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cola("generate", "abc", "--job", "greeter", "--max-new-tokens", "2").out == "cb\n"
    assert cola("generate", "abc", "--json").json["adapter_version"] == 0
    answer = cola("generate", "hi", "--chat", "--system", "be kind", "--json").json
    assert answer["prompt_tokens"] == len("Xsystem\nbe kindX\nXuser\nhiX\nXassistant\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("xy"))
    assert cola("generate", "-").out == "yx\n"


def test_keys(cola: Cola, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    made = cola("keys", "create", "carol", "--scope", "jobs:read", "--concurrent-jobs", "3", "--json").json
    assert (made["weight"], made["concurrent_jobs"]) == (1.0, 3)
    assert cola("keys", "create", "carol", "--weight", "-1").code == 3
    assert made["key"].startswith("tml-")
    assert made["scopes"] == ["jobs:read"]
    (known,) = [key for key in cola("keys", "list", "--json").json if key["tenant"] == "carol"]
    assert made["key"] not in cola("keys", "list").out
    assert cola("keys", "revoke", known["key_id"]).code == 0
    monkeypatch.setenv("COLA_API_KEY", made["key"])
    assert cola("jobs", "list").code == 4
    monkeypatch.setenv("COLA_API_KEY", served.keys["alice"])
    assert cola("keys", "create", "carol", "--scope", "everything").code == 3
    assert cola("keys", "revoke", "key-0").code == 5


def test_keys_in_the_data_folder_of_a_stopped_service(
    cola: Cola, served: Served, tmp_path: Path, tokenizer_path: Path
) -> None:
    folder = tmp_path / "service"
    busy = cola("keys", "list", "--data-dir", folder)
    assert (busy.code, "STORE_BUSY" in busy.err) == (9, True)
    served.run(served.store.close())
    made = cola("keys", "create", "dave", "--data-dir", folder, "--weight", "2", "--json").json
    assert (made["weight"], made["total_steps"]) == (2.0, None)
    listed = cola("keys", "list", "--data-dir", folder, "--json").json
    assert made["key"].startswith("tml-")
    assert "dave" in {key["tenant"] for key in listed}
    assert cola("keys", "list", "--data-dir", tmp_path / "nowhere").code == 5


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (("jobs", "get", "nobody"), 5, "JOB_UNKNOWN"),
        (("generate", "a", "--job", "nobody"), 5, "JOB_UNKNOWN"),
        (("jobs", "list", "--url", "grpc://127.0.0.1:1"), 9, "SERVICE_UNREACHABLE"),
        (("jobs", "list", "--url", "http://x"), 3, "BASE_URL_INVALID"),
    ],
)
def test_exit_codes(cola: Cola, arguments: tuple[str, ...], code: int, reason: str) -> None:
    ran = cola(*arguments)
    assert (ran.code, reason in ran.err) == (code, True)
    as_json = cola(*arguments, "--json")
    assert (as_json.code, as_json.json["error"]["reason"], as_json.err) == (code, reason, "")


def test_a_missing_key_says_where_to_get_one(cola: Cola, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLA_API_KEY")
    ran = cola("jobs", "list")
    assert (ran.code, "KEY_MISSING" in ran.err, "cola keys create" in ran.err) == (4, True, True)


def test_wrong_usage_ends_with_2(cola: Cola) -> None:
    for arguments in (("jobs", "frobnicate"), ("run",), ("jobs", "get"), ("generate", "a", "--seed", "x")):
        assert cola(*arguments).code == 2


def test_config_schema_and_show(cola: Cola, monkeypatch: pytest.MonkeyPatch) -> None:
    schema = cola("config", "schema").json
    assert {"name", "base_model", "adapter", "training"} <= set(schema["job"]["properties"])
    assert schema["job"]["required"] == ["name", "base_model", "training"]
    assert "data_dir" in schema["service"]["properties"]
    monkeypatch.setenv("COLA_DEVICES__COUNT", "7")
    shown = cola("config", "show")
    assert yaml.safe_load(shown.out)["service"]["devices"]["count"] == 7
    assert cola("config", "show", "--json").json == yaml.safe_load(shown.out)
    assert "tml-" not in shown.out


def test_a_trace_is_recorded_and_read(cola: Cola, tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    ran = cola("trace", "record", "--seconds", "0", "--to", file)
    assert ran.code == 0
    assert "85.7%" in ran.out  # of 1.75 s, two steps of 0.75
    shown = cola("trace", "show", file, "--json")
    assert shown.json["base_steps"] == 2
    assert shown.json["base_busy"] == pytest.approx(1.5 / 1.75)
    file.write_text("{}")
    assert cola("trace", "show", file).code == 3


def test_usage_is_for_ones_own_tenant_and_for_the_operator_of_all(
    cola: Cola, trained: JobHandle, served: Served
) -> None:
    own = cola("usage", "--json").json
    assert (own["tenant"], own["jobs"], own["steps"], own["tokens"]) == ("alice", 1, 5, 500)
    assert [each["tenant"] for each in cola("usage", "--all", "--json").json] == ["alice", "bob"]
    assert "10.0 KiB" in cola("usage").out


def test_an_estimate_creates_nothing(cola: Cola, served: Served, job_file: Path) -> None:
    told = cola("jobs", "estimate", "-f", job_file)
    assert (told.code, told.err) == (0, "")
    assert "10 ms, as those of the base steps so far" in told.out
    assert cola("jobs", "estimate", "-f", job_file, "--json").json["steps"] == 5
    assert served.nothing_exists()


def test_base_models_are_listed_with_their_replicas(cola: Cola, client: Client, spec: JobSpec) -> None:
    listed = cola("base-models")
    assert (listed.code, listed.err) == (0, "")
    for part in (BASE_MODEL, f"{BASE_MODEL}/0", "ready", "50%", "3,000", "25%"):
        assert part in listed.out
    [model] = cola("base-models", "--json").json
    assert model["replicas"][0]["bank_evicted_bytes"] == 64
    handle = client.submit(spec, training=ROWS)
    assert handle.job.replica == ""
