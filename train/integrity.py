"""Detects damage in a folder by a list of its files' hashes inside it.

The list is written while the folder has its temporary name. So a folder with its final name has the
list, and every file had its full length when the list was written.
"""

import asyncio
import json
from pathlib import Path

from orbax.checkpoint.path import atomicity

from train.files import file_sha256

HASHES = "hashes.json"
STEP_METADATA = "_CHECKPOINT_METADATA"
_WRITTEN_LATER = frozenset({HASHES, STEP_METADATA, "commit_success.txt"})  # by Orbax, or not yet


def seal(folder: Path) -> None:
    """Writes the length and SHA-256 of every file below ``folder`` into its ``hashes.json``."""
    sealed = {
        file.relative_to(folder).as_posix(): {
            "bytes": file.stat().st_size,
            "sha256": file_sha256(file),
        }
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.relative_to(folder).as_posix() not in _WRITTEN_LATER
    }
    (folder / HASHES).write_text(json.dumps(sealed, indent=1) + "\n", encoding="utf-8")


def damage(folder: Path) -> str | None:
    """Describes the damage of a folder in a few words; None for an intact one.

    A folder without a list (from an older version) counts as intact.
    """
    try:
        json.loads((folder / STEP_METADATA).read_text(encoding="utf-8"))
        if not (folder / HASHES).exists():
            return None
        sealed = json.loads((folder / HASHES).read_text(encoding="utf-8"))
        for name, expected in sealed.items():
            file = folder / name
            if not file.is_file():
                return f"{name} is missing"
            size = file.stat().st_size
            if size != expected["bytes"]:
                return f"{name} holds {size} bytes, not {expected['bytes']}"
            if file_sha256(file) != expected["sha256"]:
                return f"{name} has other bytes than were saved"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:  # without a file name if it comes from reading an open file
        return f"{Path(error.filename or folder).name} cannot be read: {error.strerror}"
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"{HASHES} or {STEP_METADATA} is not what was saved"
    return None


class SealedPath(atomicity.AtomicRenameTemporaryPath):  # type: ignore[misc]
    """A folder that Orbax writes under a temporary name, with hashes, and renames."""

    async def finalize(self) -> None:
        """Writes the list of hashes and gives the folder its final name."""
        if self.get_final().name.isdecimal():  # a checkpoint, not one of the items in it
            await asyncio.to_thread(seal, Path(self.get()))
        await super().finalize()
