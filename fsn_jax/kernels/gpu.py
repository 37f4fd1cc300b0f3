"""The strictly causal sum for NVIDIA GPUs, by Pallas and Triton.

One program has a block of queries (or, for the cotangents of keys and values, a block of keys) of
one head and walks through the other side in steps; the softmax is taken on the way, as in
FlashAttention (arXiv 2205.14135).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from fsn_jax.kernels import gpu_tiles as tiles
from fsn_jax.kernels.gpu_tiles import At, Pieces, Ref, Shape, Span, Tile
from fsn_jax.kernels.xla import MASKED

TILES = {
    128: {2: Tile(64, 64), 4: Tile(64, 32)},
    256: {2: Tile(64, 16), 4: Tile(16, 16)},
    1 << 30: {2: Tile(32, 32), 4: Tile(16, 16, num_stages=1)},
}
"""By the greatest width of rows and the bytes of a number: the largest that keep to the registers
of an A100 and an H100."""


def forward(
    query: Array, key: Array, value: Array, segments: Array | None = None, *, interpret: bool
) -> tuple[Array, ...]:
    """Computes the strict sum; see ``fsn_jax.kernels.forward``."""

    def kernel(at: At, inputs: Sequence[Ref], outputs: Sequence[Ref]) -> None:
        query_ref, key_ref, value_ref = inputs
        query, own_key = tiles.load(query_ref, at.own), tiles.load(key_ref, at.own)

        def read(rows: Span) -> tuple[Pieces, Pieces]:
            return tiles.load(key_ref, rows), tiles.load(value_ref, rows)

        widths = [columns.size for columns in tiles.columns_of(value_ref.shape[3])]
        total, own, log = sum_of_past(at, query, own_key, read, widths)
        tiles.store(outputs[0], at.own, total)
        for ref, row in zip(outputs[1:], (own, log), strict=True):
            tiles.store_at(ref, (0, 0), row, at.own)

    row = Shape(query.shape[:3], jnp.float32)
    call = _call(query, key, value, segments, interpret)
    return call(kernel, "fsn_forward", [query, key, value], [value, row, row])


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

    def query_kernel(at: At, inputs: Sequence[Ref], outputs: Sequence[Ref]) -> None:
        query_ref, key_ref, value_ref, log_ref, d_total_ref, mean_ref, d_own_ref = inputs
        query, d_total = tiles.load(query_ref, at.own), tiles.load(d_total_ref, at.own)
        log, mean, d_own = (_row(ref, at.own)[:, None] for ref in (log_ref, mean_ref, d_own_ref))

        def add(step: Array, d_query: Pieces) -> Pieces:
            rows = at.other(step)
            key, value = tiles.load(key_ref, rows), tiles.load(value_ref, rows)
            scores = jnp.where(at.before(step), tiles.product(query, key), MASKED)
            d_scores = jnp.exp(scores - log) * (tiles.product(d_total, value) - mean)
            return tiles.add_product(d_query, d_scores, key)

        own = [d_own * k.astype(jnp.float32) for k in tiles.load(key_ref, at.own)]
        tiles.store(outputs[0], at.own, at.over_past(add, own))

    def key_kernel(at: At, inputs: Sequence[Ref], outputs: Sequence[Ref]) -> None:
        query_ref, key_ref, value_ref, log_ref, d_total_ref, mean_ref, d_own_ref = inputs
        key, value = tiles.load(key_ref, at.own), tiles.load(value_ref, at.own)

        def add(step: Array, sums: tuple[Pieces, Pieces]) -> tuple[Pieces, Pieces]:
            rows = at.other(step)
            query, d_total = tiles.load(query_ref, rows), tiles.load(d_total_ref, rows)
            log, mean = (_row(ref, rows)[None] for ref in (log_ref, mean_ref))
            # Keys first: then no product has to turn its left matrix around.
            scores = jnp.where(at.after(step), tiles.product(key, query), MASKED)
            weights = jnp.exp(scores - log)
            d_scores = weights * (tiles.product(value, d_total) - mean)
            d_key = tiles.add_product(sums[0], d_scores, query)
            return d_key, tiles.add_product(sums[1], weights, d_total)

        d_own = _row(d_own_ref, at.own)[:, None]
        own = [d_own * q.astype(jnp.float32) for q in tiles.load(query_ref, at.own)]
        zeros = [jnp.zeros(x.shape, jnp.float32) for x in value]
        for ref, pieces in zip(outputs, at.over_future(add, (own, zeros)), strict=True):
            tiles.store(ref, at.own, pieces)

    arrays = [query, key, value, log_normalizer, d_total, mean, d_own_score]
    call = _call(query, key, value, segments, interpret)
    of_query = call(query_kernel, "fsn_backward_query", arrays, [query])
    return *of_query, *call(key_kernel, "fsn_backward_key", arrays, [key, value])


class _Sums(NamedTuple):
    """A block of queries part of the way through its keys; float32.

    Attributes:
      largest: largest score so far, ``[block]``.
      normalizer: sum of ``exp(score - largest)``, ``[block]``.
      total: sum of ``exp(score - largest) * value``, in pieces ``[block, size]``.
    """

    largest: Array
    normalizer: Array
    total: Pieces


def sum_of_past(
    at: At,
    query: Pieces,
    own_key: Pieces,
    read: Callable[[Span], tuple[Pieces, Pieces]],
    widths: Sequence[int],
) -> tuple[Pieces, Array, Array]:
    """Computes the strict sums, own weights and log normalizers of a block of queries.

    Args:
      at: where the program is.
      query: of its rows.
      own_key: the keys of the same tokens.
      read: keys and values of some rows.
      widths: of the pieces of the values.
    """
    own_score = tiles.row_product(query, own_key)

    def add(step: Array, sums: _Sums) -> _Sums:
        key, value = read(at.other(step))
        scores = jnp.where(at.before(step), tiles.product(query, key), MASKED)
        largest = jnp.maximum(sums.largest, jnp.max(scores, axis=1))
        weights = jnp.exp(scores - largest[:, None])
        fade = jnp.exp(sums.largest - largest)
        faded = [t * fade[:, None] for t in sums.total]
        normalizer = sums.normalizer * fade + jnp.sum(weights, axis=1)
        return _Sums(largest, normalizer, tiles.add_product(faded, weights, value))

    zero = [jnp.zeros((at.tile.block, width), jnp.float32) for width in widths]
    sums = at.over_past(add, _Sums(own_score, jnp.ones_like(own_score), zero))
    inverse = 1 / sums.normalizer
    total = [t * inverse[:, None] for t in sums.total]
    own = jnp.exp(own_score - sums.largest) * inverse
    return total, own, sums.largest + jnp.log(sums.normalizer)


def _row(ref: Ref, rows: Span) -> Array:
    return tiles.load_at(ref, (0, 0), rows)


def tile_for(dtype: Any, width: int) -> Tile:
    """Returns how a kernel is cut for rows of a dtype and a greatest width."""
    return TILES[next(most for most in TILES if width <= most)][jnp.dtype(dtype).itemsize]


def _call(
    query: Array, key: Array, value: Array, segments: Array | None, interpret: bool
) -> Callable[..., tuple[Array, ...]]:
    """Returns how a kernel of theirs is called, with arrays and with the likes of its results."""
    tile = tile_for(value.dtype, max(x.shape[3] for x in (query, key, value)))

    def call(kernel: Any, name: str, inputs: Any, outputs: Any) -> tuple[Array, ...]:
        shapes = [Shape(x.shape, x.dtype) for x in outputs]
        return tuple(
            tiles.call(kernel, name, inputs, segments, shapes, tile=tile, interpret=interpret)
        )

    return call
