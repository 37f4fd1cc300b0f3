"""The files that a user's path names, what they hold, and how they are split."""

import contextlib
import dataclasses
import glob
import gzip
import hashlib
import io
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from train.data.fetch import CHUNK_BYTES, Capped, SourceFailure
from train.errors import UserError
from train.files import file_sha256

SEPARATOR = b"\0"  # after each document of a JSON-lines file, and after each of several files
JSON_FIELDS = ("text", "content")
_UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
GLOB_CHARACTERS = "*?["
SMALL_BYTES = 16 << 20
MAX_EXPANSION = 250  # of a gzip file: text comes to some 3 to 20 times, the worst logs to 100


@dataclasses.dataclass(frozen=True)
class UserFile:
    """One file of the user's.

    Attributes:
      path: where it is.
      name: its path below the folder that was named, with forward slashes.
      sha256: hexadecimal digest of the file as it is stored.
    """

    path: Path
    name: str
    sha256: str


@dataclasses.dataclass(frozen=True)
class Span:
    """The bytes start to stop of what the file with this index holds."""

    file: int
    start: int
    stop: int


def find_files(path: str, suffix: str = "") -> list[UserFile]:
    """The files that `path` names, sorted by name, each with its hash.

    `path` is a file; or a folder, which stands for every regular file below it; or a pattern such
    as `folder/**/*.md`. Files and folders whose names begin with a dot are passed over, and links
    to folders are not followed; a link to a file must not lead out of the folder.

    Args:
      path: as above; `~` is understood.
      suffix: if not empty, files of a folder that do not end so are passed over.

    Raises:
      UserError: there is nothing at `path`, or no file below it, a file cannot be read, or a
        link leads out of the folder.
    """
    named = Path(path).expanduser()
    if named.is_file():
        found = [(named.name, named)]
    elif named.is_dir():
        found = [(file.relative_to(named).as_posix(), file) for file in _walk(named)]
        found = [(name, file) for name, file in found if name.endswith(suffix)]
        if not found:
            wanted = f"{suffix} file" if suffix else "file"
            raise UserError(f"config.data.path={path} is a folder with no {wanted} in it")
    elif any(character in str(named) for character in GLOB_CHARACTERS):
        matches = (Path(match) for match in glob.glob(str(named), recursive=True))
        found = [(match.as_posix(), match) for match in matches if match.is_file()]
        if not found:
            raise UserError(f"config.data.path={path} matches no file")
        root = os.path.commonpath([os.path.dirname(name) for name, _ in found])
        found = [(Path(name).relative_to(root).as_posix(), file) for name, file in found]
    else:
        raise UserError(
            f"config.data.path={path} does not exist: name a file, a folder or a pattern"
        )
    try:
        return [UserFile(file, name, file_sha256(file)) for name, file in sorted(found)]
    except OSError as error:
        raise UserError(
            f"config.data.path={path}: cannot read {error.filename} ({error.strerror})"
        ) from error


def fingerprint(files: Sequence[UserFile]) -> str:
    """SHA-256 over the names and contents of the files: changes when any of them does."""
    lines = "".join(f"{file.sha256} {file.name}\n" for file in files)
    return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()


def contents(path: Path) -> Iterator[bytes]:
    """Yield what a file holds, in pieces: its bytes, unpacked if `.gz`.

    A file of JSON lines (`.jsonl`, `.jsonl.gz`) holds the "text" or "content" of every line as
    UTF-8, each followed by SEPARATOR.

    Raises:
      UserError: the file is not what its name says.
    """
    name = path.name.lower()
    with unpacked(path) if name.endswith(".gz") else path.open("rb") as stream:
        if name.removesuffix(".gz").endswith(".jsonl"):
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield _document(line, f"{path}, line {number}") + SEPARATOR
        else:
            while chunk := stream.read(CHUNK_BYTES):
                yield chunk


@contextlib.contextmanager
def unpacked(path: Path) -> Iterator[BinaryIO]:
    """What a gzip file holds, as a stream.

    Raises:
      UserError: it is damaged, or holds more than MAX_EXPANSION times its size (or SMALL_BYTES,
        which do no harm).
    """
    limit = max(SMALL_BYTES, MAX_EXPANSION * path.stat().st_size)
    try:
        with gzip.open(path, "rb") as inside, io.BufferedReader(Capped(inside, limit)) as stream:
            yield stream
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{path} is not a sound gzip file: {error}") from error
    except SourceFailure as error:
        raise UserError(
            f"{path} expands to more than {MAX_EXPANSION} times its size, as no text does: unpack "
            f"it yourself if it is sound"
        ) from error


def without_duplicates(files: Sequence[UserFile]) -> list[UserFile]:
    """The files without those that repeat the bytes of an earlier one."""
    first: dict[str, UserFile] = {}
    for file in files:
        first.setdefault(file.sha256, file)
    return list(first.values())


def plan_splits(
    sizes: Sequence[int], digests: Sequence[str], floor: int
) -> tuple[str, Mapping[str, list[Span]]]:
    """Split what some files hold, 90 / 5 / 5.

    Several files are split by file, so that no file is in two splits: in the order of their
    digests each goes to validation while that has less than 5 % and would stay below 7.5 %, else to
    test on the same terms, else to train. One file, or files too few or too large for that, are
    split by position in the order given.

    Args:
      sizes: bytes that each file holds.
      digests: a digest of each, for an order that is as good as random.
      floor: bytes that validation and test must have at least.

    Returns:
      "by file" or "by position", and the spans of each split, in the order of the files.
    """
    total = sum(sizes)
    target, most = total / 20, 3 * total / 40
    held = {"validation": 0, "test": 0}
    chosen = ["train"] * len(sizes)
    for index in sorted(range(len(sizes)), key=lambda index: digests[index]):
        for split in held:
            if held[split] < target and held[split] + sizes[index] <= most:
                held[split] += sizes[index]
                chosen[index] = split
                break
    if min(held.values()) >= max(floor, total / 40):
        spans: dict[str, list[Span]] = {"train": [], "validation": [], "test": []}
        for index, split in enumerate(chosen):
            spans[split].append(Span(index, 0, sizes[index]))
        return "by file", spans
    part = total // 20
    return "by position", {
        "train": _cut(sizes, 0, total - 2 * part),
        "validation": _cut(sizes, total - 2 * part, total - part),
        "test": _cut(sizes, total - part, total),
    }


def _cut(sizes: Sequence[int], start: int, stop: int) -> list[Span]:
    """The spans that make up the bytes start to stop of the files' contents put end to end."""
    spans, before = [], 0
    for index, size in enumerate(sizes):
        first, last = max(start - before, 0), min(stop - before, size)
        if first < last:
            spans.append(Span(index, first, last))
        before += size
    return spans


def _walk(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            file = Path(parent, name)
            if not name.startswith(".") and file.is_file():
                if file.is_symlink() and not file.resolve().is_relative_to(folder.resolve()):
                    raise UserError(
                        f"config.data.path={folder} holds {file.relative_to(folder)}, a link to "
                        f"{file.resolve()} outside it: remove it, or put the file in its place"
                    )
                yield file


def _document(line: bytes, place: str) -> bytes:
    try:
        fields = json.loads(line)
        document = next(fields[name] for name in JSON_FIELDS if name in fields)
        # A lone surrogate is legal in JSON and has no UTF-8; it is kept as three bytes.
        encoded: bytes = document.encode("utf-8", "surrogatepass")
    except (*_UNREADABLE, StopIteration) as error:
        raise UserError(
            f'{place}: expected a JSON object with a text field "text" or "content"'
        ) from error
    return encoded
