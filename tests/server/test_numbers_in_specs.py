"""A number that a spec cannot have is named with what it may be, over real gRPC, and nothing is created."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from serving import BASE_MODEL, ROWS, Served

from cola_runtime.client.sdk import AsyncClient
from cola_runtime.errors import InvalidInput
from cola_runtime.proto.jobs_pb2 import JobHeader, SubmitJobRequest

RANGES = {
    "adapter.rank": ">= 1 and <= 256",
    "optimizer.learning_rate": "> 0 and <= 100",
    "optimizer.max_grad_norm": "> 0",
    "steps": ">= 1 and <= 1,000,000",
    "deadline.seconds": "> 0 and <= 31,622,400.0",
}
NO_RANK = ["0", "-1", "2147483648", "1e400", "-1e400", "NaN", '"8"', "true", "false", "8.5", "[8]", "{}"]
NO_FLOAT = ["0", "-1", "1e400", "NaN", '"1e400"', '"eight"', "true", "false", "[8]", "{}"]


def spec_with(field: str, value: str) -> str:
    """A spec's JSON; `value` stands in it as it is written, since not every one of them is a JSON number."""
    text = value
    for name in reversed(field.split(".")):
        text = f'{{"{name}": {text}}}'
    return json.dumps({"name": "greeter", "base_model": BASE_MODEL})[:-1] + f", {text[1:]}"


async def submitted(client: AsyncClient, spec_json: str) -> Any:
    async def parts() -> AsyncIterator[SubmitJobRequest]:
        yield SubmitJobRequest(header=JobHeader(spec_json=spec_json))
        yield SubmitJobRequest(training_chunk=ROWS)

    return await client._connection.call("SubmitJob", parts)


@pytest.mark.parametrize("field", RANGES)
async def test_a_number_that_is_none_or_out_of_range_is_named_with_its_range(
    served: Served, field: str
) -> None:
    values = NO_RANK if field in ("adapter.rank", "steps") else NO_FLOAT
    async with AsyncClient(base_url=served.url, api_key=served.keys["alice"]) as client:
        for value in values:
            with pytest.raises(InvalidInput) as caught:
                await submitted(client, spec_with(field, value))
            (violation,) = caught.value.violations
            assert (caught.value.reason, violation.where) == ("SPEC_INVALID", f"job.{field}"), value
            assert violation.message.endswith(f"; allowed: {RANGES[field]}"), violation.message
    assert served.nothing_exists()


async def test_a_float_may_be_a_text_that_spells_it_as_yaml_reads_one(served: Served) -> None:
    async with AsyncClient(base_url=served.url, api_key=served.keys["alice"]) as client:
        job = await submitted(client, spec_with("optimizer.learning_rate", '"2e-4"'))
    assert json.loads(job.spec_json)["optimizer"]["learning_rate"] == 2e-4
