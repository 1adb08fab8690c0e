"""What placement is told of a device: memory that is promised to adapters on their way is not free."""

from __future__ import annotations

from typing import Any, cast

from cola_runtime.job_choices import TrustClass
from cola_runtime.proto import control_pb2
from cola_runtime.scheduler.connected_device import UNKNOWN_MEMORY_BYTES, ConnectedDevice
from cola_runtime.scheduler.device_gate import Admission
from cola_runtime.scheduler.placement import Demand

ADMISSION = Admission(trust=TrustClass.COMMUNITY)
DEMANDS = {"a": Demand(numbers=10, memory_bytes=300), "b": Demand(numbers=5, memory_bytes=100)}


def device() -> ConnectedDevice:
    hello = control_pb2.DeviceHello(device_id="d1", numbers_per_second=4.0)
    return ConnectedDevice(hello=hello, admission=ADMISSION, stream=cast("Any", None), order=3, heard=0.0)


def test_adapters_on_their_way_are_taken_off_the_free_memory_until_they_are_resident() -> None:
    connected = device()
    connected.beat(control_pb2.Heartbeat(free_bytes=1000))
    offer = connected.offer(["a", "b", "unknown"], DEMANDS)
    assert (offer.device_id, offer.order, offer.speed, offer.memory_bytes) == ("d1", 3, 4.0, 600)
    assert (offer.jobs, offer.trust) == (DEMANDS, TrustClass.COMMUNITY)
    connected.beat(control_pb2.Heartbeat(free_bytes=700, resident_bytes=300))
    assert connected.offer(["a", "b"], DEMANDS).memory_bytes == 600
    connected.beat(control_pb2.Heartbeat(free_bytes=600, resident_bytes=400))
    assert connected.offer(["a", "b"], DEMANDS).memory_bytes == 600


def test_a_heartbeat_tells_when_memory_came_free() -> None:
    connected = device()
    assert not connected.beat(control_pb2.Heartbeat(free_bytes=1000))
    assert connected.beat(control_pb2.Heartbeat(free_bytes=UNKNOWN_MEMORY_BYTES, busy_seconds=2.0))
    assert not connected.beat(control_pb2.Heartbeat(free_bytes=UNKNOWN_MEMORY_BYTES))
