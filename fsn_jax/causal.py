"""Causal softmax attention over values: the weighted sum of the transformer and the base layer.

``A[t, u] = softmax_u(q_t . k_u)`` over ``u <= t``. The frustrated coupling needs the sum over the
strict past, ``sum_{u < t} A[t, u] v_u``, and the weight ``A[t, t]`` apart from it; the transformer
needs the whole sum. Queries carry the temperature.

``causal_sum`` differentiates by computing the weights again; ``fsn_jax.kernels`` has its platforms.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fsn_jax import kernels
from fsn_jax.documents import check_rows
from fsn_jax.fields import Implementation
from fsn_jax.kernels import choice
from fsn_jax.kernels.xla import MASKED, combine, inner, own_inner
from fsn_jax.recompute import match_varying_axes
from fsn_jax.reverse_mode import reverse_mode_only


class CausalSum(NamedTuple):
    """A causal weighted sum.

    Attributes:
      total: ``sum_u A[t, u] v_u`` in the dtype of the values, ``[B, H, L, G]``.
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
    """The matrix ``A`` itself: rows sum to one over ``u <= t`` in the segment of t.

    Raises:
      ValueError: ``segment_ids`` is not ``[B, L]``, or no whole numbers.
    """
    check_rows((query.shape[0], query.shape[2]), segment_ids, None)
    seen = np.tri(query.shape[2], dtype=bool)
    if segment_ids is not None:
        seen = seen[None, None] & (segment_ids[:, None, :, None] == segment_ids[:, None, None])
    # float32 whatever the inputs: the normalizer sums up to L terms.
    return jax.nn.softmax(jnp.where(seen, inner(query, key), MASKED), axis=-1)


def causal_sum(
    query: Float[Array, "B H L E"],
    key: Float[Array, "B H L E"],
    value: Float[Array, "B H L G"],
    segment_ids: Int[Array, "B L"] | None = None,
    *,
    include_self: bool,
    implementation: Implementation = "auto",
) -> CausalSum:
    """Computes the weighted sum over ``u <= t`` (``include_self``) or ``u < t``.

    The weight of the token itself is in the normalizer either way.

    Args:
      query: float32 or bfloat16; sums and softmax are float32 either way.
      key: of the same dtype.
      value: of the same dtype.
      segment_ids: tokens attend to those of their own segment; None: all are in one.
      include_self: whether a token's own value is in its sum.
      implementation: ``reference`` has the whole matrix and all derivatives; the others have those
        of reverse mode and raise TypeError for others. ``xla`` goes block by block. ``pallas`` is a
        fused kernel for GPUs and TPUs (interpreted, slowly, on a CPU). ``auto`` takes the faster of
        the two on this machine's GPU or TPU where no compiler has to divide the program: on one
        device, or in ``shard_map``. It takes ``xla`` where several processes run one program, since
        they might not agree.

    Raises:
      ValueError: ``segment_ids`` is not ``[B, L]``, or no whole numbers.
    """
    check_rows((query.shape[0], query.shape[2]), segment_ids, None)
    if 0 in query.shape[:3]:
        implementation = "reference"
    if implementation == "auto":
        implementation = choice.of_auto(query, value.shape[3], segments=segment_ids is not None)
    if implementation == "reference":
        return _causal_sum_reference(query, key, value, segment_ids, include_self=include_self)
    segments = None if segment_ids is None else segment_ids[:, None]
    query, key, value = reverse_mode_only(match_varying_axes((query, key, value)))
    return _causal_sum(query, key, value, segments, include_self, implementation)


def _causal_sum_reference(
    query: Array, key: Array, value: Array, segment_ids: Array | None, *, include_self: bool
) -> CausalSum:
    weights = attention_weights(query, key, segment_ids)
    own = np.eye(query.shape[2], dtype=bool)
    self_weight = jnp.where(own, weights, 0).sum(axis=-1)
    summed = weights if include_self else jnp.where(own, 0, weights)
    return CausalSum(combine(summed, value).astype(value.dtype), self_weight)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _causal_sum(
    query: Array,
    key: Array,
    value: Array,
    segments: Array | None,
    include_self: bool,
    implementation: Implementation,
) -> CausalSum:
    return _causal_sum_forward(query, key, value, segments, include_self, implementation)[0]


def _causal_sum_forward(
    query: Array,
    key: Array,
    value: Array,
    segments: Array | None,
    include_self: bool,
    implementation: Implementation,
) -> tuple[CausalSum, tuple[Array | None, ...]]:
    total, self_weight, log_normalizer = kernels.forward(
        query, key, value, segments, implementation=implementation
    )
    if include_self:
        total = (total + self_weight[..., None] * value).astype(value.dtype)
    residuals = (query, key, value, segments, total, self_weight, log_normalizer)
    return CausalSum(total, self_weight), residuals


def _causal_sum_backward(
    include_self: bool,
    implementation: Implementation,
    residuals: tuple[Any, ...],
    cotangent: CausalSum,
) -> tuple[Any, ...]:
    query, key, value, segments, total, self_weight, log_normalizer = residuals
    d_total, d_self = cotangent
    mean = own_inner(d_total, total) + d_self * self_weight
    d_own = d_self + own_inner(d_total, value) if include_self else d_self
    d_own_score = self_weight * (d_own - mean)
    d_query, d_key, d_value = kernels.backward(
        query,
        key,
        value,
        log_normalizer,
        d_total,
        mean,
        d_own_score,
        segments,
        implementation=implementation,
    )
    if include_self:
        d_value = (d_value + self_weight[..., None] * d_total).astype(value.dtype)
    return d_query, d_key, d_value, None


_causal_sum.defvjp(_causal_sum_forward, _causal_sum_backward)
