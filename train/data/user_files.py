"""Finds the files that a path of the user's names, reads them, and splits them."""

import contextlib
import dataclasses
import errno
import glob
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fsn_jax.vocabulary import SEPARATOR
from train.errors import UserError
from train.files import file_sha256, has_pattern, user_path

JSON_FIELDS = ("text", "content")
_UNREADABLE = (
    ValueError, LookupError, TypeError, AttributeError, RecursionError, StopIteration
)  # fmt: skip
CHUNK_BYTES = 1 << 20
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
"""First bytes of common kinds of files that are not text, with the name of the kind."""


@dataclasses.dataclass(frozen=True)
class UserFile:
    """A file that the user named.

    Attributes:
      path: path of the file.
      name: path below the folder that was named, with forward slashes.
      sha256: hexadecimal digest of the file as it is stored.
    """

    path: Path
    name: str
    sha256: str


def find_files(
    path: str, suffix: str = "", *, report: Callable[[str], None] | None = None
) -> list[UserFile]:
    """Returns the files that `path` names, sorted by name.

    `path` is a file; or a folder, which stands for every regular file below it; or a pattern such
    as `folder/**/*.md`. Of a folder or a pattern, files that hold no text (see `not_text`) are
    passed over, as are, of a folder, files and folders whose names begin with a dot and what is no
    regular file. A link of a folder must not lead out of it.

    Args:
      path: file, folder or pattern; `~` is the home folder.
      suffix: if not empty, the files of a folder are those that end in it, whatever they hold.
      report: called with a line about files that are passed over or hold no text.

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
        elif has_pattern(named):
            found = _of_pattern(path, named, report)
        else:
            raise UserError(
                f"config.data.path={path} does not exist: name a file, a folder or a pattern"
            )
        return [UserFile(file, name, file_sha256(file)) for name, file in sorted(found)]
    except OSError as error:
        raise UserError(
            f"config.data.path={path}: cannot read {error.filename or path} ({error.strerror})"
        ) from error


Found = list[tuple[str, Path]]  # name below the folder or pattern, and file


def _of_folder(path: str, folder: Path, suffix: str, report: Callable[[str], None]) -> Found:
    hidden: list[str] = []
    every, others = _walk(folder, hidden)
    if hidden:
        report(f"passed over, as their names begin with a dot: {_listed(hidden)}")
    if suffix:
        found = [(name, file) for name, file in every if name.endswith(suffix)]
    else:
        found = _with_text(every, others, report)
    if not found:
        wanted = f"{suffix} file" if suffix else "file of text" if every or others else "file"
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
    named = [(Path(name).relative_to(root).as_posix(), file) for name, file in files]
    found = _with_text(named, [], report)
    if not found:
        raise UserError(f"config.data.path={path} matches no file of text")
    return found


def _with_text(found: Found, others: Sequence[str], report: Callable[[str], None]) -> Found:
    """Returns the files that hold text; reports the rest of them and ``others``."""
    looks = {name: not_text(file) for name, file in found}
    rest = [*others, *(f"{name} ({what})" for name, what in looks.items() if what)]
    if rest:
        report(f"passed over, as they hold no text: {_listed(rest)}")
    return [(name, file) for name, file in found if not looks[name]]


def _listed(names: Sequence[str]) -> str:
    """Formats the first five names in order, and the number of the others."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(sorted(names)[:5]) + more


def not_text(file: Path) -> str:
    """Describes what a file holds instead of text; returns "" if it holds text.

    A file holds no text if it begins with one of `SIGNATURES`, or if more than the share
    `MOST_CONTROLS` of its first `HEAD_BYTES` (of 512, if it is shorter) are control characters that
    texts do not have: below 32 or 127, except tab, line ends, form feed, backspace and escape.
    """
    with unpacked(file) if file.name.lower().endswith(".gz") else file.open("rb") as stream:
        head = stream.read(HEAD_BYTES)
    for begins, what in SIGNATURES.items():
        if head.startswith(begins):
            return what
    controls = len(head) - len(head.translate(None, _CONTROLS))
    return "binary data" if controls > MOST_CONTROLS * max(len(head), 512) else ""


def fingerprint(files: Sequence[UserFile]) -> str:
    """Returns a SHA-256 of the names and contents of files."""
    lines = "".join(f"{file.sha256} {file.name}\n" for file in files)
    return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()


