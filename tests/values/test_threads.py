"""How long a numeric library's threads spin before they sleep, as the library itself reports it."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from cola_runtime.process_environment import SPINS

SHOWN = re.compile(r"(OMP_NUM_THREADS|OMP_WAIT_POLICY|GOMP_SPINCOUNT) = '(\w+)'")
IMPORT_TORCH = (
    "from cola_runtime.process_environment import set_thread_environment as fix; fix(2); import torch"
)


def test_threads_that_wait_spin_for_a_bounded_time_in_every_pool() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", IMPORT_TORCH],
        env=os.environ | {"OMP_DISPLAY_ENV": "VERBOSE"},
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    shown = dict(SHOWN.findall(ran.stderr))
    if "GOMP_SPINCOUNT" not in shown:
        pytest.skip("torch's threads are not libgomp's here")
    # A passive policy would let only a process with no more threads than cores spin at all.
    assert shown == {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "ACTIVE", "GOMP_SPINCOUNT": SPINS}
