"""The operator's module and the job file of docs/adapter_kinds.md, as a reader would copy them."""

from __future__ import annotations

import re
from pathlib import Path


def documented(repository: Path, language: str, holding: str) -> str:
    """The one code block of that language that holds the text."""
    text = (repository / "docs" / "adapter_kinds.md").read_text(encoding="utf-8")
    (block,) = [code for code in re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL) if holding in code]
    return block


def write_module(repository: Path, folder: Path) -> str:
    """`my_adapters.py` in `folder`; returns the name to import it by."""
    code = documented(repository, "python", "# my_adapters.py")
    (folder / "my_adapters.py").write_text(code, encoding="utf-8")
    return "my_adapters"
