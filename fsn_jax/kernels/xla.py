"""The strictly causal sum in blocks of queries, for every platform that XLA compiles for.

Each block of queries meets the keys before the end of its stretch of the sequence, and the backward
pass computes the weights again from their log normalizers. For long sequences this is a little more
than half the work of the full square, with no ``[B, H, L, L]`` array in either direction.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from fsn_jax.recompute import delay_until, match_varying_axes

MASKED = -1e30
"""Score of a masked pair. Finite: minus infinity would leave NaN in the gradient."""

BLOCK = 128
"""Number of queries in a block."""

MAX_STRETCHES = 8
"""Number of prefix lengths that are compiled; longer sequences loop over a stretch's blocks."""

NARROW = 64
"""A CPU multiplies a transposed matrix by one narrower than this up to three times as fast in the
other order."""


def forward(
    query: Array, key: Array, value: Array, segments: Array | None = None
) -> tuple[Array, ...]:
    """Computes the strict sum block by block; see ``fsn_jax.kernels.forward``."""
    length = query.shape[2]
    query, key, value = (_pad_rows(x, length) for x in (query, key, value))
    segments = None if segments is None else _pad_rows(segments, length)
    own_score = own_inner(query, key)
    parts = []
    for stretch in _stretches(query.shape[2]):
        work = functools.partial(_forward_block, *_prefix(stretch, key, value, segments))
        parts.append(_over_blocks(work, stretch, query, own_score, segments))
    return tuple(
        jnp.concatenate(arrays, axis=2)[:, :, :length] for arrays in zip(*parts, strict=True)
    )


def backward(
    query: Array,
    key: Array,
    value: Array,
    log_normalizer: Array,
    d_total: Array,
    mean: Array,
    d_own_score: Array,
    segments: Array | None = None,
) -> tuple[Array, ...]:
    """Differentiates the strict sum block by block; see ``fsn_jax.kernels.backward``."""
    length = query.shape[2]
    query, key, value, log_normalizer, d_total, mean, d_own_score = (
        _pad_rows(x, length)
        for x in (query, key, value, log_normalizer, d_total, mean, d_own_score)
    )
    segments = None if segments is None else _pad_rows(segments, length)
    own_query, own_key, own_value = query, key, value
    query, key, value = delay_until(d_total, (query, key, value))
    d_query = []
    zeros = [jnp.zeros_like(x, jnp.float32) for x in (key, value)]
    _, d_key, d_value = match_varying_axes((d_total, *zeros))
    # The last stretch first, whose keys are all keys: then XLA starts from it, not from zeros.
    for stretch in reversed(_stretches(query.shape[2])):
        work = functools.partial(_backward_block, *_prefix(stretch, key, value, segments))
        arrays = (query, log_normalizer, d_total, mean, segments)
        dq, d_key, d_value = _over_blocks(work, stretch, *arrays, totals=(d_key, d_value))
        d_query.append(dq)
    d_own_score = d_own_score[..., None]
    cotangents = (
        jnp.concatenate(d_query[::-1], axis=2) + d_own_score * own_key,
        d_key + d_own_score * own_query,
        d_value,
    )
    return tuple(
        x[:, :, :length].astype(own.dtype)
        for x, own in zip(cotangents, (own_query, own_key, own_value), strict=True)
    )


def _prefix(
    stretch: "_Stretch", key: Array, value: Array, segments: Array | None
) -> tuple[Array, Array, Array | None]:
    """The rows that the queries of a stretch can see."""
    rows = (slice(None), slice(None), slice(stretch.stop))
    return key[rows], value[rows], None if segments is None else segments[rows]


def _pad_rows(x: Array, length: int) -> Array:
    # Padded keys come after every real query, and padded queries are cut off.
    missing = -length % _block(length)
    if not missing:
        return x
    return jnp.pad(x, ((0, 0), (0, 0), (0, missing), (0, 0))[: x.ndim])


def slots_before(position: Int[Array, ""], num_tokens: int, num_slots: int) -> Bool[Array, "S C"]:
    """Returns which slots are before each of the tokens at ``position`` and on."""
    time = position + jnp.arange(num_tokens)[:, None]
    return jnp.arange(num_slots)[None, :] < time


def inner(x: Array, y: Array) -> Array:
    """Returns ``x[t] . y[u]`` of each head, float32 ``[B, H, T, U]``."""
    return jnp.einsum("bhte,bhue->bhtu", x, y, preferred_element_type=jnp.float32)


def own_inner(x: Array, y: Array) -> Array:
    """Returns ``x[t] . y[t]`` of each head, float32 ``[B, H, T]``."""
    return jnp.sum(x.astype(jnp.float32) * y.astype(jnp.float32), axis=-1)


