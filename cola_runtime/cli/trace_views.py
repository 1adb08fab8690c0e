"""How a trace's report looks in a terminal."""

from __future__ import annotations

from cola_runtime.cli.output import print_fields, print_table
from cola_runtime.trace.report import Exports, TraceReport


def print_report(report: TraceReport) -> None:
    others = ", ".join(f"{name} {share:.1%}" for name, share in report.base_other_work.items())
    print_fields(
        {
            "base busy": f"{report.base_busy:.1%} from the first to the last of {report.base_steps:,} base "
            f"steps ({report.seconds:.1f} s)",
            "besides": others,
            "replicas": _replicas(report),
            "tokens": f"{report.tokens:,}, and {report.padding:.1%} of what was computed is padding",
            "devices busy": ", ".join(f"{name} {share:.1%}" for name, share in report.device_busy.items()),
            "exports": _exports(report.exports),
        }
    )
    rows = [(f"{gap.begin:.3f}", f"{1e3 * gap.seconds:.1f}", gap.cause) for gap in report.longest_gaps]
    print_table((">AT S", ">GAP MS", "CAUSE"), rows, empty="No gaps between base steps.")


def _replicas(report: TraceReport) -> str:
    """Of several, how busy each was; what else is said is of the one with the most base steps."""
    shares = [f"{name} {share:.1%}" for name, share in sorted(report.base_models.items())]
    return ", ".join(shares) if len(shares) > 1 else ""


def _exports(exports: Exports) -> str:
    if not exports.exports:
        return "none"
    longest, without, usual = (
        f"{1e3 * seconds:.1f} ms"
        for seconds in (
            exports.longest_gap_meanwhile_seconds,
            exports.longest_gap_seconds,
            exports.usual_gap_seconds,
        )
    )
    return (
        f"{exports.exports}, beside {exports.base_steps_meanwhile} base steps and {exports.gaps_meanwhile} "
        f"gaps: {exports.delayed_steps} steps delayed (longest gap {longest}, without exports {without}, "
        f"99 in 100 of those below {usual})"
    )
