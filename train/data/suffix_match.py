"""Suffix matching inside a window: how long the repeated context is, and whether it continues.

At position t of a window the *depth* is the length of the longest suffix of ``x[..t]`` that also
ends at an earlier position u < t (the two may overlap). The *source* is the most recent such u, its
*distance* t - u, and the prediction of ``x[t + 1]`` is a *copy event* if ``x[t + 1] == x[u + 1]``.
Where ``x[t]`` is new to the window the depth is 0: there is no source, and nothing to copy.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

LONGEST = 2**15 - 1
"""Largest number of predictions in a window."""
CHUNK = 64  # windows worked on together: their rows of 512 stay in the second-level cache


class SuffixMatch(NamedTuple):
    """The longest repeated suffix before each prediction of each window, arrays ``[W, L]``.

    Attributes:
      depth: int32, length of the suffix in characters.
      distance: int32, t - u to the source; 0 where the depth is 0.
      is_copy: bool, whether the next character is the one that followed the source.
    """

    depth: npt.NDArray[np.int32]
    distance: npt.NDArray[np.int32]
    is_copy: npt.NDArray[np.bool_]


def match_suffixes(
    windows: npt.NDArray[np.unsignedinteger[Any]], *, separator: int | None = None
) -> SuffixMatch:
    """Finds the longest repeated suffix of every prefix of every window.

    Args:
      windows: unsigned[W, L + 1], inputs and the last target; L at most LONGEST.
      separator: if given, windows are cut before each of these tokens, and repetitions count
        within a part alone.

    Raises:
      ValueError: a window has fewer than two characters, or more than LONGEST + 1.
    """
    count, length = windows.shape[0], windows.shape[1] - 1
    if not 1 <= length <= LONGEST:
        raise ValueError(f"windows must have 2 to {LONGEST + 1} characters; got {length + 1}")
    if separator is not None:  # the same characters in two parts are two characters
        part_number = np.cumsum(windows == separator, axis=1, dtype=np.uint64)
        windows = windows.astype(np.uint64) | part_number << np.uint64(32)
    depth = np.zeros((count, length), np.int32)
    source = np.zeros((count, length), np.int32)
    for first in range(0, count, CHUNK):
        part = slice(first, first + CHUNK)
        _match_chunk(windows[part, :length], depth[part], source[part])
    position = np.arange(length, dtype=np.int32)
    after_source = np.take_along_axis(windows, source + 1, axis=1)
    matched = depth > 0
    return SuffixMatch(
        depth=depth,
        distance=np.where(matched, position - source, 0),
        is_copy=matched & (after_source == windows[:, 1:]),
    )


def _match_chunk(
    x: npt.NDArray[np.unsignedinteger[Any]],
    depth: npt.NDArray[np.int32],
    source: npt.NDArray[np.int32],
) -> None:
    """Fills depth and source, ``[W, L]`` each, of some windows.

    ``common[u + 1]`` is the length of the longest common suffix of ``x[..t]`` and ``x[..u]``, which
    is one more than that of ``x[..t - 1]`` and ``x[..u - 1]`` where the characters agree, else 0.
    """
    count, length = x.shape
    common = np.zeros((count, length + 1), np.int32)
    place = np.arange(length, dtype=np.int32)
    for t in range(1, length):
        # The right side is finished before the left is written: common[:, u] is still row t - 1.
        common[:, 1 : t + 1] = np.where(x[:, :t] == x[:, t : t + 1], common[:, :t] + 1, 0)
        # The longest, and of equals the most recent, is the largest of length * L + u.
        best = (common[:, 1 : t + 1] * length + place[:t]).max(axis=1)
        depth[:, t] = best // length
        source[:, t] = best % length