def combine(weights: Array, x: Array) -> Array:
    """Returns ``sum_u weights[t, u] x[u]``: the product in the dtype of ``x``, float32 sums."""
    weights = weights.astype(x.dtype)
    return jnp.einsum("bhtu,bhug->bhtg", weights, x, preferred_element_type=jnp.float32)


def _combine_queries(weights: Array, x: Array) -> Array:
    """Returns ``sum_t weights[t, u] x[t]``, as ``combine``."""
    weights = weights.astype(x.dtype)
    if x.shape[3] >= NARROW:
        return jnp.einsum("bhtu,bhtg->bhug", weights, x, preferred_element_type=jnp.float32)
    by_width = jnp.einsum("bhtg,bhtu->bhgu", x, weights, preferred_element_type=jnp.float32)
    return by_width.swapaxes(2, 3)


def _masked_scores(
    query: Array, key: Array, start: Array, segments: Array | None, own_segment: Array | None
) -> Array:
    seen = slots_before(start, query.shape[2], key.shape[2])
    if segments is not None and own_segment is not None:
        seen = seen[None, None] & (own_segment[..., None] == segments[:, :, None])
    return jnp.where(seen, inner(query, key), MASKED)


def _forward_block(
    key: Array,
    value: Array,
    segments: Array | None,
    start: Array,
    query: Array,
    own_score: Array,
    own_segment: Array | None,
) -> tuple[Array, Array, Array]:
    """The strict sum, self weights and log normalizers of the queries from ``start`` on."""
    scores = _masked_scores(query, key, start, segments, own_segment)
    largest = jnp.maximum(scores.max(axis=-1), own_score)
    weights = jnp.exp(scores - largest[..., None])
    own_weight = jnp.exp(own_score - largest)
    normalizer = weights.sum(axis=-1) + own_weight
    total = combine(weights, value) / normalizer[..., None]
    return total.astype(value.dtype), own_weight / normalizer, largest + jnp.log(normalizer)


def _backward_block(
    key: Array,
    value: Array,
    segments: Array | None,
    start: Array,
    query: Array,
    log_normalizer: Array,
    d_total: Array,
    mean: Array,
    own_segment: Array | None,
) -> tuple[Array, Array, Array]:
    """Cotangents by the strict sum: of these queries, and of all keys and values."""
    scores = _masked_scores(query, key, start, segments, own_segment)
    weights = jnp.exp(scores - log_normalizer[..., None])
    d_scores = weights * (inner(d_total, value) - mean[..., None])
    return (
        combine(d_scores, key),
        _combine_queries(d_scores, query),
        _combine_queries(weights, d_total),
    )


class _Stretch(NamedTuple):
    """Queries ``[start, stop)``, taken ``block`` at a time, against keys ``[0, stop)``."""

    start: int
    stop: int
    block: int


def _block(length: int) -> int:
    return min(BLOCK, length)


def _stretches(length: int) -> list[_Stretch]:
    """Cuts a padded length into at most MAX_STRETCHES runs of whole blocks."""
    block = _block(length)
    num_blocks = length // block
    step = -(-num_blocks // MAX_STRETCHES) * block
    return [_Stretch(a, min(a + step, length), block) for a in range(0, length, step)]


def _over_blocks(
    work: Callable[..., tuple[Array, ...]],
    stretch: _Stretch,
    *arrays: Array | None,
    totals: Sequence[Array] = (),
) -> list[Array]:
    """Applies ``work(start, *rows)`` to each block of a stretch.

    The last results are added to the first rows of ``totals``, in place as XLA compiles it; the
    others are joined along the rows.
    """
    rows = [x if x is None else x[:, :, stretch.start : stretch.stop] for x in arrays]
    num_blocks = (stretch.stop - stretch.start) // stretch.block

    def add(
        totals: Sequence[Array], block: Sequence[Array | None]
    ) -> tuple[list[Array], list[Array]]:
        results = list(work(*block))
        parts = [results.pop() for _ in totals][::-1]
        return [_add_first_rows(a, b) for a, b in zip(totals, parts, strict=True)], results

    if num_blocks == 1:
        totals, joined = add(totals, (jnp.int32(stretch.start), *rows))
        return [*joined, *totals]

    def split(x: Array) -> Array:
        shape = (*x.shape[:2], num_blocks, stretch.block, *x.shape[3:])
        return jnp.moveaxis(x.reshape(shape), 2, 0)

    def join(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 2)
        return x.reshape(*x.shape[:2], -1, *x.shape[4:])

    starts = stretch.start + stretch.block * jnp.arange(num_blocks)
    totals, joined = jax.lax.scan(add, list(totals), (starts, *jax.tree.map(split, rows)))
    return [*map(join, joined), *totals]


def _add_first_rows(total: Array, part: Array) -> Array:
    rows = total[:, :, : part.shape[2]] + part
    return jax.lax.dynamic_update_slice(total, rows, (0, 0, 0, 0))
