"""A device's own network: a namespace and a pair of virtual interfaces, of which the test owns both ends.

Loss is made without netem, which not every kernel has: packets towards a wrong hardware address are sent, and
nobody takes them. That is silent, one way at a time, and a route or an interface that is gone is neither.
"""

from __future__ import annotations

import secrets
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from ipaddress import ip_address

import pytest

NOBODY = "02:00:00:00:00:99"


@dataclass(frozen=True, slots=True)
class Cable:
    """Between this machine's namespace (`host`) and the device's (`device`); both are IPv4 addresses."""

    namespace: str
    host_interface: str
    device_interface: str
    host: str
    device: str

    @property
    def inside(self) -> list[str]:
        """What a command line begins with to run in the device's namespace."""
        return ["ip", "netns", "exec", self.namespace]

    def down(self) -> None:
        ip("link", "set", self.host_interface, "down")

    def up(self) -> None:
        ip("link", "set", self.host_interface, "up")

    def lose_to_service(self) -> None:
        ip("-n", self.namespace, *self._wrong(self.host, self.device_interface))

    def find_service(self) -> None:
        ip("-n", self.namespace, "neigh", "del", self.host, "dev", self.device_interface)

    def lose_to_device(self) -> None:
        ip(*self._wrong(self.device, self.host_interface))

    def find_device(self) -> None:
        ip("neigh", "del", self.device, "dev", self.host_interface)

    def slow(self, rate: str) -> None:
        """From this machine to the device. Skips the test where the kernel cannot."""
        words = ["tc", "qdisc", "add", "dev", self.host_interface, "root", "tbf"]
        try:
            run(*words, "rate", rate, "burst", "16kb", "latency", "400ms")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this kernel shapes no traffic: {error.stderr.strip()}")

    @staticmethod
    def _wrong(address: str, interface: str) -> list[str]:
        return ["neigh", "replace", address, "lladdr", NOBODY, "dev", interface, "nud", "permanent"]


@contextmanager
def cable() -> Iterator[Cable]:
    """Skips where this user may not make namespaces, also in CI: that is a right, not an omission."""
    name, network = secrets.token_hex(3), ip_address("10.213.0.0") + 4 * secrets.randbelow(1 << 14)
    laid = Cable(f"cola-{name}", f"ch{name}", f"cd{name}", str(network + 1), str(network + 2))
    try:
        ip("netns", "add", laid.namespace)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here: {error}")
    try:
        _lay(laid)
        yield laid
    finally:
        for gone in (("link", "del", laid.host_interface), ("netns", "del", laid.namespace)):
            with suppress(subprocess.CalledProcessError):
                ip(*gone)


def _lay(laid: Cable) -> None:
    inside = ("-n", laid.namespace)
    try:
        ip("link", "add", laid.host_interface, "type", "veth", "peer", "name", laid.device_interface)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no virtual interfaces here: {error.stderr.strip()}")
    ip("link", "set", laid.device_interface, "netns", laid.namespace)
    ip("addr", "add", f"{laid.host}/30", "dev", laid.host_interface)
    ip(*inside, "addr", "add", f"{laid.device}/30", "dev", laid.device_interface)
    ip("link", "set", laid.host_interface, "up")
    ip(*inside, "link", "set", laid.device_interface, "up")
    ip(*inside, "link", "set", "lo", "up")


def ip(*words: str) -> None:
    run("ip", *words)


def run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, text=True)
