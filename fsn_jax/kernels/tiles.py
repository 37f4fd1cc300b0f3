"""The arithmetic of one tile of the strictly causal sum, the same in every kernel.

A tile is a block of queries against a block of keys. ``docs/model.md`` has the sum itself; the
softmax over the tiles of a row is taken on the fly, as in FlashAttention (arXiv 2205.14135).
Everything is two-dimensional, since that is what both compilers take.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

MASKED = -1e30  # finite: exp gives 0 without the NaN that minus infinity leaves


class Row(NamedTuple):
    """A block of queries part of the way through its keys; float32.

    Attributes:
      largest: score so far, ``[block, 1]``.
      normaliser: sum of ``exp(score - largest)``, ``[block, 1]``.
      total: the same sum with the values, ``[block, G]``.
    """

    largest: Array
    normaliser: Array
    total: Array


def dot(x: Array, y: Array, contract: tuple[int, int]) -> Array:
    """A matrix product over one axis of each, accumulated in float32."""
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32)


def own_inner(x: Array, y: Array) -> Array:
    """Row by row, ``[block, 1]``."""
    product = x.astype(jnp.float32) * y.astype(jnp.float32)
    return jnp.sum(product, axis=1, keepdims=True)


def start_row(query: Array, own_key: Array, width: int) -> Row:
    """Only a query's own token, whose value is not in the sum, has been seen."""
    own_score = own_inner(query, own_key)
    total = jnp.zeros((query.shape[0], width), jnp.float32)
    return Row(own_score, jnp.ones_like(own_score), total)


def scores(query: Array, key: Array, *, diagonal: bool) -> Array:
    """``[queries, keys]``; on the diagonal a query has only the keys before its own."""
    s = dot(query, key, (1, 1))
    if not diagonal:
        return s
    time, source = (jax.lax.broadcasted_iota(jnp.int32, s.shape, axis) for axis in (0, 1))
    return jnp.where(source < time, s, MASKED)


def add_tile(row: Row, query: Array, key: Array, value: Array, *, diagonal: bool) -> Row:
    """The row with one more block of keys in it."""
    s = scores(query, key, diagonal=diagonal)
    largest = jnp.maximum(row.largest, jnp.max(s, axis=1, keepdims=True))
    weights = jnp.exp(s - largest)
    fade = jnp.exp(row.largest - largest)
    return Row(
        largest,
        row.normaliser * fade + jnp.sum(weights, axis=1, keepdims=True),
        row.total * fade + dot(weights.astype(value.dtype), value, (1, 0)),
    )


def finish_row(row: Row, query: Array, own_key: Array) -> tuple[Array, Array, Array]:
    """The strict sum ``[block, G]``, self weights and log normalisers ``[block, 1]``."""
    own_weight = jnp.exp(own_inner(query, own_key) - row.largest) / row.normaliser
    return row.total / row.normaliser, own_weight, row.largest + jnp.log(row.normaliser)


def weights_and_gradient(
    query: Array,
    key: Array,
    value: Array,
    log_normaliser: Array,
    d_total: Array,
    mean: Array,
    *,
    diagonal: bool,
) -> tuple[Array, Array]:
    """The weights of a tile again, and the gradient by its scores, both ``[queries, keys]``.

    ``mean`` is the mean of the gradient by the weights under the weights, ``[queries, 1]``.
    """
    weights = jnp.exp(scores(query, key, diagonal=diagonal) - log_normaliser)
    return weights, weights * (dot(d_total, value, (1, 1)) - mean)


def query_gradient(*tile: Array, diagonal: bool) -> Array:
    """What a tile adds to the gradient by its queries; arguments of ``weights_and_gradient``."""
    _, d_scores = weights_and_gradient(*tile, diagonal=diagonal)
    key = tile[1]
    return dot(d_scores.astype(key.dtype), key, (1, 0))


def key_value_gradients(*tile: Array, diagonal: bool) -> tuple[Array, Array]:
    """What a tile adds to the gradients by its keys and by its values; arguments as above."""
    weights, d_scores = weights_and_gradient(*tile, diagonal=diagonal)
    query, d_total = tile[0], tile[4]
    return (
        dot(d_scores.astype(query.dtype), query, (0, 0)),
        dot(weights.astype(d_total.dtype), d_total, (0, 0)),
    )
