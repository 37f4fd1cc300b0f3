"""Small files that programs write: whole or not at all."""

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


def check_json_output(output: Path) -> None:
    """Raises UserError unless ``--output`` names a .json whose folder can be made."""
    above = next(folder for folder in output.absolute().parents if folder.exists())
    if output.suffix != ".json" or not above.is_dir():
        raise UserError(f"--output={output} must be a .json in a folder")


def write_json(output: Path, content: Any, *, indent: int | None = None) -> None:
    """Writes what a program found, in a folder that need not exist yet."""
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, json.dumps(content, indent=indent) + "\n")
