"""Causal softmax attention over folded values: the one weighted sum that every layer here runs.

``A[t, u] = softmax_u(q_t . k_u)`` over ``u <= t``. The frustrated coupling needs the sum over the
strict past, ``sum_{u < t} A[t, u] v_u``, and the weight ``A[t, t]`` apart from it; the transformer
needs the whole sum. Queries carry the temperature.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

_MASKED = -1e30  # finite: exp gives 0 without the NaN that minus infinity leaves in the gradient


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


def _scores(query: Array, key: Array) -> Array:
    return jnp.einsum("bhte,bhue->bhtu", query, key, preferred_element_type=jnp.float32)


def _softmax(scores: Array, causal: Bool[Array, "S C"] | np.ndarray) -> Array:
    # float32 whatever the inputs: the normaliser sums up to L terms.
    return jax.nn.softmax(jnp.where(causal[None, None], scores, _MASKED), axis=-1)


def attention_weights(
    query: Float[Array, "B H L E"], key: Float[Array, "B H L E"]
) -> Float[Array, "B H L L"]:
    """The matrix ``A`` itself: rows sum to one over ``u <= t``."""
    length = query.shape[2]
    return _softmax(_scores(query, key), np.tri(length, dtype=bool))


def causal_sum(
    query: Float[Array, "B H L E"],
    key: Float[Array, "B H L E"],
    value: Float[Array, "B H L G"],
    *,
    include_self: bool,
) -> CausalSum:
    """The weighted sum over ``u <= t`` (``include_self``) or ``u < t``.

    The self weight stays in the normaliser either way.
    """
    length = query.shape[2]
    return _weighted_sum(
        _softmax(_scores(query, key), np.tri(length, dtype=bool)),
        value,
        own=np.eye(length, dtype=bool),
        include_self=include_self,
    )


def causal_sum_cached(
    query: Float[Array, "B H S E"],
    key: Float[Array, "B H C E"],
    value: Float[Array, "B H C G"],
    position: Int[Array, ""],
    *,
    include_self: bool,
) -> CausalSum:
    """As ``causal_sum`` for the S queries at ``position`` and on, against a cache of C slots.

    Slot u of the cache holds position u; slots after a query's own are masked.
    """
    own_slot = position + jnp.arange(query.shape[2])[:, None]
    slot = jnp.arange(key.shape[2])[None, :]
    weights = _softmax(_scores(query, key), slot <= own_slot)
    return _weighted_sum(weights, value, own=slot == own_slot, include_self=include_self)


def _weighted_sum(
    weights: Float[Array, "B H S C"],
    value: Float[Array, "B H C G"],
    *,
    own: Bool[Array, "S C"] | np.ndarray,
    include_self: bool,
) -> CausalSum:
    own = own[None, None]
    self_weight = jnp.where(own, weights, 0).sum(axis=-1)
    summed = weights if include_self else jnp.where(own, 0, weights)
    total = jnp.einsum(
        "bhtu,bhug->bhtg",
        summed.astype(value.dtype),
        value,
        preferred_element_type=jnp.float32,
    )
    return CausalSum(total, self_weight)
