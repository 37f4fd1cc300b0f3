"""The files that a user's path names, what they hold, and how they are split."""

import contextlib
import dataclasses
import errno
import glob
import gzip
import hashlib
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from train.data.fetch import CHUNK_BYTES, Capped, SourceFailure
from train.errors import UserError
from train.files import file_sha256, user_path

SEPARATOR = b"\0"  # after each document of a JSON-lines file, and after each of several files
JSON_FIELDS = ("text", "content")
_UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
GLOB_CHARACTERS = "*?["
SMALL_BYTES = 16 << 20
HEAD_BYTES = 1 << 16
MOST_CONTROLS = 0.05
_CONTROLS = bytes({*range(32), 127} - {*b"\t\n\r\f\b\x1b"})
SIGNATURES = {
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b": "a gzip file without .gz",
    b"BZh": "a bzip2 file",
    b"\xfd7zXZ": "an xz file",
    b"(\xb5/\xfd": "a zstd file",
    b"7z\xbc\xaf": "a 7z archive",
    b"%PDF-": "a PDF",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"GIF8": "a picture",
    b"\xff\xfe": "UTF-16, to be converted to UTF-8",
    b"\xfe\xff": "UTF-16, to be converted to UTF-8",
}
"""What some files begin with that are no text, and what to call them."""
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


def find_files(
    path: str, suffix: str = "", *, report: Callable[[str], None] | None = None
) -> list[UserFile]:
    """The files that `path` names, sorted by name, each with its hash.

    `path` is a file; or a folder, which stands for every regular file below it; or a pattern such
    as `folder/**/*.md`. Of a folder or a pattern, files that hold no text (see `not_text`) are
    passed over, as are, of a folder, files and folders whose names begin with a dot and what is no
    regular file. A link of a folder must not lead out of it.

    Args:
      path: as above; `~` is understood.
      suffix: if not empty, the files of a folder are those that end so, whatever they hold.
      report: told what is passed over, and whether a file that was named holds no text.

    Raises:
      UserError: there is nothing at `path`, or no file below it, a file or folder cannot be read,
        or a link leads out of the folder, or nowhere.
    """
    named, report = user_path("config.data.path", path), report or (lambda line: None)
    try:
        if named.is_file():
            if looks := not_text(named):
                report(
                    f"warning: {path} looks like {looks}, not text; its bytes are taken as they are"
                )
            found = [(named.name, named)]
        elif named.is_dir():
            found = _of_folder(path, named, suffix, report)
        elif named.exists():
            raise UserError(
                f"config.data.path={path} is a pipe or device, which cannot be read twice: write "
                f"what it gives to a file and name that"
            )
        elif any(character in str(named) for character in GLOB_CHARACTERS):
            found = _of_pattern(path, named, report)
        else:
            raise UserError(
                f"config.data.path={path} does not exist: name a file, a folder or a pattern"
            )
        return [UserFile(file, name, file_sha256(file)) for name, file in sorted(found)]
    except OSError as error:
        raise UserError(
            f"config.data.path={path}: cannot read {error.filename} ({error.strerror})"
        ) from error


Found = list[tuple[str, Path]]  # name below the folder or pattern, and file


def _of_folder(path: str, folder: Path, suffix: str, report: Callable[[str], None]) -> Found:
    hidden: list[str] = []
    found, others = _walk(folder, hidden)
    if suffix:
        found = [(name, file) for name, file in found if name.endswith(suffix)]
    else:
        found = _with_text(found, others)
    if hidden:
        report(f"passed over, as their names begin with a dot: {_listed(hidden)}")
    if others and not suffix:
        report(f"passed over, as they hold no text: {_listed(others)}")
    if not found:
        wanted = f"{suffix} file" if suffix else "file of text" if others else "file"
        raise UserError(f"config.data.path={path} is a folder with no {wanted} in it")
    return found


def _of_pattern(path: str, pattern: Path, report: Callable[[str], None]) -> Found:
    for above in pattern.parents:  # glob passes over a folder that it cannot read
        for folder in glob.glob(os.path.join(above, ""), recursive=True):
            if not os.access(folder, os.R_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), folder)
    matches = [Path(match) for match in glob.glob(str(pattern), recursive=True)]
    files = [(match.as_posix(), match) for match in matches if match.is_file()]
    if not files:
        raise UserError(f"config.data.path={path} matches no file")
    root = os.path.commonpath([os.path.dirname(name) for name, _ in files])
    others: list[str] = []
    found = _with_text(
        [(Path(name).relative_to(root).as_posix(), file) for name, file in files], others
    )
    if others:
        report(f"passed over, as they hold no text: {_listed(others)}")
    if not found:
        raise UserError(f"config.data.path={path} matches no file of text")
    return found


def _with_text(found: Found, others: list[str]) -> Found:
    """The files that hold text; the others are added to ``others``."""
    looks = {name: not_text(file) for name, file in found}
    others += [f"{name} ({what})" for name, what in looks.items() if what]
    return [(name, file) for name, file in found if not looks[name]]


def _listed(names: Sequence[str], most: int = 5) -> str:
    """The first of some names in their order, and how many there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(sorted(names)[:most]) + more


def not_text(file: Path) -> str:
    """What a file looks like that holds no text, in words; "" if it does hold text.

    It holds none if what it holds begins as one of `SIGNATURES`, or if more than the share
    `MOST_CONTROLS` of its first `HEAD_BYTES` (of 512, if it is shorter) are control characters that
    texts do not have: all below 32 and 127, but for tab, line ends, form feed, backspace, escape.
    """
    with unpacked(file) if file.name.lower().endswith(".gz") else file.open("rb") as stream:
        head = stream.read(HEAD_BYTES)
    for begins, what in SIGNATURES.items():
        if head.startswith(begins):
            return what
    controls = len(head) - len(head.translate(None, _CONTROLS))
    return "binary data" if controls > MOST_CONTROLS * max(len(head), 512) else ""


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


def _walk(folder: Path, hidden: list[str]) -> tuple[Found, list[str]]:
    """The regular files below a folder, and the others; ``hidden`` gets the names with a dot."""
    found: Found = []
    others: list[str] = []
    for parent, folders, names in os.walk(folder, onerror=_raise):
        for name in (*folders, *names):
            file = Path(parent, name)
            short = file.relative_to(folder).as_posix()
            if name.startswith("."):
                hidden.append(short)
                continue
            if file.is_symlink():
                _check_link(folder, file)
            if file.is_file():
                found.append((short, file))
            elif not file.is_dir():
                others.append(f"{short} (a pipe, socket or device)")
        folders[:] = [name for name in folders if not name.startswith(".")]
    return found, others


def _raise(error: OSError) -> None:
    raise error


def _check_link(folder: Path, link: Path) -> None:
    target = link.resolve()
    where = "outside it" if target.exists() else "that is not there"
    if where != "outside it" or not target.is_relative_to(folder.resolve()):
        raise UserError(
            f"config.data.path={folder} holds {link.relative_to(folder)}, a link to {target} "
            f"{where}: remove it, or put what is meant in its place"
        )


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
