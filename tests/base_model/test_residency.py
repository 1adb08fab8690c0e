"""A bank with a byte limit: who is on the model's device, who leaves it, and that no number changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cola_runtime.base_model.accelerator import HOST
from cola_runtime.base_model.model import TappedModel
from cola_runtime.base_model.residency import Residency, Version
from cola_runtime.types import BankUse, BaseStep
from tests.base_model.conftest import TinyFolder
from tests.base_model.mixed_samples import four_tenants, install_all, run_segments

ITEM = 4  # bytes of a number of `weights`


def of(job: str) -> Version:
    return Version(job, 1, 0)


def weights(*jobs: str, numbers: int = 10) -> dict[Version, Tensor]:
    return {of(job): torch.full((numbers,), float(ord(job))) for job in jobs}


def there(residency: Residency) -> list[str]:
    return [version.job_id for version in residency._placed]


def test_the_longest_unused_leaves_first() -> None:
    residency = Residency(2 * 10 * ITEM, HOST)
    for jobs in ("a", "b", "a", "c"):
        residency.fetch(weights(*jobs))
    assert there(residency) == ["a", "c"]
    assert residency.use == BankUse(
        hits=1, misses=3, evicted_bytes=10 * ITEM, resident_bytes=2 * 10 * ITEM, prefetched=0
    )


def test_what_a_step_expects_is_brought_before_it_and_stays_until_then() -> None:
    residency = Residency(2 * 10 * ITEM, HOST)
    running, following = weights("a"), weights("b")
    for wanted in (running, following):
        residency.expect(wanted)
    assert there(residency) == ["a", "b"]
    residency.expect(weights("c"))  # no room: it is fetched when its step begins
    assert there(residency) == ["a", "b"]
    residency.fetch(running)
    residency.unexpect(running)
    found = residency.fetch(following)
    assert torch.equal(found[of("b")], following[of("b")])
    residency.unexpect(following)
    residency.fetch(weights("c"))
    assert there(residency) == ["b", "c"]
    assert (residency.use.hits, residency.use.misses, residency.use.prefetched) == (2, 1, 2)


def test_a_step_takes_the_room_that_a_later_one_had_reserved() -> None:
    residency = Residency(10 * ITEM, HOST)
    residency.expect(weights("a"))
    residency.fetch(weights("b"))
    assert there(residency) == ["b"]


def test_a_step_above_the_limit_is_served_and_the_next_one_is_below_it() -> None:
    residency = Residency(10 * ITEM, HOST)
    assert len(residency.fetch(weights("a", "b"))) == 2
    assert residency.use.resident_bytes == 20 * ITEM
    residency.fetch(weights("c"))
    assert there(residency) == ["c"]


@pytest.mark.parametrize(("kind", "dtype"), [("llama", "float32"), ("gpt2", "bfloat16")])
def test_a_limit_changes_no_bit_of_losses_taps_and_answers(
    tiny_folder: TinyFolder, kind: str, dtype: str
) -> None:
    """Four adapters, of which one or two are there at a time; each base step is of two of them."""
    folder = tiny_folder(kind, dtype)
    free = TappedModel.load(folder, dtype=dtype, attention="eager")
    tenants = four_tenants(free.sites, "float32")[:4]
    install_all(free, tenants)
    largest = max(free._bank._adapters[member.job_id].flat.nbytes for member in tenants)
    limited = TappedModel.load(folder, dtype=dtype, attention="eager", bank_bytes=2 * largest)
    install_all(limited, tenants)
    for first in (0, 1, 2, 3, 0):
        segments = [tenants[first].segment(), tenants[(first + 1) % 4].segment()]
        expected = limited.expect(BaseStep(number=1, segments=tuple(segments), train=True))
        (one, its_taps), (other, other_taps) = (run_segments(model, segments) for model in (free, limited))
        limited.unexpect(expected)
        assert one.losses == other.losses
        assert len(its_taps) == len(other_taps) > 0
        for tap, same in zip(its_taps, other_taps, strict=True):
            assert tap.tensors.keys() == same.tensors.keys()
            assert all(torch.equal(tap.tensors[key], same.tensors[key]) for key in tap.tensors)
    assert other.bank.evicted_bytes > 0
    assert limited.bank_bytes.model_device <= 2 * largest
    asked = ("job-2", [[7, 8, 9]])
    assert free.generate(*asked, max_new_tokens=4) == limited.generate(*asked, max_new_tokens=4)


def test_an_adapter_that_is_replaced_or_evicted_takes_no_room(tiny_folder: TinyFolder) -> None:
    model = TappedModel.load(
        tiny_folder("llama", "float32"), dtype="float32", attention="eager", bank_bytes=1 << 30
    )
    member = four_tenants(model.sites, "float32")[0]
    for version in (0, 1):
        model.install(member.lease, member.spec, version, member.weights)
    own = model._bank._adapters[member.job_id].flat.nbytes
    assert model.bank_bytes.model_device == own
    assert model.version(member.job_id) == (1, 1)
    model.evict(member.job_id)
    assert model.bank_bytes.model_device == 0
    assert model._bank.use.evicted_bytes == 0
