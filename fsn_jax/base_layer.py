"""The base layer of synchronization attention, and what all phase layers share.

``KuramotoAttention`` is the unfrustrated base layer (arXiv 2606.11585), ``LinearValueAttention`` an
ablation. Both map ``theta[B, L, N]`` to ``dtheta[B, L, N]``, in radians, and read N from their
input; ``extend`` is the same computation for tokens that follow a cache.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fsn_jax.cache import LayerCache, empty_layer_cache, extend_weights, weighted_sum
from fsn_jax.causal import attention_weights, causal_sum, merge_heads, split_heads
from fsn_jax.dense import PhasorDense
from fsn_jax.documents import check_rows
from fsn_jax.fields import ScoreFields, documented, setting, shared_settings
from fsn_jax.score import PhaseScore, drift_frequencies
from fsn_jax.torus import Complex, seen_from, times, token_phasor, token_rotary


def attention_entropy(weights: Float[Array, "*shape L"]) -> Float[Array, "*shape"]:
    """Computes the entropy of each row of attention weights, in nats."""
    return -jnp.sum(jax.scipy.special.xlogy(weights, weights), axis=-1)


class PhaseAttention(ScoreFields, nn.Module):
    """Base class of the phase layers: score, full and cached passes, diagnostics.

    A layer defines its field: for queries and keys of whole sequences, ``_field``, and for
    attention weights over a cache that keeps its ``_values``, ``_field_of_weights``.
    """

    def setup(self) -> None:
        self.scores = PhaseScore(**shared_settings(self, PhaseScore), name="score")

    def __call__(
        self,
        theta: Float[Array, "B L N"],
        *,
        segment_ids: Int[Array, "B L"] | None = None,
        positions: Int[Array, "*B L"] | None = None,
    ) -> Float[Array, "B L N"]:
        """Computes the update of the phases, in radians, float32.

        Differentiable in reverse mode. Forward mode (``jax.jvp``, ``jax.hessian``) needs
        ``implementation="reference"``; the other paths raise TypeError and say so.

        Args:
          theta: phases in radians, below about 1e4: float32 tells angles of 1e6 apart by 0.06, and
            far beyond that their phasors leave the circle.
          segment_ids: tokens couple to those of their own segment; None: all are in one.
          positions: of the tokens, for the drift, ``[L]`` or ``[B, L]``; None: 0, 1, 2, ...

        Raises:
          ValueError: ``theta`` is not ``[B, L, N]``, or segments or positions do not fit it.
          ConfigError: ``num_heads`` does not divide N.
        """
        return self.field(theta, segment_ids=segment_ids, positions=positions).im

    def field(
        self,
        theta: Float[Array, "B L N"],
        *,
        segment_ids: Int[Array, "B L"] | None = None,
        positions: Int[Array, "*B L"] | None = None,
    ) -> Complex:
        """Computes the local field of every phase, ``[B, L, N]``, seen from that phase.

        ``im`` is the torque, the update of the phases in radians; ``re`` is the coherence of a
        phase with its field. Arguments as for ``__call__``.
        """
        z = token_phasor(theta)
        query, key = self._score(z, z.re.shape[1], None, segment_ids, positions)
        if self.is_mutable_collection("diagnostics") and not self.is_initializing():
            entropy = attention_entropy(attention_weights(query, key, segment_ids))
            self.sow("diagnostics", "attention_entropy", entropy)
        return self._field(theta, z, query, key, segment_ids)

    def extend(
        self,
        theta: Float[Array, "B S N"],
        cache: LayerCache,
        position: Int[Array, ""],
        *,
        segment_ids: Int[Array, "B S"] | None = None,
        positions: Int[Array, "*B S"] | None = None,
    ) -> tuple[Float[Array, "B S N"], LayerCache]:
        """Applies ``__call__`` to S tokens at ``position`` and on, after those in the cache."""
        field, cache = self.extend_field(
            theta, cache, position, segment_ids=segment_ids, positions=positions
        )
        return field.im, cache

    def extend_field(
        self,
        theta: Float[Array, "B S N"],
        cache: LayerCache,
        position: Int[Array, ""],
        *,
        segment_ids: Int[Array, "B S"] | None = None,
        positions: Int[Array, "*B S"] | None = None,
    ) -> tuple[Complex, LayerCache]:
        """Applies ``field`` to S tokens at ``position`` and on, after those in the cache."""
        z = token_phasor(theta)
        cache.check_room(theta.shape[0], theta.shape[1], self.num_heads)
        query, key = self._score(z, cache.capacity, position, segment_ids, positions)
        values, cache = self._values(z), cache.with_segments(position, segment_ids)
        seen = extend_weights(query, key, values, cache, position, segment_ids)
        field = self._field_of_weights(z, seen.weights, seen.cache.value, seen.visible)
        return field, seen.cache

    def weights(
        self,
        theta: Float[Array, "B L N"],
        *,
        segment_ids: Int[Array, "B L"] | None = None,
        positions: Int[Array, "*B L"] | None = None,
    ) -> Float[Array, "B H L L"]:
        """Returns the attention weights ``A``, for inspection: ``__call__`` does not form them."""
        z = token_phasor(theta)
        query, key = self._score(z, z.re.shape[1], None, segment_ids, positions)
        return attention_weights(query, key, segment_ids)

    def empty_cache(
        self, batch: int, capacity: int, num_phases: int, *, segments: bool = False
    ) -> LayerCache:
        """Returns an empty cache for ``capacity`` tokens of each of ``batch`` sequences.

        Args:
          batch: B.
          capacity: C.
          num_phases: N.
          segments: whether it holds ``segment_ids`` too.

        Raises:
          ConfigError: ``num_heads`` does not divide N.
        """
        self.check_width(num_phases)
        widths = (2 * self.num_score_pairs(num_phases), self._value_width(num_phases))
        return empty_layer_cache(
            batch, capacity, self.num_heads, widths, self.dtype, segments=segments
        )

    def _score(
        self,
        z: Complex,
        capacity: int,
        position: Array | None,
        segment_ids: Array | None,
        positions: Array | None,
    ) -> tuple[Array, Array]:
        """Returns queries and keys of tokens at ``position`` (None: 0) and on."""
        *rows, num_phases = z.re.shape
        check_rows(tuple(rows), segment_ids, positions)
        self.check_width(num_phases)
        frequencies = drift_frequencies(self, num_phases)
        drift = token_rotary(frequencies, rows[1], capacity, position, positions)
        return self.scores(z, drift)

    def _heads(self, z: Complex) -> Complex:
        return Complex(split_heads(z.re, self.num_heads), split_heads(z.im, self.num_heads))

    def _field(
        self, theta: Array, z: Complex, query: Array, key: Array, segment_ids: Array | None
    ) -> Complex:
        raise NotImplementedError

    def _values(self, z: Complex) -> Array:
        raise NotImplementedError

    def _field_of_weights(
        self, z: Complex, weights: Array, values: Array, visible: Array
    ) -> Complex:
        raise NotImplementedError

    def _value_width(self, num_phases: int) -> int:
        raise NotImplementedError


SOFTPLUS_FLOOR = 0.01
"""What a positive coefficient is in place of zero: no parameter gives a softplus of zero."""


def softplus_inverse(x: np.ndarray) -> np.ndarray:
    """Inverts the softplus elementwise, float64; of zero it makes ``SOFTPLUS_FLOOR``."""
    x = np.where(x > 0, x, SOFTPLUS_FLOOR).astype(np.float64)
    return x + np.log(-np.expm1(-x))


class _SummedAttention(PhaseAttention):
    """A phase layer whose heads sum one value a token, its own included."""

    def _field(
        self, theta: Array, z: Complex, query: Array, key: Array, segment_ids: Array | None
    ) -> Complex:
        del theta  # its phasors suffice
        summed = causal_sum(
            query,
            key,
            self._values(z),
            segment_ids,
            include_self=True,
            implementation=self.implementation,
        )
        return self._field_of_sum(z, summed.total)

    def _field_of_weights(
        self, z: Complex, weights: Array, values: Array, visible: Array
    ) -> Complex:
        del visible  # the weights are zero elsewhere
        return self._field_of_sum(z, weighted_sum(weights, values))

    def _field_of_sum(self, z: Complex, total: Array) -> Complex:
        raise NotImplementedError


@documented
class KuramotoAttention(_SummedAttention):
    """The base layer: ``dtheta_t = g * sum_u A[t, u] sin(theta_u - theta_t)``, g > 0 learned.

    Written from its own equation; ``FrustratedAttention`` with one harmonic, no delay, one head a
    phase, a real positive kernel, and neither score angles nor similarity heads is the same layer.
    """

    kernel_scale: float = setting(0.5, "initial gain g", above=0)
    score_angles: bool = setting(
        False, "whether a gated score has angles too, which makes it a frustrated one"
    )
    similarity_heads: int = setting(0, "heads whose score has no drift, so no positions", least=0)

    def _values(self, z: Complex) -> Array:
        return jnp.concatenate(self._heads(z), axis=-1).astype(self.dtype)

    @nn.compact
    def _field_of_sum(self, z: Complex, total: Array) -> Complex:
        mean = Complex(*(merge_heads(part) for part in jnp.split(total, 2, axis=-1)))
        initial = softplus_inverse(np.full(z.re.shape[-1], self.kernel_scale))
        gain = self.param("gain", lambda _: jnp.asarray(initial, jnp.float32))
        gain = jax.nn.softplus(gain.astype(jnp.float32))
        return times(gain[None, None], seen_from(z, mean))

    def _value_width(self, num_phases: int) -> int:
        return 2 * num_phases // self.num_heads


@documented
class LinearValueAttention(_SummedAttention):
    """An ablation: dense values and an output matrix, as in a transformer, in place of a kernel.

    Dense values have no coherence: the real part of the field is zero.
    """

    def _values(self, z: Complex) -> Array:
        return split_heads(self._dense(z, None), self.num_heads)

    def _field_of_sum(self, z: Complex, total: Array) -> Complex:
        update = self._dense(z, total).astype(jnp.float32)
        return Complex(jnp.zeros_like(update), update)

    @nn.compact
    def _dense(self, z: Complex, total: Array | None) -> Array:
        """Returns the values of tokens, or the output for their sums ``[B, H, L, P]``."""
        num_phases = z.re.shape[-1]
        value = PhasorDense(**shared_settings(self, PhasorDense), outputs=num_phases, name="value")
        output = nn.Dense(num_phases, use_bias=False, dtype=jnp.dtype(self.dtype), name="output")
        return value(z) if total is None else output(merge_heads(total))

    def _value_width(self, num_phases: int) -> int:
        return num_phases // self.num_heads
