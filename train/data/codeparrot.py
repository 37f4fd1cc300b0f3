"""codeparrot: local shards of the codeparrot-clean collection of Python files, split by file."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from train.data.builder import CorpusBuilder
from train.data.python_files import SEPARATOR, select, split_of
from train.data.user_files import unpacked
from train.errors import UserError


class Codeparrot(CorpusBuilder):
    """The "content" of every line of the shards, by the rules of `python_files`, in their order.

    Attributes:
      shards: gzipped files of JSON lines, each an object with "content" and, optionally, "path".
    """

    DESCRIPTION = "Python files from the user's shards of codeparrot-clean."
    HOMEPAGE = "https://huggingface.co/datasets/codeparrot/codeparrot-clean"

    def __init__(self, *, shards: Sequence[Path], **kwargs: Any):
        self.shards = [Path(shard) for shard in shards]
        super().__init__(**kwargs)

    def records(self, split: str) -> Iterator[tuple[str, bytes]]:
        """One record a file: its text and the separator."""
        for path, content, digest in select(shard_sources(self.shards)):
            if split_of(digest) == split:
                yield path, content + SEPARATOR


def shard_sources(shards: Sequence[Path]) -> Iterator[tuple[str, bytes]]:
    """Yield (path, content) of every line, shard by shard.

    Raises:
      UserError: a shard is no gzip file, or a line of it no object with a text "content".
    """
    for shard in shards:
        with unpacked(shard) as lines:
            for number, line in enumerate(lines, start=1):
                yield _source(line, f"{shard}, line {number}")


def _source(line: bytes, place: str) -> tuple[str, bytes]:
    try:
        fields = json.loads(line)
        content, path = fields["content"], fields.get("path") or ""
        # A lone surrogate is legal in JSON and has no UTF-8; it is kept as three bytes.
        return str(path), content.encode("utf-8", "surrogatepass")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f'{place}: expected a JSON object with a text field "content", as in codeparrot-clean'
        ) from error
