"""The files that a user's path names, what they hold, and how they are split."""

import contextlib
import dataclasses
import glob
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from train.errors import UserError
from train.files import file_sha256

SEPARATOR = b"\0"  # after each document of a JSON-lines file, and after each of several files
JSON_FIELDS = ("text", "content")
_UNREADABLE = (
    ValueError, LookupError, TypeError, AttributeError, RecursionError, StopIteration
)  # fmt: skip
GLOB_CHARACTERS = "*?["
CHUNK_BYTES = 1 << 20


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
    """The files without those that repeat the bytes of an earlier one."""
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
