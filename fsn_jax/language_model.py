"""The shell of both language models: embedding, blocks one after the other, readout."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fsn_jax.cache import Cache


class LanguageModel(nn.Module):
    """A stack of blocks between an embedding and a readout.

    A model sets ``blocks`` and defines ``_embed`` (tokens to states) and ``_read_out`` (states to
    logits).
    """

    def __call__(self, tokens: Int[Array, "B L"]) -> Float[Array, "B L V"]:
        """Logits, float32, before any softmax."""
        state = self._embed(tokens)
        for block in self.blocks:
            state = block(state)
        return self._read_out(state)

    def extend(
        self, tokens: Int[Array, "B S"], cache: Cache
    ) -> tuple[Float[Array, "B S V"], Cache]:
        """Logits of S tokens that follow those in the cache, and the cache with them in it.

        They are NaN for tokens that the cache has no room for.
        """
        state = self._embed(tokens)
        layers = []
        for block, layer in zip(self.blocks, cache.layers, strict=True):
            state, layer = block.extend(state, layer, cache.position)
            layers.append(layer)
        return self._read_out(state), Cache(layers, cache.position + tokens.shape[1])

    def empty_cache(self, batch: int, capacity: int) -> Cache:
        """A cache for up to ``capacity`` tokens of each of ``batch`` sequences."""
        layers = [block.attention.empty_cache(batch, capacity) for block in self.blocks]
        return Cache(layers, jnp.zeros((), jnp.int32))

    def _embed(self, tokens: Array) -> Array:
        raise NotImplementedError

    def _read_out(self, state: Array) -> Array:
        raise NotImplementedError
