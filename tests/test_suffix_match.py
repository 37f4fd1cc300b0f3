"""Depth, source and copy event of every prediction, against their definition."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from train.data.suffix_match import CHUNK, match_suffixes


def by_definition(window):
    """(depth, distance, is_copy) of each prediction of one window, as the definition has it."""
    rows = []
    for t in range(len(window) - 1):
        depth, source = 0, None
        for u in reversed(range(t)):  # the most recent first, so that only a longer one replaces it
            length = 0
            while length <= u and window[t - length] == window[u - length]:
                length += 1
            if length > depth:
                depth, source = length, u
        if source is None:
            rows.append((0, 0, False))
        else:
            rows.append((depth, t - source, window[source + 1] == window[t + 1]))
    return tuple(np.array(column) for column in zip(*rows, strict=True))


@st.composite
def windows(draw):
    shape = draw(st.integers(1, 3)), draw(st.integers(2, 40))
    letters = draw(st.integers(1, 4))
    return draw(arrays(np.uint8, shape, elements=st.integers(0, letters - 1)))


@given(windows())
def test_is_its_definition(some):
    match = match_suffixes(some)
    for row, window in enumerate(some):
        for actual, expected in zip(match, by_definition(window), strict=True):
            np.testing.assert_array_equal(actual[row], expected)


def test_an_example_by_hand():
    (window,) = np.frombuffer(b"abcab.ab", np.uint8)[None]
    match = match_suffixes(window[None])
    assert match.depth.tolist() == [[0, 0, 0, 1, 2, 0, 1]]
    assert match.distance.tolist() == [[0, 0, 0, 3, 3, 0, 3]]
    # After the second "a" comes "b" as before; after "ab" a "." and not "c"; then "ab" again.
    assert match.is_copy.tolist() == [[False, False, False, True, False, False, True]]


def test_a_run_overlaps_itself():
    match = match_suffixes(np.zeros((1, 6), np.uint8))
    assert match.depth.tolist() == [[0, 1, 2, 3, 4]]
    assert match.distance.tolist() == [[0, 1, 1, 1, 1]]


def test_windows_do_not_see_each_other():
    some = np.random.default_rng(0).integers(3, size=(CHUNK + 3, 20)).astype(np.uint8)
    together = match_suffixes(some)
    alone = [match_suffixes(window[None]) for window in some]
    for name in together._fields:
        apart = np.concatenate([getattr(match, name) for match in alone])
        np.testing.assert_array_equal(getattr(together, name), apart)


@given(windows())
def test_parts_of_a_window_do_not_see_each_other(some):
    """Each as if it were alone, with the first token of the next as the last target."""
    match = match_suffixes(some, separator=0)
    for row, window in enumerate(some):
        starts = [0, *np.flatnonzero(window[:-1] == 0).tolist(), len(window) - 1]
        for start, stop in zip(starts, starts[1:], strict=False):
            if start == stop:
                continue
            depth, distance, is_copy = by_definition(window[start : stop + 1])
            # The end of a part comes once in it: it is no copy of what is there.
            is_copy[-1] &= window[stop] != 0
            np.testing.assert_array_equal(match.depth[row, start:stop], depth)
            np.testing.assert_array_equal(match.distance[row, start:stop], distance)
            np.testing.assert_array_equal(match.is_copy[row, start:stop], is_copy)


@pytest.mark.parametrize("length", [1, 2**15 + 1])
def test_refuses_windows_it_cannot_number(length):
    with pytest.raises(ValueError, match="must have 2 to"):
        match_suffixes(np.zeros((1, length), np.uint8))


def test_tokens_wider_than_a_byte_differ():
    """A vocabulary of characters may hold more than 256."""
    narrow = np.random.default_rng(0).integers(3, size=(4, 30)).astype(np.uint8)
    wide = narrow.astype(np.uint16) * 256
    for one, other in zip(match_suffixes(narrow), match_suffixes(wide), strict=True):
        np.testing.assert_array_equal(one, other)
