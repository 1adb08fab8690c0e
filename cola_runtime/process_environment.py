"""What the environments of our processes say to others' code in them: numeric libraries, gRPC, glibc, Ray.

Each must be said before that code is loaded. Settings of ours are in `config.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path

TLS_ENVIRONMENT = {"GRPC_SSL_CIPHER_SUITES": "ECDHE-PSK-CHACHA20-POLY1305"}
"""Of TLS 1.2's cipher suites one that needs a key shared before: none is. TLS 1.3 has its own."""
PRELOADED = "LD_PRELOAD"  # libraries that are loaded before all others
LARGE_PAGES = "glibc.malloc.hugetlb=1"
JEMALLOC_SETTINGS = "MALLOC_CONF"
KEEP_LARGE = "oversize_threshold:0"  # freed pieces of 8 MiB and more may be used again, too
WORKER_NICENESS = "RAY_worker_niceness"  # added to that of Ray's raylet
SPINS = "1000"  # of a thread that waits, before it sleeps


def child_environment(**changes: str) -> dict[str, str]:
    """The environment for a process that we start, with changes."""
    return {**os.environ, **changes}


def set_thread_environment(threads: int) -> None:
    """Fix how numeric libraries use threads, before they are imported (Ray presets OMP_NUM_THREADS).

    A thread that waits spins `SPINS` times and then sleeps. Where it spins on, two threads beside
    one other busy process are ten times slower than one; where it sleeps at once, two threads on idle cores
    are no faster than one (docs/performance.md).
    """
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)
    os.environ["GOMP_SPINCOUNT"] = SPINS
    # A passive one would not let a process with several pools of threads spin at all.
    os.environ["OMP_WAIT_POLICY"] = "ACTIVE"


def actor_environment() -> dict[str, str]:
    """Of a process that Ray starts for us: what is read before the first line of Python is.

    Memory comes from jemalloc (`jemalloc`), which would give pieces of 8 MiB and more back to the kernel as
    soon as they are free: an adapter's weights arrive in one with every step. Without jemalloc glibc asks the
    kernel for large pages: of 4 KiB each, zeroing and mapping fresh ones for messages and tensors took a
    tenth of all CPU time (docs/performance.md). Ray would start its workers at niceness 15: beside two busy
    processes on two cores they got 3 to 5 % of a core each, too little to be sure of a heartbeat. What the
    service's own environment says of any of these goes first.
    """
    return {
        **TLS_ENVIRONMENT,
        PRELOADED: os.environ.get(PRELOADED, jemalloc()),
        JEMALLOC_SETTINGS: os.environ.get(JEMALLOC_SETTINGS, KEEP_LARGE),
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", LARGE_PAGES),
        WORKER_NICENESS: os.environ.get(WORKER_NICENESS, "0"),
    }


@contextmanager
def in_actor_environment() -> Iterator[None]:
    """While it lasts, what this process starts has an actor's environment; afterwards all is as before."""
    before = dict(os.environ)
    os.environ |= actor_environment()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@cache
def jemalloc() -> str:
    """The file of the jemalloc that Ray's package brings along; "" where it brings none.

    Torch asks for every tensor at a multiple of 64 bytes. glibc answers that by cutting both ends off a
    larger piece, which took an eighth of a short row's step, jemalloc from a list (docs/performance.md).
    """
    ray = find_spec("ray")
    places = [] if ray is None else ray.submodule_search_locations or []
    files = (Path(place, "core", "libjemalloc.so") for place in places)
    return next((str(file) for file in files if file.is_file()), "")


def offer_tls_1_3_only() -> None:
    """Fix that no TLS connection of this process is older than 1.3 (transport/tls.py says how).

    Before grpc is imported, which reads it then.
    """
    os.environ.update(TLS_ENVIRONMENT)


@contextmanager
def own_ray_environment(token: Path) -> Iterator[None]:
    """While it lasts, a Ray that this process starts is on loopback and answers who has its token only.

    `token` is the file that holds it (the one that Ray would make, in `~/.ray`, is everybody's to read),
    unless the environment names another. Afterwards the environment is as before: the next one has its own.
    """
    before = dict(os.environ)
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # on those systems Ray keeps to loopback anyway
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if "RAY_AUTH_TOKEN" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN_PATH", str(token.resolve()))
    try:
        yield
    finally:
        for name in ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
            os.environ.pop(name, None)
            if name in before:
                os.environ[name] = before[name]
