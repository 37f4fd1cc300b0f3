"""enwik8: the first 10^8 bytes of an English Wikipedia dump of 2006, split 90 / 5 / 5 in order."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from train.data.builder import RECORD_BYTES, CorpusBuilder


class Enwik8(CorpusBuilder):
    """The bytes of `raw` in order: the first 90 % train, the next 5 % validation, the rest test.

    Attributes:
      raw: the unpacked file; its length may be another than enwik8's (tests use a short one).
    """

    DESCRIPTION = "The first 100,000,000 bytes of an English Wikipedia dump of 3 March 2006."
    HOMEPAGE = "https://mattmahoney.net/dc/textdata.html"

    def __init__(self, *, raw: Path, **kwargs: Any):
        self.raw = raw
        super().__init__(**kwargs)

    def records(self, split: str) -> Iterator[tuple[str, bytes]]:
        """Cut the split into records of at most RECORD_BYTES, named by offset."""
        start, stop = split_bounds(self.raw.stat().st_size)[split]
        with self.raw.open("rb") as stream:
            stream.seek(start)
            while start < stop:
                text = stream.read(min(RECORD_BYTES, stop - start))
                yield f"enwik8:{start}", text
                start += len(text)


def split_bounds(size: int) -> dict[str, tuple[int, int]]:
    """First and one-past-last byte of each split of a file of `size` bytes."""
    held_out = size // 20
    return {
        "train": (0, size - 2 * held_out),
        "validation": (size - 2 * held_out, size - held_out),
        "test": (size - held_out, size),
    }
