"""Does anything get lost, stuck or fat while processes die every 20 seconds?

    python benchmarks/soak.py [--minutes N] [--quick] [--json] [--seed N]      `make soak MINUTES=n`

A coordinator (`cola serve`), its base model as a Ray actor and three `cola device` processes serve three
tenants over the SDK, who submit, pause, resume and cancel jobs of a tiny model at random. Every 20 s a
device, the base model or the coordinator gets a SIGKILL, a device is stopped for longer than its lease, or a
stream is cut; sometimes two of them at once. All the while is checked (cola_runtime/testing/soak_ledger.py,
soak_tenants.py):

* recorded steps are 1, 2, 3, ... once each; epochs grow; ends do not change; no job fails
* every listed checkpoint loads and has its checksum
* a completed job has exactly its steps and tokens; the adapter of one whose base steps hold nothing else has
  the same bytes as without faults, every other one's is within 1e-5; its optimizer has stepped as often
* after a kill every active job makes progress within 30 s (device, stream) or 60 s (base model, coordinator)
* tenants are charged what their jobs' records say
* nothing ends that was not killed; a dead coordinator's processes are gone after 30 s
* of each role, memory (Theil and Sen's slope over every process life behind its warm-up), open files and
  threads stay flat; the run ends with a time without kills for that

The exit code is 1 when anything of it was violated. `--quick` is three rounds.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from cola_runtime.testing.record import argument_parser, emit, record
from cola_runtime.testing.soak import Kill, Soak, SoakPlan

QUIET_SHARE = 1 / 6  # of the time, at its end, at most five minutes
MOST_QUIET_SECONDS = 300.0
QUICK = (Kill.DEVICE, Kill.CUT, Kill.BASE_MODEL)


def main() -> None:
    parser = argument_parser(__doc__ or "")
    parser.add_argument("--minutes", type=float, default=30.0)
    arguments = parser.parse_args()
    started = datetime.now(UTC)
    torch.set_num_threads(1)
    print(f"seed {arguments.seed}", flush=True)
    plan = plan_for(arguments.minutes, seed=arguments.seed, quick=arguments.quick)
    with tempfile.TemporaryDirectory(prefix="cola-soak-") as folder:
        report = asyncio.run(Soak(plan, Path(folder)).run())
    print_kills(report)
    emit(record("soak", report, seed=arguments.seed, started=started), arguments.json)
    for violation in report["violations"]:
        print(f"VIOLATION {violation}")
    print(f"seed {arguments.seed}: {len(report['violations'])} violations")
    sys.exit(1 if report["violations"] else 0)


def plan_for(minutes: float, *, seed: int, quick: bool) -> SoakPlan:
    if quick:
        return SoakPlan(seed=seed, seconds=0.0, kills=QUICK, tenants=2, devices=2, steps=60, round_seconds=6)
    quiet = min(MOST_QUIET_SECONDS, 60 * minutes * QUIET_SHARE)
    return SoakPlan(seed=seed, seconds=60 * minutes - quiet, quiet_seconds=quiet)


def print_kills(report: Mapping[str, Any]) -> None:
    print(f"\n{'kill':<42}{'struck':>8}{'alone':>7}{'median s':>10}{'largest s':>11}{'target s':>10}")
    for kill, row in report["kills"].items():
        values = [row[name] for name in ("struck", "alone", "median_seconds", "largest_seconds")]
        shown = [("-" if value is None else value) for value in values]
        print(f"{kill:<42}{shown[0]:>8}{shown[1]:>7}{shown[2]:>10}{shown[3]:>11}{row['target_seconds']:>10}")
    print()


if __name__ == "__main__":
    main()
