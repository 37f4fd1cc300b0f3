"""Files and folders that the user names, outputs, and writing that is complete or not done."""

import contextlib
import glob
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from train.bucket import is_remote
from train.errors import UserError
from train.run_files import CHECKPOINTS


def user_path(setting: str, text: str | Path) -> Path:
    """Returns a path that the user wrote, with ``~`` expanded, whether or not it exists.

    Args:
      setting: what named it, for the messages.
      text: the path.

    Raises:
      UserError: it is in a bucket, it cannot be a path, it may not be looked at or into, or the
        home folder is not known.
    """
    shown = str(text) if len(str(text)) <= 80 else f"{str(text)[:80]}..."
    if is_remote(text):
        raise UserError(f"{setting}={shown} is not on this machine; name a path that is")
    try:
        path = Path(text).expanduser()
    except RuntimeError:
        raise UserError(
            f"{setting}={shown}: the home folder of {shown.split('/')[0]} is not known; write the "
            f"path out, or set HOME"
        ) from None
    try:
        os.stat(os.path.join(path, "."))  # of a folder, what is in it
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{setting}={shown} cannot be reached ({reason}); name another") from None
    return path


def has_pattern(path: str | Path) -> bool:
    """Whether ``glob`` would take a path for a pattern."""
    return glob.escape(os.fspath(path)) != os.fspath(path)


def write_atomically(path: Path, text: str) -> None:
    """Writes a small file atomically: a crash leaves the old file or the new one.

    So does a loss of power, which could leave an empty file were the text not on disk first.
    """
    beside = path.with_name(path.name + ".tmp")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Gives a folder to write to that becomes ``folder`` once it is whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".new-") as beside:
        made = Path(beside) / folder.name
        made.mkdir()
        yield made
        made.rename(folder)


@contextlib.contextmanager
def writing(setting: str, path: Path) -> Iterator[None]:
    """Makes one line of what keeps the files from being written; ``setting`` named their path."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{setting}={path} cannot be written ({reason}); name another") from None


def check_output(output: str | Path, suffix: str, *, beside: Sequence[str] = ()) -> Path:
    """Creates the folder of ``--output`` before the work starts, and tries to write to it.

    Args:
      output: the file that the user named.
      suffix: what its name has to end in.
      beside: what takes the suffix's place in the names of other files to be written.

    Returns:
      The path, with ``~`` for the home folder.

    Raises:
      UserError: the path does not end in the suffix, it or a file beside it is a folder, or its
        folder cannot be created or written.
    """
    output = user_path("--output", output)
    if output.suffix != suffix or output.is_dir():
        raise UserError(f"--output={output} must be a file whose name ends in {suffix}")
    for other in (output.with_name(output.stem + end) for end in beside):
        if other.is_dir():
            raise UserError(f"--output={output}: {other} beside it is a folder; name another")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--output={output}: the folder {output.parent} cannot be made ({error.strerror}); "
            f"name another"
        ) from None
    with writing("--output", output), tempfile.TemporaryFile(dir=output.parent):
        pass
    return output


BESIDE_JSON = (".txt", ".png")
"""Suffixes of the files that stand beside a JSON result under the same name."""


def check_json_output(output: str | Path) -> Path:
    """Checks ``--output`` of a result that ``write_result`` writes, see ``check_output``."""
    return check_output(output, ".json", beside=BESIDE_JSON)


def default_output(runs: Sequence[str], name: str) -> Path:
    """Returns where a result goes without ``--output``.

    A result of one run goes into its folder, of several runs beside them, and of records or runs in
    a bucket to ``runs/``, which git ignores.
    """
    if any(map(is_remote, runs)):
        return Path("runs") / name
    folders = [user_path("the run", run) for run in runs]
    if not all((folder / CHECKPOINTS).is_dir() for folder in folders):
        return Path("runs") / name
    return (folders[0] if len(folders) == 1 else folders[0].absolute().parent) / name


def write_result(
    output: Path, content: Any, text: str, draw: Callable[[Path], None], *, indent: int | None = 1
) -> None:
    """Writes JSON, and beside it the text and a figure; prints the text and the paths.

    Args:
      output: see ``check_json_output``.
      content: of the JSON file.
      text: the same as a table.
      draw: draws the figure to a path.
      indent: of the JSON file; None for one line.

    Raises:
      UserError: a file cannot be written.
    """
    table, picture = map(output.with_suffix, BESIDE_JSON)
    with writing("--output", output):
        write_atomically(output, json.dumps(content, indent=indent) + "\n")
        write_atomically(table, text + "\n")
        draw(picture)
    print(text, "", output, table, picture, sep="\n")


def saved_steps(folder: Any) -> list[int]:
    """Returns the steps of the checkpoints in a folder, here or in a bucket, ascending."""
    names = [entry.name for entry in folder.iterdir()] if folder.exists() else []
    return sorted(int(name) for name in names if name.isdecimal())


def file_sha256(path: Path) -> str:
    """Computes the hexadecimal SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
