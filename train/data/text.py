"""text: the user's own file or folder."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from train.data.builder import RECORD_BYTES, CorpusBuilder
from train.data.user_files import SEPARATOR, Span, UserFile, contents


class Text(CorpusBuilder):
    """Spans of what some files hold.

    Attributes:
      files: the files; several are each followed by a separator, unless they end with one.
      spans: which bytes of which file each split takes, in order.
    """

    DESCRIPTION = "Text of the user's own."

    def __init__(
        self, *, files: Sequence[UserFile], spans: Mapping[str, Sequence[Span]], **kwargs: Any
    ):
        self.files = list(files)
        self.spans = {split: list(parts) for split, parts in spans.items()}
        super().__init__(**kwargs)

    def records(self, split: str) -> Iterator[tuple[str, bytes]]:
        """Cut each span into records of at most RECORD_BYTES, named by file and offset."""
        for span in self.spans[split]:
            file = self.files[span.file]
            before = 0
            for piece in separated(file, several=len(self.files) > 1):
                text = piece[max(span.start - before, 0) : max(span.stop - before, 0)]
                for offset in range(0, len(text), RECORD_BYTES):
                    yield file.name, text[offset : offset + RECORD_BYTES]
                before += len(piece)
                if before >= span.stop:
                    break


def separated(file: UserFile, *, several: bool) -> Iterator[bytes]:
    """Yield what a file holds; one of several that does not end with a separator is given one."""
    last = SEPARATOR
    for piece in contents(file.path):
        last = piece[-1:] or last
        yield piece
    if several and last != SEPARATOR:
        yield SEPARATOR


def between_characters(
    files: Sequence[UserFile], spans: Mapping[str, Sequence[Span]]
) -> dict[str, list[Span]]:
    """The same spans of UTF-8 files, with each cut moved back to where a character begins."""
    cuts = {(span.file, span.start) for parts in spans.values() for span in parts if span.start}
    moved = {
        (index, cut): _character_start(separated(files[index], several=len(files) > 1), cut)
        for index, cut in cuts
    }
    return {
        split: [
            dataclasses.replace(
                span,
                start=moved.get((span.file, span.start), span.start),
                stop=moved.get((span.file, span.stop), span.stop),
            )
            for span in parts
        ]
        for split, parts in spans.items()
    }


def _character_start(pieces: Iterator[bytes], offset: int) -> int:
    """Where the character begins that the byte at ``offset`` belongs to."""
    before, tail = 0, b""
    for piece in pieces:
        if before + len(piece) > offset:
            near = (tail + piece[: offset - before + 1])[-4:]  # no character is longer
            start = next(i for i in reversed(range(len(near))) if near[i] & 0xC0 != 0x80)
            return offset - (len(near) - 1 - start)
        before += len(piece)
        tail = (tail + piece)[-3:]
    raise ValueError(f"there is no byte {offset}")
