"""What the base model refuses of an update chain, and what it must not refuse."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from cola_runtime.base_model.received_chain import ReceivedChain, bytes_of
from cola_runtime.device.sent_chain import SentChain
from cola_runtime.errors import Conflict
from cola_runtime.types import Lease
from cola_runtime.update_chain import START, RecordedLink, content_digest, next_link

JOB = "job-" + "0a" * 16
LEASE = Lease(job_id=JOB, epoch=2, device_id="d1")


class Ends:
    """A device's end and the base model's, of one lease."""

    def __init__(self, *, origin: RecordedLink | None = None) -> None:
        self._hashing = ThreadPoolExecutor(1)
        self.device = SentChain(LEASE, self._hashing, link=origin.digest if origin else b"")
        self.base = ReceivedChain(JOB, LEASE.epoch, origin=origin)

    def send(self, version: int, sent_P: Tensor, *, arrives_P: Tensor | None = None) -> bytes:
        """One more version; `arrives_P` came instead of what was sent."""
        self.device.extend(version, [bytes_of(sent_P)])
        return self.arrive(version, sent_P if arrives_P is None else arrives_P)

    def arrive(self, version: int, weights_P: Tensor) -> bytes:
        return self.base.follow(version, weights_P, stated=self.device.link.result())


def weights(number: int) -> Tensor:
    return torch.full((5,), float(number))


def refusal(ends: Ends, version: int, weights_P: Tensor, **arrives: Tensor) -> str:
    with pytest.raises(Conflict) as caught:
        ends.send(version, weights_P, **arrives)
    return caught.value.reason


@pytest.fixture
def ends() -> Ends:
    made = Ends()
    made.arrive(0, weights(0))
    for version in (1, 2):
        made.send(version, weights(version))
    return made


def test_both_ends_make_one_chain_and_each_link_depends_on_everything_before(ends: Ends) -> None:
    third = ends.send(3, weights(3))
    other = Ends()
    other.arrive(0, weights(0))
    for version, number in ((1, 1), (2, 7)):
        other.send(version, weights(number))
    assert other.send(3, weights(3)) != third
    values = {"epoch": 2, "version": 3, "previous": third, "content": content_digest([b"w"])}
    links = {
        next_link(JOB, **values),
        next_link("job-" + "0b" * 16, **values),
        *(next_link(JOB, **values | {name: 9}) for name in ("epoch", "version")),
        *(next_link(JOB, **values | {name: START}) for name in ("previous", "content")),
    }
    assert len(links) == 6


def test_an_update_that_was_put_into_anothers_place_is_refused(ends: Ends) -> None:
    assert refusal(ends, 3, weights(3), arrives_P=weights(4)) == "UPDATE_CHAIN_BROKEN"


def test_an_update_that_was_left_out_is_noticed_at_the_next_one(ends: Ends) -> None:
    ends.device.extend(3, [bytes_of(weights(3))])
    assert refusal(ends, 3, weights(4)) == "UPDATE_CHAIN_BROKEN"


def test_a_device_that_goes_back_to_older_weights_is_refused_although_its_chain_fits(ends: Ends) -> None:
    assert refusal(ends, 3, weights(1)) == "UPDATE_ROLLED_BACK"


def test_a_step_that_changes_nothing_is_no_roll_back(ends: Ends) -> None:
    first = ends.send(3, weights(2))
    assert ends.send(4, weights(2)) != first
    assert refusal(ends, 5, weights(1)) == "UPDATE_ROLLED_BACK"


def test_a_version_may_come_again_but_only_as_it_was(ends: Ends) -> None:
    before = ends.device.link.result()
    assert ends.arrive(2, weights(2)) == before
    with pytest.raises(Conflict) as caught:
        ends.arrive(2, weights(3))
    assert caught.value.reason == "UPDATE_REPLACED"


def test_a_lease_begins_with_the_recorded_weights_and_goes_on_with_their_link() -> None:
    content = content_digest([bytes_of(weights(2))])
    digest = next_link(JOB, epoch=1, version=2, previous=START, content=content)
    recorded = RecordedLink(job_id=JOB, epoch=1, version=2, previous=START, digest=digest)
    good = Ends(origin=recorded)
    assert good.arrive(2, weights(2)) == digest
    third = content_digest([bytes_of(weights(3))])
    expected = next_link(JOB, epoch=2, version=3, previous=digest, content=third)
    assert good.send(3, weights(3)) == expected
    for version, number in ((2, 3), (1, 2)):
        with pytest.raises(Conflict) as caught:
            Ends(origin=recorded).arrive(version, weights(number))
        assert caught.value.reason == "UPDATE_NOT_RECORDED"


def test_a_lease_goes_on_behind_a_link_of_the_first_release() -> None:
    """The digest was made by its code: SHA-256 of these weights."""
    digest = bytes.fromhex("2d79bb0186b68c21c3a43f4d1defcab40ee80a7f869e1d57fef37a7da648ee42")
    recorded = RecordedLink(job_id=JOB, epoch=1, version=2, previous=START, digest=digest)
    ends = Ends(origin=recorded)
    assert ends.arrive(2, weights(2)) == digest
    third = content_digest([bytes_of(weights(3))])
    assert ends.send(3, weights(3)) == next_link(JOB, epoch=2, version=3, previous=digest, content=third)
    with pytest.raises(Conflict) as caught:
        Ends(origin=recorded).arrive(2, weights(3))
    assert caught.value.reason == "UPDATE_NOT_RECORDED"
