"""The strictly causal sum for TPUs, by Pallas and Mosaic.

The softmax is taken tile by tile, as in FlashAttention (arXiv 2205.14135); one backward kernel
computes all three cotangents. ``fsn_jax.kernels.tpu_tiles`` has the layout.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu

from fsn_jax.kernels import tpu_tiles as tiles
from fsn_jax.kernels.arrays import dot
from fsn_jax.kernels.tpu_tiles import BY_KEY, BY_QUERY, WHOLE, Columns, Ref, Tile

FORWARD_CHUNK, BACKWARD_CHUNK = 1, 2
"""Queries of a tile that are worked on together, in LANES; fastest by the compiler's schedule."""


def forward(
    query: Array, key: Array, value: Array, segments: Array | None = None, *, interpret: bool
) -> tuple[Array, ...]:
    """Computes the strict sum; see ``fsn_jax.kernels.forward``."""
    batch, heads, length, width = value.shape

    def kernel(tile: Tile, inputs: Sequence[Ref], outputs: Sequence[Ref]) -> None:
        query, key, value, *segments = inputs
        total_ref, own_ref, log_ref, *state = outputs

        def finish(columns: Columns, total: Array, own: Array, log: Array) -> None:
            total_ref[:, columns] = total.astype(total_ref.dtype)
            own_ref[:, columns], log_ref[:, columns] = own, log

        tile.run(add_keys(tile, query, key, value, segments, state, finish))

    row = jax.ShapeDtypeStruct((batch, heads, 1, length), jnp.float32)
    value = tiles.features_first(value)
    total, own, log = tiles.call(
        kernel,
        "fsn_forward",
        [
            (tiles.features_first(query), BY_QUERY),
            (tiles.features_first(key), BY_KEY),
            (value, BY_KEY),
        ],
        segments,
        [
            (jax.ShapeDtypeStruct(value.shape, value.dtype), BY_QUERY),
            (row, BY_QUERY),
            (row, BY_QUERY),
        ],
        keys_outside=False,
        scratch=sum_state(value.shape[2], length),
        interpret=interpret,
    )
    return tiles.tokens_first(total, width), own[:, :, 0], log[:, :, 0]


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

    def kernel(tile: Tile, inputs: Sequence[Ref], outputs: Sequence[Ref]) -> None:
        query, key, value, d_total, log, mean, d_own, *segments = inputs
        rows = (log, mean, d_own)
        tile.run(add_cotangents(tile, query, key, value, d_total, rows, segments, outputs))

    by_query, by_key, values, d_totals = map(tiles.features_first, (query, key, value, d_total))
    rows = [x[:, :, None] for x in (log_normalizer, mean, d_own_score)]
    cotangents = tiles.call(
        kernel,
        "fsn_backward",
        [(by_query, BY_QUERY), (by_key, BY_KEY), (values, BY_KEY)]
        + [(x, BY_QUERY) for x in (d_totals, *rows)],
        segments,
        [
            (jax.ShapeDtypeStruct(x.shape, jnp.float32), columns)
            for x, columns in ((by_query, WHOLE), (by_key, BY_KEY), (values, BY_KEY))
        ],
        keys_outside=True,
        interpret=interpret,
    )
    return tuple(
        tiles.tokens_first(d, x.shape[3]).astype(x.dtype)
        for d, x in zip(cotangents, (query, key, value), strict=True)
    )


def sum_state(width: int, length: int) -> list[Any]:
    """Scratch of ``add_keys``: total, largest score and normalizer of a block of queries."""
    block = tiles.block_size(length)
    return [tpu.VMEM((rows, block), jnp.float32) for rows in (width, 1, 1)]


