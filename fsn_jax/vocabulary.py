"""Vocabularies of bytes or Unicode characters.

A token is the rank of its byte or character among those that occur in the text.
"""

import codecs
import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Unit = Literal["bytes", "characters"]


class TextError(ValueError):
    """A text that the vocabulary cannot encode; one line that names what and where."""


SEPARATOR = b"\0"
"""Follows each document of a corpus of several."""

NOT_A_TOKEN = 255  # in the table of tokens, unless all 256 byte values are in the vocabulary
_READ_AT_ONCE = 1 << 22  # bytes: their code points take four times the room

Bytes = npt.NDArray[np.uint8]
Tokens = npt.NDArray[np.unsignedinteger[Any]]


@dataclasses.dataclass(frozen=True, eq=False)
class Vocabulary:
    """A vocabulary: the byte or character of each token.

    Attributes:
      values: ascending; uint8[V] byte values, or uint32[V] code points.
      unit: which of the two.
    """

    values: npt.NDArray[np.unsignedinteger[Any]]
    unit: Unit = "bytes"

    def __len__(self) -> int:
        return int(self.values.size)

    @property
    def table(self) -> Bytes:
        """uint8[256]: the token of each byte value (NOT_A_TOKEN for bytes outside)."""
        table = np.full(256, NOT_A_TOKEN, np.uint8)
        table[self.values] = np.arange(len(self), dtype=np.uint8)
        return table

    @property
    def separator(self) -> int | None:
        """The token of SEPARATOR; None if the text has none."""
        return 0 if len(self) and self.values[0] == SEPARATOR[0] else None

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger[Any]]:
        """The smallest unsigned type that holds every token."""
        return np.min_scalar_type(max(len(self) - 1, 0))

    def tokens(self, text: Bytes) -> Tokens:
        """Encodes a text of known values alone: uint8[n] or wider, see ``dtype``.

        Args:
          text: uint8, bytes or UTF-8.
        """
        if self.unit == "bytes":
            return self.table[text]
        pieces = (
            text[start : start + _READ_AT_ONCE].tobytes()
            for start in range(0, text.size, _READ_AT_ONCE)
        )
        ranks = [np.searchsorted(self.values, points) for points in code_points(pieces)]
        return np.concatenate([np.zeros(0, self.dtype), *(r.astype(self.dtype) for r in ranks)])

    def encode(self, text: bytes, *, source: str) -> npt.NDArray[np.int32]:
        """Encodes any text, int32[n].

        Args:
          text: bytes, or UTF-8.
          source: name of the text that the vocabulary was made from.

        Raises:
          TextError: the text holds what has no token, or is no UTF-8 where characters are needed.
        """
        try:
            data = self._values(text)
        except UnicodeDecodeError as error:
            raise TextError(
                f"the text is not UTF-8 at byte {error.start}, and the vocabulary of {source} is "
                f"of characters: correct it"
            ) from None
        unknown = np.flatnonzero(~np.isin(data, self.values))
        if unknown.size:
            first = int(unknown[0])
            value = int(data[first])
            name = f"byte 0x{value:02x}" if self.unit == "bytes" else f"{chr(value)!r}"
            raise TextError(
                f"the text holds {name} at position {first}, which does not "
                f"occur in {source}, so the model has no token for it: remove it"
            )
        return np.searchsorted(self.values, data).astype(np.int32)

    def decode(self, tokens: npt.ArrayLike) -> bytes:
        """Decodes tokens to bytes, or to UTF-8.

        Raises:
          ValueError: a number is no token.
        """
        ranks = np.asarray(tokens, dtype=np.int64)
        if ranks.size and (ranks.min() < 0 or ranks.max() >= len(self)):
            raise ValueError(f"tokens must be in [0, {len(self)})")
        found = self.values[ranks]
        if self.unit == "bytes":
            return found.tobytes()
        return found.astype("<u4").tobytes().decode("utf-32-le").encode()

    def num_bytes(self, tokens: npt.ArrayLike) -> int:
        """Returns the number of bytes that tokens stand for."""
        ranks = np.asarray(tokens)
        return int(ranks.size if self.unit == "bytes" else self._widths[ranks].sum(dtype=np.int64))

    def to_text(self) -> str:
        """Returns the values as text: bytes as hexadecimal digits, characters as they are."""
        return (
            self.decode(range(len(self))).decode()
            if self.unit == "characters"
            else (self.values.tobytes().hex())
        )

    @classmethod
    def from_text(cls, text: str, unit: Unit = "bytes") -> "Vocabulary":
        """Inverts ``to_text``.

        Raises:
          ValueError: the unit is unknown, or the text is not in it or not in ascending order.
        """
        values: npt.NDArray[np.unsignedinteger[Any]]
        if unit == "bytes":
            values = np.frombuffer(bytes.fromhex(text), np.uint8)
        elif unit == "characters":
            values = np.frombuffer(text.encode("utf-32-le"), "<u4").astype(np.uint32)
        else:
            raise ValueError(f"the unit must be bytes or characters; got {unit!r}")
        if values.size == 0 or (np.diff(values.astype(np.int64)) <= 0).any():
            raise ValueError(f"the {unit} are not in ascending order")
        return cls(values, unit)

    def _values(self, text: bytes) -> npt.NDArray[np.unsignedinteger[Any]]:
        if self.unit == "bytes":
            return np.frombuffer(text, np.uint8)
        return np.concatenate([np.zeros(0, np.uint32), *code_points([text])])

    @functools.cached_property
    def _widths(self) -> npt.NDArray[np.uint8]:
        """Bytes that each token takes in UTF-8."""
        return (1 + (self.values[:, None] >= (0x80, 0x800, 0x10000)).sum(axis=1)).astype(np.uint8)


def code_points(pieces: Iterable[bytes]) -> Iterator[npt.NDArray[np.uint32]]:
    """Yields the code points of UTF-8 text by pieces; a character may be in two pieces.

    Raises:
      UnicodeDecodeError: it is no UTF-8; `start` counts from the beginning of the text.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    before = 0
    for piece, final in _marked(pieces):
        waiting = len(decoder.getstate()[0])
        try:
            text = decoder.decode(piece, final)
        except UnicodeDecodeError as error:
            error.start += before - waiting
            raise
        before += len(piece)
        yield np.frombuffer(text.encode("utf-32-le"), "<u4").astype(np.uint32)


def _marked(pieces: Iterable[bytes]) -> Iterator[tuple[bytes, bool]]:
    """Yields each piece, then an empty one that is marked as the last."""
    for piece in pieces:
        yield piece, False
    yield b"", True
