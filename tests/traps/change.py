"""One trap of docs/traps.md as a change of the source: what putting it back would look like."""

from __future__ import annotations

from dataclasses import dataclass

Edit = tuple[str, str]  # old text, new text


@dataclass(frozen=True, slots=True)
class Change:
    """One form of one trap, in one file of the package, and which of the trap's tests catches it.

    Every old text occurs exactly once in its file, so that the list breaks loudly when code moves.
    """

    trap: int
    form: str
    test: str
    file: str
    edits: tuple[Edit, ...]

    @property
    def name(self) -> str:
        return f"{self.trap}: {self.form}"

    def applied(self, source: str) -> str:
        """The source with the trap put back."""
        for old, new in self.edits:
            assert source.count(old) == 1, f"{self.name}: {self.file} has {source.count(old)} times: {old}"
            source = source.replace(old, new)
        return source


def changed(trap: int, form: str, test: str, file: str, *edits: Edit) -> Change:
    return Change(trap, form, test, f"cola_runtime/{file}", edits)
