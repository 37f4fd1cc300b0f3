"""Small files that programs write: whole or not at all."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from train.errors import UserError


def write_atomically(path: Path, text: str) -> None:
    """Writes a small file so that a crash leaves the old one or the new one."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text)
    os.replace(beside, path)


BESIDE_JSON = (".txt", ".png")
"""A table or a figure of the same result, by the same name."""


def check_json_output(output: Path) -> None:
    """Makes the folder of ``--output``, before the work whose result goes there.

    Raises:
      UserError: it names no .json, a folder has the name of what goes beside it, or its own folder
        cannot be made or written.
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
    """Writes what a program found; see ``check_json_output``."""
    write_atomically(output, json.dumps(content, indent=indent) + "\n")


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
