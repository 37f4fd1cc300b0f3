"""The strictly causal sum for NVIDIA GPUs, by Pallas and Triton.

One program has a block of queries (or, for the cotangents of keys and values, a block of keys) of
one head and walks through the other side in steps; the softmax is taken on the way, as in
FlashAttention (arXiv 2205.14135). Triton wants powers of two, so wide rows come in pieces: 208
columns are 128 + 64 + 16.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from fsn_jax.kernels.xla import MASKED

Ref = Any
"""A reference to a block of an array, inside of a kernel."""

Rows = Any
"""What ``pl.ds`` returns."""

Pieces = list[Array]
"""The columns of a block of rows, in pieces."""


class Tile(NamedTuple):
    """How a kernel is cut.

    Attributes:
      block: rows of a program.
      step: rows of the other side that it takes at a time.
      num_warps: warps of a program.
      num_stages: steps that are loaded ahead, and 1.
    """

    block: int
    step: int
    num_warps: int = 8
    num_stages: int = 2


TILES = {
    128: {2: Tile(64, 64), 4: Tile(64, 32)},
    256: {2: Tile(64, 16), 4: Tile(16, 16)},
    1 << 30: {2: Tile(32, 32), 4: Tile(16, 16, num_stages=1)},
}
"""By the greatest width of rows and the bytes of a number: the largest that keep to the registers
of an A100 and an H100."""

WIDE = 128
"""Most columns of a piece."""

PIECE = 16
"""Fewest columns of a piece: the least that Triton multiplies."""


def forward(
    query: Array, key: Array, value: Array, segments: Array | None = None, *, interpret: bool
) -> tuple[Array, ...]:
    """Computes the strict sum; see ``fsn_jax.kernels.forward``."""

    def kernel(at: _At, inputs: Sequence[Ref], outputs: Sequence[Ref]) -> None:
        query_ref, key_ref, value_ref, *_ = inputs
        total_ref, own_ref, log_ref = outputs
        query, own_key = _load(query_ref, at.own), _load(key_ref, at.own)
        own_score = _sum(jnp.sum(_f32(q) * _f32(k), axis=1) for q, k in _zip(query, own_key))

        def add(step: Array, row: _Row) -> _Row:
            rows = at.other(step)
            seen = at.before(step)
            scores = jnp.where(seen, _product(query, _load(key_ref, rows)), MASKED)
            largest = jnp.maximum(row.largest, jnp.max(scores, axis=1))
            weights = jnp.exp(scores - largest[:, None])
            fade = jnp.exp(row.largest - largest)
            total = [
                t * fade[:, None] + _dot(weights.astype(v.dtype), v, (1, 0))
                for t, v in _zip(row.total, _load(value_ref, rows))
            ]
            return _Row(largest, row.normalizer * fade + jnp.sum(weights, axis=1), total)

        zero = [jnp.zeros((at.tile.block, w), jnp.float32) for _, w in _pieces(value_ref.shape[2])]
        row = at.over_past(add, _Row(own_score, jnp.ones_like(own_score), zero))
        inverse = 1 / row.normalizer
        _store(total_ref, at.own, [t * inverse[:, None] for t in row.total])
        own_ref[0, at.own] = jnp.exp(own_score - row.largest) * inverse
        log_ref[0, at.own] = row.largest + jnp.log(row.normalizer)

    widths = [value.shape[3], None, None]
    return _call(kernel, "fsn_forward", [query, key, value], segments, widths, interpret)


def backward(
    query: Array,
    key: Array,
    value: Array,
    log_normalizer: Array,
    d_total: Array,
    mean: Array,
    d_own_score: Array,
    segments: Array | None = None,
    *,
    interpret: bool,
) -> tuple[Array, ...]:
    """Differentiates the strict sum; see ``fsn_jax.kernels.backward``."""

    def query_kernel(at: _At, inputs: Sequence[Ref], outputs: Sequence[Ref]) -> None:
        query_ref, key_ref, value_ref, log_ref, d_total_ref, mean_ref, d_own_ref, *_ = inputs
        query, d_total = _load(query_ref, at.own), _load(d_total_ref, at.own)
        log, mean, d_own = (ref[0, at.own][:, None] for ref in (log_ref, mean_ref, d_own_ref))

        def add(step: Array, d_query: Pieces) -> Pieces:
            rows = at.other(step)
            key, value = _load(key_ref, rows), _load(value_ref, rows)
            scores = jnp.where(at.before(step), _product(query, key), MASKED)
            d_scores = jnp.exp(scores - log) * (_product(d_total, value) - mean)
            return [d + _dot(d_scores.astype(k.dtype), k, (1, 0)) for d, k in _zip(d_query, key)]

        own = [d_own * _f32(k) for k in _load(key_ref, at.own)]
        _store(outputs[0], at.own, at.over_past(add, own))

    def key_kernel(at: _At, inputs: Sequence[Ref], outputs: Sequence[Ref]) -> None:
        query_ref, key_ref, value_ref, log_ref, d_total_ref, mean_ref, d_own_ref, *_ = inputs
        key, value = _load(key_ref, at.own), _load(value_ref, at.own)

        def add(step: Array, sums: tuple[Pieces, Pieces]) -> tuple[Pieces, Pieces]:
            rows = at.other(step)
            query, d_total = _load(query_ref, rows), _load(d_total_ref, rows)
            # Keys first: then no product has to turn its left matrix around.
            scores = jnp.where(at.after(step), _product(key, query), MASKED)
            weights = jnp.exp(scores - log_ref[0, rows][None, :])
            d_scores = weights * (_product(value, d_total) - mean_ref[0, rows][None, :])
            return (
                [d + _dot(d_scores.astype(q.dtype), q, (1, 0)) for d, q in _zip(sums[0], query)],
                [d + _dot(weights.astype(t.dtype), t, (1, 0)) for d, t in _zip(sums[1], d_total)],
            )

        own = [d_own_ref[0, at.own][:, None] * _f32(q) for q in _load(query_ref, at.own)]
        zero = [jnp.zeros(x.shape, jnp.float32) for x in value]
        for ref, pieces in zip(outputs, at.over_future(add, (own, zero)), strict=True):
            _store(ref, at.own, pieces)

    arrays = [query, key, value, log_normalizer, d_total, mean, d_own_score]
    call = functools.partial(_call, inputs=arrays, segments=segments, interpret=interpret)
    of_query = call(query_kernel, "fsn_backward_query", widths=[query.shape[3]])
    widths = [key.shape[3], value.shape[3]]
    return *of_query, *call(key_kernel, "fsn_backward_key", widths=widths)


class _Row(NamedTuple):
    """A block of queries part of the way through its keys; float32.

    Attributes:
      largest: largest score so far, ``[block]``.
      normalizer: sum of ``exp(score - largest)``, ``[block]``.
      total: sum of ``exp(score - largest) * value``, in pieces ``[block, size]``.
    """

    largest: Array
    normalizer: Array
    total: Pieces


class _At(NamedTuple):
    """Where a program is in its sequence.

    Attributes:
      here: index of its block.
      length: rows of the sequence.
      tile: how it is cut.
      segments: reference to the segments ``[1, L]``, or None.
    """

    here: Array
    length: int
    tile: Tile
    segments: Ref | None

    @property
    def own(self) -> Rows:
        """The rows of the program."""
        return pl.ds(self.here * self.tile.block, self.tile.block)

    def other(self, step: Array) -> Rows:
        """The rows of a step."""
        return pl.ds(step * self.tile.step, self.tile.step)

    def over_past(self, add: Callable[[Array, Any], Any], start: Any) -> Any:
        """Sums over the steps that are not after the program's rows."""
        steps = (self.here + 1) * (self.tile.block // self.tile.step)
        return jax.lax.fori_loop(0, steps, add, start)

    def over_future(self, add: Callable[[Array, Any], Any], start: Any) -> Any:
        """Sums over the steps that are not before the program's rows."""
        first = self.here * (self.tile.block // self.tile.step)
        return jax.lax.fori_loop(first, self.length // self.tile.step, add, start)

    def before(self, step: Array) -> Array:
        """Which rows of a step each own row sees, ``[block, step]``."""
        return self._pairs(step, lambda own, other: other < own)

    def after(self, step: Array) -> Array:
        """Which rows of a step see each own row, ``[block, step]``."""
        return self._pairs(step, lambda own, other: own < other)

    def _pairs(self, step: Array, causal: Callable[[Array, Array], Array]) -> Array:
        shape = self.tile.block, self.tile.step
        own, other = (
            first * size + jax.lax.broadcasted_iota(jnp.int32, shape, axis)
            for axis, (first, size) in enumerate(zip((self.here, step), shape, strict=True))
        )
        seen = causal(own, other)
        if self.segments is None:
            return seen
        own, other = self.segments[0, self.own], self.segments[0, self.other(step)]
        return seen & (own[:, None] == other[None, :])


def _zip(*pieces: Pieces) -> Any:
    return zip(*pieces, strict=True)


def _f32(x: Array) -> Array:
    return x.astype(jnp.float32)


def _sum(arrays: Any) -> Array:
    return functools.reduce(jnp.add, arrays)


def _dot(x: Array, y: Array, contract: tuple[int, int]) -> Array:
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32)


def _product(x: Pieces, y: Pieces) -> Array:
    """Returns ``x[i] . y[j]`` of all rows, ``[rows of x, rows of y]``."""
    return _sum(_dot(a, b, (1, 1)) for a, b in _zip(x, y))


def _pieces(width: int) -> list[tuple[int, int]]:
    """Cuts columns into powers of two: first columns and sizes.

    Up to a sixth is padded rather than cut: each piece is one more product.
    """
    pieces, start = [], 0
    while start < width:
        rest = width - start
        size = max(PIECE, 1 << (rest - 1).bit_length())
        if size > WIDE or (size > PIECE and 6 * (size - rest) > rest):
            size //= 2
        pieces.append((start, size))
        start += size
    return pieces


def padded_width(width: int) -> int:
    """Returns the columns that a kernel takes for a width."""
    start, size = _pieces(max(width, 1))[-1]
    return start + size


def _load(ref: Ref, rows: Rows) -> Pieces:
    return [ref[0, rows, pl.ds(start, size)] for start, size in _pieces(ref.shape[2])]


def _store(ref: Ref, rows: Rows, pieces: Pieces) -> None:
    for (start, size), piece in zip(_pieces(ref.shape[2]), pieces, strict=True):
        ref[0, rows, pl.ds(start, size)] = piece.astype(ref.dtype)


def tile_for(dtype: Any, width: int) -> Tile:
    """Returns how a kernel is cut for rows of a dtype and a greatest width."""
    return TILES[next(most for most in TILES if width <= most)][jnp.dtype(dtype).itemsize]


def _call(
    kernel: Callable[[_At, Sequence[Ref], Sequence[Ref]], None],
    name: str,
    inputs: list[Array],
    segments: Array | None,
    widths: Sequence[int | None],
    interpret: bool,
) -> tuple[Array, ...]:
    """Runs a kernel on the blocks of all heads of all sequences.

    Inputs are ``[B, H, L, W]`` or ``[B, H, L]``; so are outputs, of which the widths are given.
    They have the dtype of the values, or float32 without a width.
    """
    batch, heads, length = inputs[0].shape[:3]
    tile = tile_for(inputs[2].dtype, max(x.shape[3] for x in inputs[:3]))
    padded = length + -length % tile.block

    def packed(x: Array) -> Array:
        # Padded keys come after every real query, padded queries and columns are cut off, and
        # zeros add nothing to an inner product.
        x = x.reshape(batch * heads, length, *x.shape[3:])
        columns = [(0, padded_width(w) - w) for w in x.shape[2:]]
        return jnp.pad(x, [(0, 0), (0, padded - length), *columns])

    def spec(shape: Sequence[int]) -> pl.BlockSpec:
        return pl.BlockSpec((1, *shape[1:]), lambda s, i: (s, *(0,) * (len(shape) - 1)))

    arrays = [packed(x) for x in inputs]
    in_specs = [spec(x.shape) for x in arrays]
    if segments is not None:
        arrays.append(jnp.pad(segments[:, 0], ((0, 0), (0, padded - length))))
        in_specs.append(pl.BlockSpec((1, padded), lambda s, i: (s // heads, 0)))

    def body(*refs: Ref) -> None:
        of_segments = refs[len(inputs)] if segments is not None else None
        at = _At(pl.program_id(1), padded, tile, of_segments)
        kernel(at, refs[: len(arrays)], refs[len(arrays) :])

    shapes = [
        jax.ShapeDtypeStruct((batch * heads, padded), jnp.float32)
        if width is None
        else jax.ShapeDtypeStruct((batch * heads, padded, padded_width(width)), inputs[2].dtype)
        for width in widths
    ]
    results = pl.pallas_call(
        body,
        out_shape=shapes,
        grid=(batch * heads, padded // tile.block),
        in_specs=in_specs,
        out_specs=[spec(shape.shape) for shape in shapes],
        compiler_params=triton.CompilerParams(num_warps=tile.num_warps, num_stages=tile.num_stages),
        interpret=interpret,
        name=name,
    )(*arrays)
    return tuple(
        x[:, :length].reshape(batch, heads, length, *x.shape[2:])[..., slice(width)]
        if width is not None
        else x[:, :length].reshape(batch, heads, length)
        for x, width in zip(results, widths, strict=True)
    )
