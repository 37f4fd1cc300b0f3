"""Writes small files completely or not at all."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from train.errors import UserError


def write_atomically(path: Path, text: str) -> None:
    """Writes a small file atomically: a crash leaves the old file or the new one."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text)
    os.replace(beside, path)


BESIDE_JSON = (".txt", ".png")
"""Suffixes of the files that stand beside a JSON result under the same name."""


def check_json_output(output: Path) -> None:
    """Creates the folder of ``--output`` before the work starts.

    Raises:
      UserError: the path does not end in .json, a folder has the name of a file to be written, or
        the path's folder cannot be created or written.
    """
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


def write_json(output: Path, content: Any, *, indent: int | None = None) -> None:
    """Writes the result of a program; see ``check_json_output``."""
    write_atomically(output, json.dumps(content, indent=indent) + "\n")


def file_sha256(path: Path) -> str:
    """Computes the hexadecimal SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
