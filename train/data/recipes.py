"""What each corpus is made of: its files, the builder of its records, its rule of splitting."""

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train.data.corpus import SPLITS
from train.data.fetch import LocalFile, Progress, fetch
from train.data.pinned import ENWIK8_MEMBER, PINNED
from train.data.python_files import SEPARATOR, select, split_of
from train.data.user_files import (
    UserFile,
    contents,
    find_files,
    fingerprint,
    plan_splits,
    without_duplicates,
)
from train.data.vocabulary import Unit, code_points
from train.errors import UserError

MIN_SPLIT_BYTES = 2048  # of every split: some windows
MIN_BYTES = 20 * MIN_SPLIT_BYTES

SHARD_SUFFIX = ".json.gz"  # of codeparrot-clean

FILE_RULE = "tests, empty files and exact duplicates left out; split by the SHA-256 of each file"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a corpus is made of.

    Attributes:
      builder: makes the tensorflow-datasets builder that keeps its records under a folder.
      source: what the files are, in words.
      sha256: hexadecimal SHA-256 that stands for the files.
      rule: how they become the splits, in words.
    """

    builder: Callable[[Path], Any]
    source: str
    sha256: str
    rule: str


def _enwik8(path: str, scratch: Path, progress: Progress) -> Recipe:
    from train.data.builder import builder_options
    from train.data.enwik8 import Enwik8

    [wanted] = PINNED["enwik8"].files
    own = [LocalFile(Path(path).expanduser(), member=ENWIK8_MEMBER)]
    raw = fetch(
        scratch / wanted.name,
        own if path else wanted.sources,
        size=wanted.size,
        sha256=wanted.sha256,
        advice=(
            "get enwik8 or enwik8.zip yourself and name it: --config.data.path=FILE (of train) or "
            "--path=FILE (of train prepare)"
        ),
        progress=progress,
    )
    return Recipe(
        lambda folder: Enwik8(raw=raw, **builder_options(folder)),
        source=f"enwik8, {wanted.size} bytes",
        sha256=wanted.sha256,
        rule="in order: all but the last 10 %, 5 %, 5 %",
    )


def _pycode(path: str, scratch: Path, progress: Progress) -> Recipe:
    from train.data.builder import builder_options
    from train.data.pycode import Pycode

    wheels = []
    for wanted in PINNED["pycode"].files:
        own = [LocalFile(Path(path).expanduser() / wanted.name, member=None)]
        wheels.append(
            fetch(
                scratch / wanted.name,
                own if path else wanted.sources,
                size=wanted.size,
                sha256=wanted.sha256,
                advice=(
                    f"put the wheels {', '.join(file.name for file in PINNED['pycode'].files)} "
                    "into a folder and name it: --config.data.path=FOLDER (of train) or "
                    "--path=FOLDER (of train prepare)"
                ),
                progress=progress,
            )
        )
    hashes = "".join(f"{wanted.sha256} {wanted.name}\n" for wanted in PINNED["pycode"].files)
    return Recipe(
        lambda folder: Pycode(wheels=wheels, **builder_options(folder)),
        source=f"the Python files of {', '.join(wheel.name for wheel in wheels)}",
        sha256=hashlib.sha256(hashes.encode()).hexdigest(),
        rule=f"{FILE_RULE}, in the order of it",
    )


def _codeparrot(path: str, scratch: Path, progress: Progress) -> Recipe:
    from train.data.builder import builder_options
    from train.data.codeparrot import Codeparrot, shard_sources

    del scratch, progress
    found = find_files(path, SHARD_SUFFIX)
    shards = [shard.path for shard in found]
    # An empty split is an error to tensorflow-datasets: look until each holds enough.
    sizes = dict.fromkeys(SPLITS, 0)
    for _, content, digest in select(shard_sources(shards)):
        sizes[split_of(digest)] += len(content) + len(SEPARATOR)
        if min(sizes.values()) >= MIN_SPLIT_BYTES:
            break
    else:
        raise _too_small(path, sum(sizes.values()))
    return Recipe(
        lambda folder: Codeparrot(shards=shards, **builder_options(folder)),
        source=f"codeparrot-clean shards: {len(shards)} at {path}",
        sha256=fingerprint(found),
        rule=FILE_RULE,
    )


def _text(path: str, scratch: Path, progress: Progress) -> Recipe:
    del scratch
    return _own_text(path, progress, "bytes")


def _characters(path: str, scratch: Path, progress: Progress) -> Recipe:
    """Text that must be UTF-8, no character of which is cut."""
    del scratch
    return _own_text(path, progress, "characters")


def _own_text(path: str, progress: Progress, unit: Unit) -> Recipe:
    from train.data.builder import builder_options
    from train.data.text import Text, between_characters, separated

    found = find_files(path)
    files = without_duplicates(found)
    if unit == "characters":
        for file in files:
            _check_utf8(file)
    sizes = [sum(map(len, separated(file, several=len(files) > 1))) for file in files]
    if sum(sizes) < MIN_BYTES:
        raise _too_small(path, sum(sizes))
    rule, spans = plan_splits(sizes, [file.sha256 for file in files], MIN_SPLIT_BYTES)
    if unit == "characters":
        spans = between_characters(files, spans)
    progress(f"files: {len(files)}, of {sum(sizes)} bytes together, split {rule}")
    return Recipe(
        lambda folder: Text(files=files, spans=spans, **builder_options(folder)),
        source=f"files: {len(files)} at {path}",
        sha256=fingerprint(found),
        rule=f"exact duplicates left out; 90 / 5 / 5 {rule}",
    )


def recipe_of(name: str, path: str, scratch: Path, unit: Unit, progress: Progress) -> Recipe:
    """The recipe of a corpus, whose files are fetched into ``scratch`` or found at ``path``.

    Raises:
      UserError: the files cannot be had, are not the expected ones, or hold too little.
    """
    make = _RECIPES[name] if unit == "bytes" else _characters
    return make(path, scratch, progress)


_RECIPES: dict[str, Callable[[str, Path, Progress], Recipe]] = {
    "enwik8": _enwik8,
    "pycode": _pycode,
    "codeparrot": _codeparrot,
    "text": _text,
}


def _check_utf8(file: UserFile) -> None:
    try:
        for _ in code_points(contents(file.path)):
            pass
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file.path} is not UTF-8 at byte {error.start}, as config.data.vocabulary=characters "
            "needs it: convert it, or say config.data.vocabulary=bytes"
        ) from None


def _too_small(path: str, size: int) -> UserError:
    return UserError(
        f"config.data.path={path} gives {size} bytes of text, which is too little: give at least "
        f"{MIN_BYTES}, so that each of the splits can hold {MIN_SPLIT_BYTES}"
    )
