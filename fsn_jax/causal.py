"""Causal softmax attention over folded values: the one weighted sum that every layer here runs.

``A[t, u] = softmax_u(q_t . k_u)`` over ``u <= t``. The frustrated coupling needs the sum over the
strict past, ``sum_{u < t} A[t, u] v_u``, and the weight ``A[t, t]`` apart from it; the transformer
needs the whole sum. Queries carry the temperature.

``causal_sum`` works through blocks of queries, each against the keys before the end of its segment,
and its backward pass computes the weights again from their normaliser: for long sequences a little
more than half the work of the full square, and no ``[B, H, L, L]`` array in either direction.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from fsn_jax import kernels
from fsn_jax.config import Implementation
from fsn_jax.recompute import alike_over_devices, known_after

_MASKED = -1e30  # finite: exp gives 0 without the NaN that minus infinity leaves in the gradient

BLOCK = 128
"""Queries worked on together."""

MAX_SEGMENTS = 8
"""Distinct prefix lengths compiled; a longer sequence loops over the blocks of a segment."""

NARROW = 64
"""The CPU's product of a transposed matrix with a narrower one than this is up to three times as
fast the other way round."""


class CausalSum(NamedTuple):
    """A causal weighted sum.

    Attributes:
      total: ``sum_u A[t, u] v_u``, float32 ``[B, H, L, G]``.
      self_weight: ``A[t, t]``, float32 ``[B, H, L]``.
    """

    total: Array
    self_weight: Array


def split_heads(x: Float[Array, "B L HxP"], num_heads: int) -> Float[Array, "B H L P"]:
    """Contiguous blocks of the last axis become heads."""
    batch, length, width = x.shape
    return x.reshape(batch, length, num_heads, width // num_heads).transpose(0, 2, 1, 3)


def merge_heads(x: Float[Array, "B H L P"]) -> Float[Array, "B L HxP"]:
    """The inverse of ``split_heads``."""
    batch, heads, length, width = x.shape
    return x.transpose(0, 2, 1, 3).reshape(batch, length, heads * width)


def attention_weights(
    query: Float[Array, "B H L E"],
    key: Float[Array, "B H L E"],
    segment_ids: Int[Array, "B L"] | None = None,
) -> Float[Array, "B H L L"]:
    """The matrix ``A`` itself: rows sum to one over ``u <= t`` in the segment of t."""
    seen = np.tri(query.shape[2], dtype=bool)
    if segment_ids is not None:
        seen = seen & (segment_ids[:, None, :, None] == segment_ids[:, None, None])
    return _softmax(_inner(query, key), seen)


def slots_before(position: Int[Array, ""], num_tokens: int, num_slots: int) -> Bool[Array, "S C"]:
    """Which slots are before each of the tokens at ``position`` and on."""
    time = position + jnp.arange(num_tokens)[:, None]
    return jnp.arange(num_slots)[None, :] < time


def _inner(x: Array, y: Array) -> Array:
    return jnp.einsum("bhte,bhue->bhtu", x, y, preferred_element_type=jnp.float32)


def _combine(weights: Array, x: Array) -> Array:
    """``sum_u weights[t, u] x[u]``, the product in the type of ``x``, the sum in float32."""
    weights = weights.astype(x.dtype)
    return jnp.einsum("bhtu,bhug->bhtg", weights, x, preferred_element_type=jnp.float32)


def _combine_queries(weights: Array, x: Array) -> Array:
    """``sum_t weights[t, u] x[t]``, as ``_combine``."""
    weights = weights.astype(x.dtype)
    if x.shape[3] >= NARROW:
        return jnp.einsum("bhtu,bhtg->bhug", weights, x, preferred_element_type=jnp.float32)
    by_width = jnp.einsum("bhtg,bhtu->bhgu", x, weights, preferred_element_type=jnp.float32)
    return by_width.swapaxes(2, 3)


def _softmax(scores: Array, causal: Array | np.ndarray) -> Array:
    # float32 whatever the inputs: the normaliser sums up to L terms.
    return jax.nn.softmax(jnp.where(causal, scores, _MASKED), axis=-1)


def causal_sum(
    query: Float[Array, "B H L E"],
    key: Float[Array, "B H L E"],
    value: Float[Array, "B H L G"],
    segment_ids: Int[Array, "B L"] | None = None,
    *,
    include_self: bool,
    implementation: Implementation = "auto",
) -> CausalSum:
    """The weighted sum over ``u <= t`` (``include_self``) or ``u < t``.

    The self weight stays in the normaliser either way. Differentiable in reverse mode.

    Args:
      query: float32 or bfloat16; sums and softmax are float32 either way.
      key: as ``query``.
      value: as ``query``.
      segment_ids: tokens attend to those of their own segment; None: all are in one.
      include_self: whether a token's own value is in its sum.
      implementation: ``reference`` goes through the whole matrix and has all derivatives; ``xla``
        goes block by block; ``pallas`` is a fused kernel for GPUs and TPUs (interpreted, slowly, on
        a CPU); ``auto`` takes the kernel where the program runs on the GPU or TPU that this machine
        has, and it works, and no compiler has to divide it: on one device, or in ``shard_map``.
    """
    length = query.shape[2]
    if implementation == "auto":
        implementation = _fastest(query, value)
    if implementation == "reference" or not length or segment_ids is not None:
        return _causal_sum_reference(query, key, value, segment_ids, include_self=include_self)
    # Padded keys come after every real query and padded queries are cut off, so zeros will do.
    rows = ((0, 0), (0, 0), (0, -length % _block(length)), (0, 0))
    query, key, value = (jnp.pad(x, rows) for x in (query, key, value))
    total, self_weight = _causal_sum(query, key, value, include_self, implementation)
    return CausalSum(total[:, :, :length], self_weight[:, :, :length])


def _causal_sum_reference(
    query: Array, key: Array, value: Array, segment_ids: Array | None, *, include_self: bool
) -> CausalSum:
    weights = attention_weights(query, key, segment_ids)
    own = np.eye(query.shape[2], dtype=bool)
    self_weight = jnp.where(own, weights, 0).sum(axis=-1)
    summed = weights if include_self else jnp.where(own, 0, weights)
    return CausalSum(_combine(summed, value), self_weight)


def _fastest(query: Array, value: Array) -> Implementation:
    """``xla``, or ``auto``: the kernel wherever the program is lowered for it, else ``xla``."""
    if jax.default_backend() not in ("gpu", "tpu"):
        return "xla"
    if jax.device_count() > 1 and not jax.sharding.get_abstract_mesh().manual_axes:
        return "xla"  # a kernel in a program that jax.jit divides by itself is gathered or refused
    length, score_width = query.shape[2:]
    works = kernels.works(length, score_width, value.shape[3], value.dtype.name)
    return "auto" if works else "xla"


def _by_blocks_or_fused(
    implementation: Implementation,
    by_blocks: Callable[..., tuple[Array, ...]],
    fused: Callable[..., tuple[Array, ...]],
) -> Callable[..., tuple[Array, ...]]:
    if implementation == "xla":
        return by_blocks
    return functools.partial(fused, otherwise=by_blocks if implementation == "auto" else None)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _causal_sum(
    query: Array, key: Array, value: Array, include_self: bool, implementation: Implementation
) -> CausalSum:
    return _causal_sum_forward(query, key, value, include_self, implementation)[0]


def _causal_sum_forward(
    query: Array, key: Array, value: Array, include_self: bool, implementation: Implementation
) -> tuple[CausalSum, tuple[Array, ...]]:
    strict = _by_blocks_or_fused(implementation, _strict_forward, kernels.forward)
    total, self_weight, log_normaliser = strict(query, key, value)
    if include_self:
        total += self_weight[..., None] * value
    residuals = (query, key, value, total, self_weight, log_normaliser)
    return CausalSum(total, self_weight), residuals


def _causal_sum_backward(
    include_self: bool,
    implementation: Implementation,
    residuals: tuple[Array, ...],
    gradient: CausalSum,
) -> tuple[Array, Array, Array]:
    query, key, value, total, self_weight, log_normaliser = residuals
    d_total, d_self = gradient
    mean = jnp.sum(d_total * total, axis=-1) + d_self * self_weight
    d_own = d_self + _own_inner(d_total, value) if include_self else d_self
    d_own_score = (self_weight * (d_own - mean))[..., None]
    strict = _by_blocks_or_fused(implementation, _strict_backward, kernels.backward)
    d_query, d_key, d_value = strict(
        query, key, value, log_normaliser, d_total.astype(value.dtype), mean
    )
    d_query += d_own_score * key
    d_key += d_own_score * query
    if include_self:
        d_value += self_weight[..., None] * d_total
    return d_query.astype(query.dtype), d_key.astype(key.dtype), d_value.astype(value.dtype)


_causal_sum.defvjp(_causal_sum_forward, _causal_sum_backward)


def _strict_forward(query: Array, key: Array, value: Array) -> tuple[Array, ...]:
    """As ``fsn_jax.kernels.forward``, block by block; the length is a multiple of the block."""
    own_score = _own_inner(query, key)
    parts = []
    for segment in _segments(query.shape[2]):
        prefix = key[:, :, : segment.stop], value[:, :, : segment.stop]
        work = functools.partial(_forward_block, *prefix)
        parts.append(_over_blocks(work, segment, query, own_score))
    return tuple(jnp.concatenate(arrays, axis=2) for arrays in zip(*parts, strict=True))


def _strict_backward(
    query: Array, key: Array, value: Array, log_normaliser: Array, d_total: Array, mean: Array
) -> tuple[Array, Array, Array]:
    """As ``fsn_jax.kernels.backward``, block by block."""
    query, key, value = known_after(d_total, (query, key, value))
    d_query = []
    zeros = [jnp.zeros(x.shape, jnp.float32) for x in (key, value)]
    _, d_key, d_value = alike_over_devices((d_total, *zeros))
    # The last segment first, whose keys are all keys: then XLA starts from it, not from zeros.
    for segment in reversed(_segments(query.shape[2])):
        prefix = key[:, :, : segment.stop], value[:, :, : segment.stop]
        work = functools.partial(_backward_block, *prefix)
        arrays = (query, log_normaliser, d_total, mean)
        dq, d_key, d_value = _over_blocks(work, segment, *arrays, totals=(d_key, d_value))
        d_query.append(dq)
    return jnp.concatenate(d_query[::-1], axis=2), d_key, d_value


def _forward_block(
    key: Array, value: Array, start: Array, query: Array, own_score: Array
) -> tuple[Array, Array, Array]:
    """The strict sum, self weights and log normalisers of the queries from ``start`` on."""
    past = slots_before(start, query.shape[2], key.shape[2])
    scores = jnp.where(past, _inner(query, key), _MASKED)
    largest = jnp.maximum(scores.max(axis=-1), own_score)
    weights = jnp.exp(scores - largest[..., None])
    own_weight = jnp.exp(own_score - largest)
    normaliser = weights.sum(axis=-1) + own_weight
    total = _combine(weights, value) / normaliser[..., None]
    return total, own_weight / normaliser, largest + jnp.log(normaliser)


def _backward_block(
    key: Array,
    value: Array,
    start: Array,
    query: Array,
    log_normaliser: Array,
    d_total: Array,
    mean: Array,
) -> tuple[Array, Array, Array]:
    """Gradients by the strict sum: of these queries, and of all keys and values."""
    past = slots_before(start, query.shape[2], key.shape[2])
    scores = jnp.where(past, _inner(query, key), _MASKED)
    weights = jnp.exp(scores - log_normaliser[..., None])
    d_scores = weights * (_inner(d_total, value) - mean[..., None])
    return (
        _combine(d_scores, key),
        _combine_queries(d_scores, query),
        _combine_queries(weights, d_total),
    )


def _own_inner(x: Array, y: Array) -> Array:
    return jnp.sum(x.astype(jnp.float32) * y.astype(jnp.float32), axis=-1)


class _Segment(NamedTuple):
    """Queries ``[start, stop)``, taken ``block`` at a time, against keys ``[0, stop)``."""

    start: int
    stop: int
    block: int


def _block(length: int) -> int:
    return min(BLOCK, length)


def _segments(length: int) -> list[_Segment]:
    """Cuts a padded length into at most MAX_SEGMENTS runs of whole blocks."""
    block = _block(length)
    num_blocks = length // block
    step = -(-num_blocks // MAX_SEGMENTS) * block
    return [_Segment(a, min(a + step, length), block) for a in range(0, length, step)]


def _over_blocks(
    work: Callable[..., tuple[Array, ...]],
    segment: _Segment,
    *arrays: Array,
    totals: Sequence[Array] = (),
) -> list[Array]:
    """Applies ``work(start, *rows)`` to each block of a segment.

    The last results are added to the first rows of ``totals``, in place as XLA compiles it; the
    others are joined along the rows.
    """
    rows = [x[:, :, segment.start : segment.stop] for x in arrays]
    num_blocks = (segment.stop - segment.start) // segment.block

    def add(totals: Sequence[Array], block: Sequence[Array]) -> tuple[list[Array], list[Array]]:
        results = list(work(*block))
        parts = [results.pop() for _ in totals][::-1]
        return [_add_first_rows(a, b) for a, b in zip(totals, parts, strict=True)], results

    if num_blocks == 1:
        totals, joined = add(totals, (jnp.int32(segment.start), *rows))
        return [*joined, *totals]

    def split(x: Array) -> Array:
        shape = (*x.shape[:2], num_blocks, segment.block, *x.shape[3:])
        return jnp.moveaxis(x.reshape(shape), 2, 0)

    def join(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 2)
        return x.reshape(*x.shape[:2], -1, *x.shape[4:])

    starts = segment.start + segment.block * jnp.arange(num_blocks)
    totals, joined = jax.lax.scan(add, list(totals), (starts, *map(split, rows)))
    return [*map(join, joined), *totals]


def _add_first_rows(total: Array, part: Array) -> Array:
    rows = total[:, :, : part.shape[2]] + part
    return jax.lax.dynamic_update_slice(total, rows, (0, 0, 0, 0))