def contents(path: Path) -> Iterator[bytes]:
    """Yields the content of a file in pieces: its bytes, unpacked if `.gz`.

    Of a file of JSON lines (`.jsonl`, `.jsonl.gz`) it is the "text" or "content" of every line as
    UTF-8, each followed by SEPARATOR.

    Raises:
      UserError: the file is not what its name says.
    """
    name = path.name.lower()
    with unpacked(path) if name.endswith(".gz") else path.open("rb") as stream:
        if name.removesuffix(".gz").endswith(".jsonl"):
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield json_text(line, f"{path}, line {number}", JSON_FIELDS)[1] + SEPARATOR
        else:
            while chunk := stream.read(CHUNK_BYTES):
                yield chunk


def joined(files: Sequence[UserFile], *, separated: bool) -> Iterator[tuple[str, bytes]]:
    """Yields (name, piece) of the contents of files; ``separated`` ones each end in SEPARATOR."""
    for file in files:
        last = SEPARATOR
        for piece in contents(file.path):
            last = piece[-1:] or last
            yield file.name, piece
        if separated and last != SEPARATOR:
            yield file.name, SEPARATOR


@contextlib.contextmanager
def unpacked(path: Path) -> Iterator[gzip.GzipFile]:
    """Opens a gzip file.

    Raises:
      UserError: it is damaged.
    """
    try:
        with gzip.open(path, "rb") as stream:
            yield stream
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{path} is not a sound gzip file: {error}") from error


def json_text(line: bytes, place: str, names: Sequence[str]) -> tuple[dict[str, Any], bytes]:
    """Returns the object of a JSON line, and as UTF-8 the text under the first name it has.

    Raises:
      UserError: the line holds no such object.
    """
    try:
        fields = json.loads(line)
        text = next(fields[name] for name in names if name in fields)
        # A lone surrogate is legal in JSON and has no UTF-8; it is kept as three bytes.
        return fields, text.encode("utf-8", "surrogatepass")
    except _UNREADABLE as error:
        wanted = " or ".join(f'"{name}"' for name in names)
        raise UserError(f"{place}: expected a JSON object with a text field {wanted}") from error


def without_duplicates(files: Sequence[UserFile]) -> list[UserFile]:
    """Returns the files without those whose bytes equal those of an earlier one."""
    first: dict[str, UserFile] = {}
    for file in files:
        first.setdefault(file.sha256, file)
    return list(first.values())


def split_by_file(
    sizes: Sequence[int], digests: Sequence[str], floor: int
) -> dict[str, list[int]] | None:
    """Assigns whole files to the splits, about 90 / 5 / 5 by bytes.

    In the order of their digests each file goes to validation while that has less than 5 % and
    would stay below 7.5 %, else to test on the same terms, else to train.

    Args:
      sizes: number of bytes of each file.
      digests: a digest of each file, for an order that is as good as random.
      floor: least number of bytes of validation and test.

    Returns:
      The indices of the files of each split, ascending; None if the files are too few or too large.
    """
    total = sum(sizes)
    target, most = total / 20, 3 * total / 40
    held = {"validation": 0, "test": 0}
    chosen: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    for index in sorted(range(len(sizes)), key=lambda index: digests[index]):
        fitting = (s for s in held if held[s] < target and held[s] + sizes[index] <= most)
        split = next(fitting, "train")
        chosen[split].append(index)
        if split in held:
            held[split] += sizes[index]
    if min(held.values()) < max(floor, total / 40):
        return None
    return {split: sorted(files) for split, files in chosen.items()}


def between(
    pieces: Iterable[tuple[str, bytes]], start: int, stop: int
) -> Iterator[tuple[str, bytes]]:
    """Yields the parts of named pieces that are the bytes ``start`` to ``stop`` of all of them."""
    before = 0
    for name, piece in pieces:
        if part := piece[max(start - before, 0) : max(stop - before, 0)]:
            yield name, part
        before += len(piece)
        if before >= stop:
            return


def _walk(folder: Path, hidden: list[str]) -> tuple[Found, list[str]]:
    """Returns regular and other files below a folder; adds names with a dot to ``hidden``."""
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
            f"{where}: remove it, or replace it by the file itself"
        )
