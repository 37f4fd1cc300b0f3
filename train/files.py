"""Writes small files completely or not at all."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from train.errors import UserError


def user_path(setting: str, text: str | Path) -> Path:
    """Returns a path that the user wrote, with ``~`` expanded, whether or not it exists.

    Args:
      setting: what named it, for the messages.
      text: the path.

    Raises:
      UserError: it cannot be a path, may not be looked at, or the home folder is not known.
    """
    shown = str(text) if len(str(text)) <= 80 else f"{str(text)[:80]}..."
    try:
        path = Path(text).expanduser()
    except RuntimeError:
        raise UserError(
            f"{setting}={shown}: the home folder of {shown.split('/')[0]} is not known; write the "
            f"path out, or set HOME"
        ) from None
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{setting}={shown} cannot be reached ({reason}); name another") from None
    return path


def write_atomically(path: Path, text: str) -> None:
    """Writes a small file atomically: a crash leaves the old file or the new one."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text)
    os.replace(beside, path)


BESIDE_JSON = (".txt", ".png")
"""Suffixes of the files that stand beside a JSON result under the same name."""


def check_json_output(output: Path) -> Path:
    """Creates the folder of ``--output`` before the work starts.

    Returns:
      The path, with ``~`` for the home folder.

    Raises:
      UserError: the path does not end in .json, a folder has the name of a file to be written, or
        the path's folder cannot be created or written.
    """
    output = user_path("--output", output)
    if output.suffix != ".json" or output.is_dir():
        raise UserError(f"--output={output} must be a .json in a folder")
    for other in map(output.with_suffix, BESIDE_JSON):
        if other.is_dir():
            raise UserError(f"--output={output}: {other} beside it is a folder; name another")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--output={output}: the folder {output.parent} cannot be made ({error.strerror}); "
            f"name another"
        ) from None
    if not os.access(output.parent, os.W_OK):
        raise UserError(f"--output={output}: the folder {output.parent} cannot be written")
    return output


def default_output(runs: Sequence[str], name: str) -> Path:
    """Returns where a result goes without ``--output``.

    A result of one run goes into its folder, of several runs beside them, and of records or runs in
    a bucket to ``runs/``, which git ignores.
    """
    folders = [Path(run).expanduser() for run in runs]
    if not all((folder / "checkpoints").is_dir() for folder in folders):
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
    """
    table, picture = map(output.with_suffix, BESIDE_JSON)
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
