"""The shell of both language models: embedding, blocks one after the other, readout."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fsn_jax.cache import Cache
from fsn_jax.documents import check_integers, check_rows
from fsn_jax.fields import ConfigError

DETERMINISTIC_ARGUMENT = 4
"""Index of ``deterministic`` in a block's ``__call__``, which ``nn.remat`` must know as static."""


def check_kind(model: nn.Module, config: object, kind: type) -> None:
    """Checks that a model was given a config of its own kind.

    Raises:
      ConfigError: it was not.
    """
    if not isinstance(config, kind):
        raise ConfigError(
            f"{type(model).__name__}.config must be of class {kind.__name__}; got "
            f"{type(config).__name__}"
        )


class LanguageModel(nn.Module):
    """A stack of blocks between an embedding and a readout.

    A model sets ``blocks`` and defines ``_embed`` (tokens to states) and ``read_out`` (states to
    logits).
    """

    def __call__(
        self,
        tokens: Int[Array, "B L"],
        *,
        segment_ids: Int[Array, "B L"] | None = None,
        positions: Int[Array, "*B L"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "B L V"]:
        """Computes the logits, float32.

        Args:
          tokens: token ids; one that is not in the vocabulary makes its row NaN from there on, and
            may do so before.
          segment_ids: tokens see those of their own segment alone, so that documents can be packed
            into one row. Padding is a segment of its own, of any ids in the vocabulary. None: all
            are in one.
          positions: of the tokens, for the rotary drift, ``[L]`` or ``[B, L]``; None: 0, 1, 2, ...
            Scores depend on differences of positions alone.
          deterministic: False in training with dropout, which needs ``rngs={"dropout": key}``.

        Raises:
          ValueError: tokens, segments or positions are of another shape, or no whole numbers.
        """
        states = self.states(
            tokens, segment_ids=segment_ids, positions=positions, deterministic=deterministic
        )
        return self.read_out(states)

    def states(
        self,
        tokens: Int[Array, "B L"],
        *,
        segment_ids: Int[Array, "B L"] | None = None,
        positions: Int[Array, "*B L"] | None = None,
        deterministic: bool = True,
    ) -> Float[Array, "B L D"]:
        """Computes the states after the last block, float32: an FSN's phases, in radians.

        Arguments and errors as for ``__call__``.
        """
        check_integers("tokens", tokens)
        check_rows(tokens.shape, segment_ids, positions)
        state = self._embed(tokens, deterministic)
        for block in self.blocks:
            state = block(state, segment_ids, positions, deterministic)
        return state

    def extend(
        self,
        tokens: Int[Array, "B S"],
        cache: Cache,
        *,
        segment_ids: Int[Array, "B S"] | None = None,
        positions: Int[Array, "*B S"] | None = None,
    ) -> tuple[Float[Array, "B S V"], Cache]:
        """Computes the logits of S tokens that follow those in the cache; extends the cache.

        They are NaN for all S tokens if the cache has not room left for all of them.

        Args:
          tokens: token ids.
          cache: of the tokens before, from ``empty_cache`` or an earlier call.
          segment_ids: as of ``__call__``; for a cache made with ``segments=True``.
          positions: as of ``__call__``; None: they count on from the cache's.

        Raises:
          ValueError: there are more tokens than the whole cache has room for, the cache is for
            another number of rows, or one of the arguments is of another shape.
        """
        states, cache = self.extend_states(
            tokens, cache, segment_ids=segment_ids, positions=positions
        )
        return self.read_out(states), cache

    def extend_states(
        self,
        tokens: Int[Array, "B S"],
        cache: Cache,
        *,
        segment_ids: Int[Array, "B S"] | None = None,
        positions: Int[Array, "*B S"] | None = None,
    ) -> tuple[Float[Array, "B S D"], Cache]:
        """Computes the states after the last block; arguments and errors as for ``extend``.

        A prompt needs the logits of its last token alone: ``read_out`` gives them.
        """
        check_integers("tokens", tokens)
        check_rows(tokens.shape, segment_ids, positions)
        state = self._embed(tokens, True)
        layers = []
        for block, layer in zip(self.blocks, cache.layers, strict=True):
            state, layer = block.extend(state, layer, cache.position, segment_ids, positions)
            layers.append(layer)
        return state, Cache(layers, cache.position + tokens.shape[1])

    def empty_cache(self, batch: int, capacity: int, *, segments: bool = False) -> Cache:
        """Returns an empty cache for ``capacity`` tokens of each of ``batch`` sequences.

        Args:
          batch: B.
          capacity: C.
          segments: whether ``extend`` will be given ``segment_ids``.
        """
        layers = [block.empty_cache(batch, capacity, segments) for block in self.blocks]
        return Cache(layers, jnp.zeros((), jnp.int32))

    def _embed(self, tokens: Array, deterministic: bool) -> Array:
        raise NotImplementedError

    def read_out(self, states: Float[Array, "B L D"]) -> Float[Array, "B L V"]:
        """Computes the logits, float32, of states after the last block."""
        raise NotImplementedError
