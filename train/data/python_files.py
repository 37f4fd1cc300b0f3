"""Rules for corpora of Python source (`pycode`, `codeparrot`), and the files they apply to.

* A file is left out if it tests: a folder on its path is named `test` or `tests`, or the file is
  named `test.py`, `tests.py`, `conftest.py`, `test_*.py` or `*_test.py`.
* An empty file is left out, and so is one that holds a NUL byte, which is no Python source.
* Of files with equal bytes the first is taken.
* The SHA-256 of the bytes picks the split: its first 8 bytes, as a big-endian number modulo 100,
  are below 90 for train, below 95 for validation, else test. So no file is in two splits, whatever
  else is in the corpus.
* Every file is followed by one NUL byte, SEPARATOR.
"""

import fnmatch
import hashlib
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from fsn_jax.vocabulary import SEPARATOR
from train.data.user_files import json_text, unpacked

TEST_FOLDERS = frozenset({"test", "tests"})
TEST_NAMES = ("test.py", "tests.py", "conftest.py", "test_*.py", "*_test.py")


def is_test(path: str) -> bool:
    """Whether a file of this path, written with forward slashes, is left out as a test."""
    parts = PurePosixPath(path).parts
    if not TEST_FOLDERS.isdisjoint(parts[:-1]):
        return True
    return bool(parts) and any(fnmatch.fnmatchcase(parts[-1], name) for name in TEST_NAMES)


def split_of(digest: bytes) -> str:
    """Returns the split of a file whose content has this SHA-256."""
    percent = int.from_bytes(digest[:8], "big") % 100
    return "train" if percent < 90 else "validation" if percent < 95 else "test"


def select(files: Iterable[tuple[str, bytes]]) -> Iterator[tuple[str, bytes, bytes]]:
    """Applies the rules to (path, content) pairs; yields (path, content, SHA-256 digest)."""
    seen: set[bytes] = set()
    for path, content in files:
        if is_test(path) or not content or SEPARATOR in content:
            continue
        digest = hashlib.sha256(content).digest()
        if digest not in seen:
            seen.add(digest)
            yield path, content, digest


def wheel_sources(wheels: Sequence[Path]) -> Iterator[tuple[str, bytes]]:
    """Yields (path in the wheel, content) of every `.py` file, wheel by wheel, paths sorted."""
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as pack:
            for path in sorted(set(pack.namelist())):
                if path.endswith(".py"):
                    yield path, pack.read(path)


def shard_sources(shards: Sequence[Path]) -> Iterator[tuple[str, bytes]]:
    """Yields (path, content) of every line but blank ones, shard by shard.

    Raises:
      UserError: a shard is no gzip file, or a line of it no object with a text "content".
    """
    for shard in shards:
        with unpacked(shard) as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    fields, text = json_text(line, f"{shard}, line {number}", ("content",))
                    yield str(fields.get("path") or ""), text
