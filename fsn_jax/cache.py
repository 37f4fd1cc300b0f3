"""Caches of generation, and attention over them."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from fsn_jax.kernels.xla import MASKED, slots_before


@flax.struct.dataclass
class LayerCache:
    """Keys and values of the tokens that a layer has seen: slot u holds position u.

    The result for tokens that do not all fit is NaN, for all of them. Batch and heads share one
    axis, and slots are the last axis of the keys: the matrix products take this layout as it is, so
    XLA writes a token in place and copies nothing.

    Attributes:
      key: ``[B H, E, C]``.
      value: ``[B H, C, G]``. For the frustrated coupling these are the powers of the h-th block of
        phases, real and imaginary parts side by side, which all heads and delays share.
      segment_ids: int32 ``[B, C]``, or None where all tokens of a row are in one segment.
      state: float32 ``[B, C, D]``, the layer's inputs, if its tokens also see the input of the
        token before; else None.
    """

    key: Array
    value: Array
    segment_ids: Array | None = None
    state: Array | None = None

    @property
    def capacity(self) -> int:
        """C, number of tokens that fit."""
        return self.value.shape[1]

    def check_room(self, batch: int, num_tokens: int, num_heads: int) -> None:
        """Checks that tokens ``[B, S]`` of a layer with H heads fit into an empty cache.

        Raises:
          ValueError: they do not.
        """
        sequences = self.value.shape[0] // num_heads
        if batch != sequences:
            raise ValueError(f"the cache is for {sequences} sequences; got {batch}")
        if num_tokens > self.capacity:
            raise ValueError(f"{num_tokens} tokens do not fit into a cache for {self.capacity}")

    def visible(
        self, end: Int[Array, ""], num_tokens: int, segment_ids: Int[Array, "B S"] | None
    ) -> Bool[Array, "*BH S C"]:
        """Returns which slots tokens see, ``[S, C]`` or with segments ``[B, 1, S, C]``.

        Args:
          end: the first slot that the first token does not see; one more for each token after it.
          num_tokens: S.
          segment_ids: of the tokens.
        """
        slots = slots_before(end, num_tokens, self.capacity)
        if self.segment_ids is None or segment_ids is None:
            return slots
        same = segment_ids[:, None, :, None] == self.segment_ids[:, None, None]
        return slots[None, None] & same

    def with_segments(
        self, position: Int[Array, ""], segment_ids: Int[Array, "B S"] | None
    ) -> "LayerCache":
        """Returns the cache with the segments of S tokens at ``position`` and on.

        Raises:
          ValueError: there are segments and the cache has no room for them, or the reverse.
        """
        if (segment_ids is None) != (self.segment_ids is None):
            raise ValueError(
                "segment_ids belong to a cache that holds them: empty_cache(..., segments=True)"
            )
        if self.segment_ids is None or segment_ids is None:
            return self
        new = segment_ids.astype(self.segment_ids.dtype)
        segments = jax.lax.dynamic_update_slice_in_dim(self.segment_ids, new, position, axis=1)
        return dataclasses.replace(self, segment_ids=segments)

    def before(
        self, position: Int[Array, ""], num_tokens: int, segment_ids: Int[Array, "B S"] | None
    ) -> Float[Array, "B S D"]:
        """Returns the states of the tokens before those at ``position`` and on; see ``shifted``.

        The cache holds the segments of the tokens themselves.

        Raises:
          ValueError: the cache holds no states.
        """
        if self.state is None:
            raise ValueError("this cache holds no states")
        rows = jnp.pad(self.state, ((0, 0), (1, 0), (0, 0)))
        states = jax.lax.dynamic_slice_in_dim(rows, position, num_tokens, axis=1)
        if segment_ids is None or self.segment_ids is None:
            return states
        ids = jnp.pad(self.segment_ids, ((0, 0), (1, 0)))
        same = segment_ids == jax.lax.dynamic_slice_in_dim(ids, position, num_tokens, axis=1)
        return jnp.where(same[..., None], states, 0.0)


def shifted(
    states: Float[Array, "B L D"], segment_ids: Int[Array, "B L"] | None
) -> Float[Array, "B L D"]:
    """Returns the state of the token before each token; zero for the first of a segment."""
    before = jnp.pad(states[:, :-1], ((0, 0), (1, 0), (0, 0)))
    if segment_ids is None:
        return before
    same = segment_ids[:, 1:] == segment_ids[:, :-1]
    same = jnp.pad(same, ((0, 0), (1, 0)))
    return jnp.where(same[..., None], before, 0.0)


def empty_layer_cache(
    batch: int,
    capacity: int,
    num_heads: int,
    widths: tuple[int, int],
    dtype: str,
    *,
    segments: bool = False,
) -> LayerCache:
    """Returns an empty cache for ``capacity`` tokens of each of ``batch`` sequences.

    Args:
      batch: B.
      capacity: C.
      num_heads: H.
      widths: E of the keys and G of the values.
      dtype: of both.
      segments: whether it holds ``segment_ids`` too.
    """
    key = jnp.zeros((batch * num_heads, widths[0], capacity), dtype)
    value = jnp.zeros((batch * num_heads, capacity, widths[1]), dtype)
    return LayerCache(key, value, jnp.zeros((batch, capacity), jnp.int32) if segments else None)


def _put(cache: Array, new: Array, position: Array, axis: int) -> Array:
    new = new.reshape(cache.shape[0], *new.shape[2:]).astype(cache.dtype)
    return jax.lax.dynamic_update_slice_in_dim(cache, new, position, axis=axis)


class CachedAttention(NamedTuple):
    """Attention of S tokens over a cache that holds them.

    Attributes:
      weights: ``[B, H, S, C]``, NaN if the tokens did not all fit.
      visible: which slots the tokens see, as ``LayerCache.visible`` returns it.
      cache: with the tokens.
    """

    weights: Array
    visible: Array
    cache: LayerCache


def extend_weights(
    query: Array,
    key: Array,
    value: Array,
    cache: LayerCache,
    position: Array,
    segment_ids: Array | None = None,
) -> CachedAttention:
    """Writes S new keys and values at ``position`` and returns attention over the cache.

    Queries and keys are ``[B, H, S, E]``, values ``[B, H, S, G]``, ``position`` an int32 scalar,
    ``segment_ids`` ``[B, S]``: those of the tokens, which the cache holds (``with_segments``).
    """
    cache = dataclasses.replace(
        cache,
        key=_put(cache.key, key.swapaxes(2, 3), position, 2),
        value=_put(cache.value, value, position, 1),
    )
    visible = cache.visible(position + 1, query.shape[2], segment_ids)
    weights = attention_weights_cached(query, cache.key, visible)
    # JAX silently moves a slice that does not fit, and would overwrite earlier tokens.
    fits = position + query.shape[2] <= cache.capacity
    return CachedAttention(jnp.where(fits, weights, jnp.nan), visible, cache)


def attention_weights_cached(
    query: Float[Array, "B H S E"],
    key: Float[Array, "BH E C"],
    visible: Bool[Array, "*BH S C"],
) -> Float[Array, "B H S C"]:
    """Computes the attention weights of S queries over the slots of a cache that they see."""
    scores = jnp.where(visible, _product_with_cache(query, key), MASKED)
    return jax.nn.softmax(scores, axis=-1)  # float32 whatever the inputs


def weighted_sum(
    weights: Float[Array, "B H S C"], value: Float[Array, "BH C G"]
) -> Float[Array, "B H S G"]:
    """Computes ``sum_u weights[t, u] value[u]`` over the slots of a cache, float32."""
    return _product_with_cache(weights.astype(value.dtype), value)


def _product_with_cache(x: Array, y: Array) -> Array:
    """``x @ y`` of each head, ``[B, H, S, K]`` and ``[B H, K, N]``, the sum in float32."""
    flat = x.reshape(y.shape[0], *x.shape[2:])
    product = jnp.einsum("hij,hjk->hik", flat, y, preferred_element_type=jnp.float32)
    return product.reshape(*x.shape[:3], y.shape[2])


@flax.struct.dataclass
class Cache:
    """Cache of a language model: those of its layers, and the position.

    Attributes:
      layers: one ``LayerCache`` a block.
      position: number of tokens seen, int32 scalar.
    """

    layers: Sequence[LayerCache]
    position: Array
