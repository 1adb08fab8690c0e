"""The one place where an error becomes text and an exit code.

2 usage, 3 validation, 4 authentication, 5 not found, 6 conflict, 7 quota, 8 job failed, 9 unavailable
"""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from cola_runtime.cli.output import clean, print_json
from cola_runtime.errors import ColaError, Violation, problem_details, remedy_of


def report(error: ColaError, *, as_json: bool) -> int:
    """Print the error, on stdout as JSON or on stderr as text; the exit code."""
    if as_json:
        print_json({"error": {**problem_details(error), "exit_code": error.exit_code}})
    else:
        console = Console(stderr=True, highlight=False, soft_wrap=True)
        for line in error_lines(error):
            console.print(line)
    return error.exit_code


def error_lines(error: ColaError) -> list[Text]:
    """What is wrong, where, the limit, and what to do."""
    lines = [Text.assemble(("error ", "bold red"), (clean(error.reason), "bold"))]
    if not _says_the_same(error.message, error.violations):
        where = f"{clean(error.where)}: " if error.where else ""
        lines.append(Text.assemble("  ", (where, "cyan"), clean(error.message)))
    places = [violation for violation in error.violations if violation.where != error.where]
    lines += [_violation_line(violation) for violation in places]
    bounds = [
        f"{name} {clean(value)}" for name, value in (("limit", error.limit), ("got", error.actual)) if value
    ]
    if bounds:
        lines.append(Text(f"  {', '.join(bounds)}"))
    if remedy := remedy_of(error):
        lines.append(Text.assemble(("  → ", "green"), clean(remedy)))
    return lines


def _violation_line(violation: Violation) -> Text:
    return Text.assemble("  ", (f"{clean(violation.where)}: ", "cyan"), clean(violation.message))


def _says_the_same(message: str, violations: tuple[Violation, ...]) -> bool:
    return bool(violations) and message == "; ".join(f"{v.where}: {v.message}" for v in violations)