def add_keys(
    tile: Tile,
    query: Ref,
    key: Ref,
    value: Ref,
    segments: Sequence[Ref],
    state: Sequence[Ref],
    finish: Callable[[Columns, Array, Array, Array], None],
) -> Callable[[bool, bool], None]:
    """Returns the work of a tile: its keys are added to the sums of its queries.

    Args:
      tile: where it is.
      query: ``[E, block]``.
      key: ``[E, block]``.
      value: ``[G, block]``.
      segments: of queries and of keys, or none.
      state: scratch, ``sum_state``.
      finish: called on the diagonal with some of the queries, their sums ``[G, queries]``, own
        weights and log normalizers.
    """
    total_ref, largest_ref, normalizer_ref = state
    chunk = tiles.chunk_size(tile.block, FORWARD_CHUNK)

    def work(diagonal: bool, first: bool) -> None:
        for start in range(0, tile.block, chunk):
            columns = pl.ds(start, chunk)
            stop = start + chunk if diagonal else tile.block
            q = query[:, columns]
            scores = tiles.scores(key, q, segments, columns, stop, diagonal)
            largest = jnp.max(scores, axis=0, keepdims=True)
            if diagonal:
                own_score = tiles.inner(q, key[:, columns])
                largest = jnp.maximum(largest, own_score)
            if not first:
                largest = jnp.maximum(largest, largest_ref[:, columns])
            weights = jnp.exp(scores - largest)
            normalizer = jnp.sum(weights, axis=0, keepdims=True)
            total = dot(value[:, :stop], weights.astype(value.dtype), (1, 0))
            if not first:
                fade = jnp.exp(largest_ref[:, columns] - largest)
                normalizer += fade * normalizer_ref[:, columns]
                total += fade * total_ref[:, columns]
            if diagonal:
                own = jnp.exp(own_score - largest)
                normalizer += own
                inverse = 1 / normalizer
                finish(columns, total * inverse, own * inverse, largest + jnp.log(normalizer))
            else:
                total_ref[:, columns] = total
                largest_ref[:, columns], normalizer_ref[:, columns] = largest, normalizer

    return work


def add_cotangents(
    tile: Tile,
    query: Ref,
    key: Ref,
    value: Ref,
    d_total: Ref,
    rows: Sequence[Ref],
    segments: Sequence[Ref],
    outputs: Sequence[Ref],
) -> Callable[[bool, bool], None]:
    """Returns the work of a tile: cotangents of its queries, keys and values are added.

    Args:
      tile: where it is.
      query: ``[E, block]``.
      key: ``[E, block]``.
      value: ``[G, block]``.
      d_total: cotangent of the sums, ``[G, block]``.
      rows: log normalizers, mean cotangents of the weights and cotangents of the own scores.
      segments: of queries and of keys, or none.
      outputs: float32 cotangents of the queries of the sequence, of keys and of values.
    """
    log, mean, d_own = rows
    d_query_ref, d_key_ref, d_value_ref = outputs
    chunk = tiles.chunk_size(tile.block, BACKWARD_CHUNK)

    def work(diagonal: bool, first: bool) -> None:
        # The last chunk first: on the diagonal it alone meets all keys.
        for start in reversed(range(0, tile.block, chunk)):
            columns = pl.ds(start, chunk)
            stop = start + chunk if diagonal else tile.block
            q, d_sum = query[:, columns], d_total[:, columns]
            scores = tiles.scores(key, q, segments, columns, stop, diagonal)
            weights = jnp.exp(scores - log[:, columns])
            d_weights = dot(value[:, :stop], d_sum, (0, 0))
            d_scores = (weights * (d_weights - mean[:, columns])).astype(q.dtype)
            d_query = dot(key[:, :stop], d_scores, (1, 0))
            if diagonal:
                d_query += d_own[:, columns] * key[:, columns]
            _put(d_query_ref, tile.in_sequence(tile.query, columns), d_query, add=not first)
            add = not diagonal or stop < tile.block
            _put(d_key_ref, pl.ds(0, stop), dot(q, d_scores, (1, 1)), add=add)
            weights = weights.astype(d_sum.dtype)
            _put(d_value_ref, pl.ds(0, stop), dot(d_sum, weights, (1, 1)), add=add)
        if diagonal:
            d_key_ref[...] += d_own[...] * query[...]

    return work


def _put(ref: Ref, columns: Columns, value: Array, *, add: bool) -> None:
    if add:
        ref[:, columns] += value
    else:
        ref[:, columns] = value
