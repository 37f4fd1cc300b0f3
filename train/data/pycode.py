"""pycode: the Python source of five pinned packages, split by file."""

import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from train.data.builder import CorpusBuilder
from train.data.fetch import SourceFailure, archive_errors
from train.data.python_files import SEPARATOR, select, split_of

MAX_FILE_BYTES = 16 << 20  # a single source file; the longest in the pinned wheels is under 1 MiB


class Pycode(CorpusBuilder):
    """The `.py` files of some wheels by the rules of `python_files`, in the order of their SHA-256.

    That order is as good as random: the beginning of a split holds something of every package.

    Attributes:
      wheels: paths of the wheels, checked before; the order matters for the names of duplicates.
    """

    DESCRIPTION = "Python source of sympy, ansible-core, twisted, django and networkx, no tests."

    def __init__(self, *, wheels: Sequence[Path], **kwargs: Any):
        self.wheels = [Path(wheel) for wheel in wheels]
        super().__init__(**kwargs)

    def records(self, split: str) -> Iterator[tuple[str, bytes]]:
        """One record a file: its text and the separator."""
        chosen = [
            (digest, path, content)
            for path, content, digest in select(wheel_sources(self.wheels))
            if split_of(digest) == split
        ]
        for _, path, content in sorted(chosen):
            yield path, content + SEPARATOR


def wheel_sources(wheels: Sequence[Path]) -> Iterator[tuple[str, bytes]]:
    """Yield (path in the wheel, content) of every `.py` file, wheel by wheel, paths sorted.

    Raises:
      SourceFailure: a file expands beyond MAX_FILE_BYTES, or a wheel is damaged.
    """
    for wheel in wheels:
        with archive_errors(), zipfile.ZipFile(wheel) as pack:
            for path in sorted(set(pack.namelist())):
                if not path.endswith(".py"):
                    continue
                with pack.open(path) as stream:
                    content = stream.read(MAX_FILE_BYTES + 1)
                if len(content) > MAX_FILE_BYTES:
                    raise SourceFailure(f"{path} in {wheel.name} is longer than any source file")
                yield path, content
