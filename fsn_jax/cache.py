"""Caches of generation: what the layers of a model keep of the tokens they have seen."""

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from fsn_jax.causal import attention_weights_cached, weighted_sum


@flax.struct.dataclass
class LayerCache:
    """What a layer keeps of the tokens it has seen: slot u holds position u.

    Tokens past its last slot cannot be kept: what is computed for them is NaN. Batch and heads are
    one axis, and the slots of the keys the last: the layout that the products take as it is, so
    that XLA writes a token in place and copies nothing.

    Attributes:
      key: ``[B H, E, C]``.
      value: ``[B H, C, G]``. For the frustrated coupling these are the powers of the h-th block of
        phases, real and imaginary parts side by side, which all heads and delays share.
    """

    key: Array
    value: Array

    @property
    def capacity(self) -> int:
        """C, how many tokens there is room for."""
        return self.value.shape[1]


def _put(cache: Array, new: Array, position: Array, axis: int) -> Array:
    new = new.reshape(cache.shape[0], *new.shape[2:]).astype(cache.dtype)
    return jax.lax.dynamic_update_slice_in_dim(cache, new, position, axis=axis)


def extend_weights(
    query: Array, key: Array, value: Array, cache: LayerCache, position: Array
) -> tuple[Float[Array, "B H S C"], LayerCache]:
    """Writes S new keys and values at ``position``; weighs all that the cache then holds.

    Queries and keys are ``[B, H, S, E]``, values ``[B, H, S, G]``, ``position`` an int32 scalar.
    """
    cache = LayerCache(
        _put(cache.key, key.swapaxes(2, 3), position, 2), _put(cache.value, value, position, 1)
    )
    weights = attention_weights_cached(query, cache.key, position)
    # A slice that does not fit is moved to where it does: silently, over tokens of before.
    fits = position + query.shape[2] <= cache.capacity
    return jnp.where(fits, weights, jnp.nan), cache


def extend_sum(
    query: Array, key: Array, value: Array, cache: LayerCache, position: Array
) -> tuple[Float[Array, "B H S G"], LayerCache]:
    """The weighted sum, own value included, for S new tokens; arrays as for ``extend_weights``.

    The values of the cache are ``[B, H, C, G]``.
    """
    weights, cache = extend_weights(query, key, value, cache, position)
    return weighted_sum(weights, cache.value), cache


@flax.struct.dataclass
class Cache:
    """State of generation, of either model.

    Attributes:
      layers: one ``LayerCache`` a block.
      position: number of tokens seen, int32 scalar.
    """

    layers: Sequence[LayerCache]
    position: Array
