"""The strictly causal sum for NVIDIA GPUs, by Pallas and Triton.

One program has a block of queries (or, for the cotangents of keys and values, a block of keys) of
one head and walks through the blocks on its side of the diagonal; the softmax is taken on the way,
as in FlashAttention (arXiv 2205.14135). Triton wants powers of two, so features come in pieces: 112
are 64 + 32 + 16.
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

BLOCK = 64
"""Queries, and keys, of a tile; half as many if values are wider than WIDE."""

WIDE = 128

PIECE = 16
"""Widths are padded to a multiple of this, the least that Triton multiplies."""

Pieces = list[Array]
"""The columns of a block of rows, in pieces."""


def forward(
    query: Array, key: Array, value: Array, segments: Array | None = None, *, interpret: bool
) -> tuple[Array, ...]:
    """Computes the strict sum; see ``fsn_jax.kernels.forward``."""
    block = block_size(value.shape[3])

    def kernel(tiles: _Tiles, inputs: Sequence[Ref], outputs: Sequence[Ref]) -> None:
        query_ref, key_ref, value_ref, *_ = inputs
        total_ref, own_ref, log_ref = outputs
        here = tiles.rows(tiles.here)
        query, own_key = _load(query_ref, here), _load(key_ref, here)
        own_score = sum(jnp.sum(_f32(q) * _f32(k), axis=1) for q, k in _zip(query, own_key))

        def add(step: Array | int, row: _Row, *, diagonal: bool = False) -> _Row:
            rows = tiles.rows(step)
            scores = tiles.scores(query, _load(key_ref, rows), tiles.here, step, diagonal)
            largest = jnp.maximum(row.largest, jnp.max(scores, axis=1))
            weights = jnp.exp(scores - largest[:, None])
            fade = jnp.exp(row.largest - largest)
            value = _load(value_ref, rows)
            total = [
                t * fade[:, None] + _dot(weights.astype(v.dtype), v, (1, 0))
                for t, v in _zip(row.total, value)
            ]
            return _Row(largest, row.normalizer * fade + jnp.sum(weights, axis=1), total)

        zero = [jnp.zeros((block, size), jnp.float32) for _, size in _pieces(value_ref.shape[2])]
        row = _Row(own_score, jnp.ones_like(own_score), zero)
        row = jax.lax.fori_loop(0, tiles.here, add, row)
        row = add(tiles.here, row, diagonal=True)
        inverse = 1 / row.normalizer
        _store(total_ref, here, [t * inverse[:, None] for t in row.total])
        own_ref[0, here] = jnp.exp(own_score - row.largest) * inverse
        log_ref[0, here] = row.largest + jnp.log(row.normalizer)

    widths = [value.shape[3], None, None]
    arrays = [query, key, value]
    return _call(kernel, "fsn_forward", arrays, segments, widths, block, interpret)


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
    block = block_size(value.shape[3])

    def weights_and_cotangent(
        tiles: _Tiles,
        of_query: Sequence[Pieces | Array],
        of_key: Sequence[Pieces],
        *at: Array | bool,
    ) -> tuple[Array, Array]:
        (query, log, d_total, mean), (key, value) = of_query, of_key
        weights = jnp.exp(tiles.scores(query, key, *at) - log[:, None])
        d_weights = sum(_dot(d, v, (1, 1)) for d, v in _zip(d_total, value))
        return weights, weights * (d_weights - mean[:, None])

    def query_kernel(tiles: _Tiles, inputs: Sequence[Ref], outputs: Sequence[Ref]) -> None:
        query_ref, key_ref, value_ref, log_ref, d_total_ref, mean_ref, d_own_ref, *_ = inputs
        here = tiles.rows(tiles.here)
        of_query = (
            _load(query_ref, here),
            log_ref[0, here],
            _load(d_total_ref, here),
            mean_ref[0, here],
        )

        def add(step: Array | int, d_query: Pieces, *, diagonal: bool = False) -> Pieces:
            rows = tiles.rows(step)
            key = _load(key_ref, rows)
            of_key = key, _load(value_ref, rows)
            _, d_scores = weights_and_cotangent(tiles, of_query, of_key, tiles.here, step, diagonal)
            return [d + _dot(d_scores.astype(k.dtype), k, (1, 0)) for d, k in _zip(d_query, key)]

        own = d_own_ref[0, here][:, None]
        start = [own * _f32(k) for k in _load(key_ref, here)]
        past = jax.lax.fori_loop(0, tiles.here, add, start)
        _store(outputs[0], here, add(tiles.here, past, diagonal=True))

    def key_kernel(tiles: _Tiles, inputs: Sequence[Ref], outputs: Sequence[Ref]) -> None:
        query_ref, key_ref, value_ref, log_ref, d_total_ref, mean_ref, d_own_ref, *_ = inputs
        here = tiles.rows(tiles.here)
        of_key = _load(key_ref, here), _load(value_ref, here)

        def add(
            step: Array | int, sums: tuple[Pieces, Pieces], *, diagonal: bool = False
        ) -> tuple[Pieces, Pieces]:
            rows = tiles.rows(step)
            query, d_total = _load(query_ref, rows), _load(d_total_ref, rows)
            of_query = query, log_ref[0, rows], d_total, mean_ref[0, rows]
            weights, d_scores = weights_and_cotangent(
                tiles, of_query, of_key, step, tiles.here, diagonal
            )
            return (
                [d + _dot(d_scores.astype(q.dtype), q, (0, 0)) for d, q in _zip(sums[0], query)],
                [d + _dot(weights.astype(t.dtype), t, (0, 0)) for d, t in _zip(sums[1], d_total)],
            )

        own = d_own_ref[0, here][:, None]
        start = [own * _f32(q) for q in _load(query_ref, here)]
        zero = [jnp.zeros(x.shape, jnp.float32) for x in of_key[1]]
        sums = add(tiles.here, (start, zero), diagonal=True)
        sums = jax.lax.fori_loop(tiles.here + 1, tiles.count, add, sums)
        _store(outputs[0], here, sums[0])
        _store(outputs[1], here, sums[1])

    arrays = [query, key, value, log_normalizer, d_total, mean, d_own_score]
    call = functools.partial(_call, block=block, interpret=interpret)
    of_query = call(query_kernel, "fsn_backward_query", arrays, segments, [query.shape[3]])
    widths = [key.shape[3], value.shape[3]]
    return *of_query, *call(key_kernel, "fsn_backward_key", arrays, segments, widths)


def block_size(width: int) -> int:
    """Returns the rows of a tile for values of a width."""
    return BLOCK if width <= WIDE else BLOCK // 2


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


class _Tiles(NamedTuple):
    """The blocks of a sequence.

    Attributes:
      here: index of this program's block.
      count: number of blocks.
      block: rows of a block.
      segments: reference to the segments ``[1, L]``, or None.
    """

    here: Array | int
    count: int
    block: int
    segments: Ref | None

    def rows(self, step: Array) -> pl.Slice:
        """Returns the rows of a block."""
        return pl.ds(step * self.block, self.block)

    def scores(
        self, query: Pieces, key: Pieces, at_query: Array, at_key: Array, diagonal: Array | bool
    ) -> Array:
        """Returns scores ``[queries, keys]`` of two blocks; masked pairs have MASKED."""
        scores = sum(_dot(q, k, (1, 1)) for q, k in _zip(query, key))
        if self.segments is not None:
            of_query, of_key = (self.segments[0, self.rows(at)] for at in (at_query, at_key))
            scores = jnp.where(of_query[:, None] == of_key[None, :], scores, MASKED)
        if diagonal:
            time, source = (jax.lax.broadcasted_iota(jnp.int32, scores.shape, a) for a in (0, 1))
            scores = jnp.where(source < time, scores, MASKED)
        return scores


def _zip(*pieces: Pieces) -> zip:  # type: ignore[type-arg]
    return zip(*pieces, strict=True)


def _f32(x: Array) -> Array:
    return x.astype(jnp.float32)


def _dot(x: Array, y: Array, contract: tuple[int, int]) -> Array:
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32)


def _pieces(width: int) -> list[tuple[int, int]]:
    """Cuts a multiple of PIECE into powers of two, at most WIDE: first columns and sizes."""
    pieces, start = [], 0
    while start < width:
        size = min(WIDE, 1 << ((width - start).bit_length() - 1))
        pieces.append((start, size))
        start += size
    return pieces


def _load(ref: Ref, rows: pl.Slice) -> Pieces:
    return [ref[0, rows, pl.ds(start, size)] for start, size in _pieces(ref.shape[2])]


def _store(ref: Ref, rows: pl.Slice, pieces: Pieces) -> None:
    for (start, size), piece in zip(_pieces(ref.shape[2]), pieces, strict=True):
        ref[0, rows, pl.ds(start, size)] = piece


def _call(
    kernel: Callable[[_Tiles, Sequence[Ref], Sequence[Ref]], None],
    name: str,
    inputs: list[Array],
    segments: Array | None,
    widths: Sequence[int | None],
    block: int,
    interpret: bool,
) -> tuple[Array, ...]:
    """Runs a kernel on the blocks of all heads of all sequences.

    Inputs are ``[B, H, L, W]`` or ``[B, H, L]``; outputs, of which the widths are given (None: no
    such axis), are float32 of that form.
    """
    batch, heads, length = inputs[0].shape[:3]
    padded = length + -length % block
    num_blocks = padded // block

    def packed(x: Array) -> Array:
        # Padded keys come after every real query, padded queries and features are cut off, and
        # zeros add nothing to an inner product.
        x = x.reshape(batch * heads, length, *x.shape[3:])
        missing = [(0, 0), (0, padded - length), *((0, _wide(w) - w) for w in x.shape[2:])]
        return jnp.pad(x, missing)

    def spec(shape: Sequence[int]) -> pl.BlockSpec:
        return pl.BlockSpec((1, *shape[1:]), lambda s, i: (s, *(0,) * (len(shape) - 1)))

    arrays = [packed(x) for x in inputs]
    in_specs = [spec(x.shape) for x in arrays]
    if segments is not None:
        arrays.append(jnp.pad(segments[:, 0], ((0, 0), (0, padded - length))))
        in_specs.append(pl.BlockSpec((1, padded), lambda s, i: (s // heads, 0)))

    def body(*refs: Ref) -> None:
        of_segments = refs[len(inputs)] if segments is not None else None
        tiles = _Tiles(pl.program_id(1), num_blocks, block, of_segments)
        kernel(tiles, refs[: len(arrays)], refs[len(arrays) :])

    shapes = [
        (batch * heads, padded) if width is None else (batch * heads, padded, _wide(width))
        for width in widths
    ]
    results = pl.pallas_call(
        body,
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
        grid=(batch * heads, num_blocks),
        in_specs=in_specs,
        out_specs=[spec(shape) for shape in shapes],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name=name,
    )(*arrays)
    return tuple(
        x[:, :length, ...].reshape(batch, heads, length, *x.shape[2:])[
            (..., slice(width)) if width is not None else ...
        ]
        for x, width in zip(results, widths, strict=True)
    )


def _wide(width: int) -> int:
    return max(PIECE, -(-width // PIECE) * PIECE)
