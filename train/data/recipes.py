"""The recipe of each corpus: how its files are found, cut into examples, and split."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

from fsn_jax.vocabulary import SEPARATOR, Unit, code_points
from train.data.corpus import SPLITS
from train.data.fetch import LocalFile, Progress, fetch
from train.data.pinned import ENWIK8_MEMBER, PINNED
from train.data.python_files import select, shard_sources, split_of, wheel_sources
from train.data.user_files import (
    UserFile,
    between,
    contents,
    find_files,
    fingerprint,
    joined,
    split_by_file,
    without_duplicates,
)
from train.errors import UserError
from train.files import user_path

EXAMPLE_BYTES = 1 << 20  # longer texts are cut into examples of this size
MIN_SPLIT_BYTES = 2048  # of every split: some windows
MIN_BYTES = 20 * MIN_SPLIT_BYTES

SHARD_SUFFIX = ".json.gz"  # of codeparrot-clean

FILE_RULE = "tests, empty files and exact duplicates left out; split by the SHA-256 of each file"

Examples = Iterator[tuple[str, bytes]]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a corpus is made of.

    Attributes:
      examples: returns (name, text) of each example of a split, in order.
      source: what the files are, in words.
      sha256: hexadecimal SHA-256 that stands for the files.
      rule: how they become the splits, in words.
    """

    examples: Callable[[str], Examples]
    source: str
    sha256: str
    rule: str


def recipe_of(name: str, path: str, scratch: Path, unit: Unit, progress: Progress) -> Recipe:
    """Returns the recipe of a corpus, whose files are fetched into ``scratch`` or are at ``path``.

    Raises:
      UserError: the files cannot be had, are not the expected ones, or hold too little.
    """
    if name == "enwik8":
        return _enwik8(path, scratch, progress)
    if name == "pycode":
        return _pycode(path, scratch, progress)
    if name == "codeparrot":
        return _codeparrot(path)
    return _text(path, progress, unit)


def cut_at(size: int) -> dict[str, tuple[int, int]]:
    """Returns first and one-past-last byte of each split of ``size`` bytes, 90 / 5 / 5 in order."""
    part = size // 20
    ends = (0, size - 2 * part, size - part, size)
    return dict(zip(SPLITS, zip(ends, ends[1:], strict=False), strict=True))


def _enwik8(path: str, scratch: Path, progress: Progress) -> Recipe:
    [wanted] = PINNED["enwik8"].files
    if path:
        own = LocalFile(user_path("config.data.path", path), member=ENWIK8_MEMBER)
        wanted = dataclasses.replace(wanted, sources=(own,))
    advice = (
        "get enwik8 or enwik8.zip yourself and name it: --config.data.path=FILE (of train) or "
        "--path=FILE (of train prepare); a text of your own has the name text"
    )
    raw = fetch(wanted, scratch, advice=advice, progress=progress)

    def examples(split: str) -> Examples:
        start, stop = cut_at(wanted.size)[split]
        with raw.open("rb") as stream:
            stream.seek(start)
            for first in range(start, stop, EXAMPLE_BYTES):
                yield f"enwik8:{first}", stream.read(min(EXAMPLE_BYTES, stop - first))

    return Recipe(
        examples,
        source=f"enwik8, {wanted.size} bytes",
        sha256=wanted.sha256,
        rule="in order: all but the last 10 %, 5 %, 5 %",
    )


def _pycode(path: str, scratch: Path, progress: Progress) -> Recipe:
    files = PINNED["pycode"].files
    advice = (
        f"put the wheels {', '.join(file.name for file in files)} into a folder and name it: "
        "--config.data.path=FOLDER (of train) or --path=FOLDER (of train prepare)"
    )
    if path:
        own = user_path("config.data.path", path)
        files = tuple(
            dataclasses.replace(wanted, sources=(LocalFile(own / wanted.name),)) for wanted in files
        )
    wheels = [fetch(wanted, scratch, advice=advice, progress=progress) for wanted in files]

    def examples(split: str) -> Examples:
        # The order of the digests is as good as random: every part of a split has some of each.
        for digest, name, text in sorted((d, n, t) for n, t, d in select(wheel_sources(wheels))):
            if split_of(digest) == split:
                yield name, text + SEPARATOR

    hashes = "".join(f"{wanted.sha256} {wanted.name}\n" for wanted in files)
    return Recipe(
        examples,
        source=f"the Python files of {', '.join(wheel.name for wheel in wheels)}",
        sha256=hashlib.sha256(hashes.encode()).hexdigest(),
        rule=f"{FILE_RULE}, in the order of it",
    )


def _codeparrot(path: str) -> Recipe:
    found = find_files(path, SHARD_SUFFIX)
    shards = [shard.path for shard in found]

    def examples(split: str) -> Examples:
        for name, text, digest in select(shard_sources(shards)):
            if split_of(digest) == split:
                yield name, text + SEPARATOR

    # tensorflow-datasets refuses an empty split: read on until each holds enough.
    sizes = dict.fromkeys(SPLITS, 0)
    for _, text, digest in select(shard_sources(shards)):
        sizes[split_of(digest)] += len(text) + len(SEPARATOR)
        if min(sizes.values()) >= MIN_SPLIT_BYTES:
            break
    else:
        raise _too_small(path, sum(sizes.values()))
    return Recipe(
        examples,
        source=f"codeparrot-clean shards: {len(shards)} at {path}",
        sha256=fingerprint(found),
        rule=FILE_RULE,
    )


def _text(path: str, progress: Progress, unit: Unit) -> Recipe:
    """Returns the recipe of the user's files; as characters they are UTF-8 and none is cut."""
    found = find_files(path, report=progress)
    files = without_duplicates(found)
    if unit == "characters":
        for file in files:
            _check_utf8(file)
    every = functools.partial(joined, files, separated=len(files) > 1)
    sizes = dict.fromkeys((file.name for file in files), 0)
    for name, piece in every():
        sizes[name] += len(piece)
    total = sum(sizes.values())
    if total < MIN_BYTES:
        raise _too_small(path, total)
    by_file = split_by_file(list(sizes.values()), [f.sha256 for f in files], MIN_SPLIT_BYTES)
    rule = "by file" if by_file else "by position"
    progress(f"files: {len(files)}, of {total} bytes together, split {rule}")

    def pieces(split: str) -> Examples:
        if by_file:
            return joined([files[index] for index in by_file[split]], separated=True)
        start, stop = cut_at(total)[split]
        if unit == "characters":
            start, stop = (_character_start(every(), cut) for cut in (start, stop))
        return between(every(), start, stop)

    def examples(split: str) -> Examples:
        for name, piece in pieces(split):
            for offset in range(0, len(piece), EXAMPLE_BYTES):
                yield name, piece[offset : offset + EXAMPLE_BYTES]

    return Recipe(
        examples,
        source=f"files: {len(files)} at {path}",
        sha256=fingerprint(found),
        rule=f"exact duplicates left out; 90 / 5 / 5 {rule}",
    )


def _character_start(pieces: Examples, offset: int) -> int:
    """Returns where the character begins that the byte at ``offset`` of UTF-8 pieces belongs to."""
    first = max(offset - 3, 0)  # no character is longer than four bytes
    near = b"".join(piece for _, piece in between(pieces, first, offset + 1))
    if len(near) <= offset - first:  # the end
        return offset
    return first + next(i for i in reversed(range(len(near))) if near[i] & 0xC0 != 0x80)


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
