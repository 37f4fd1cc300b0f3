"""Scores, which select the tokens that couple.

The score of tokens t and u in head h is an inner product of complex queries and keys, turned by
their distance; attention is its softmax over ``u <= t``::

    s[h, t, u] = beta_h Re sum_p q[h, t, p] conj(k[h, u, p]) exp(i (t - u) omega_p)

With learned gates (``score="gated"``) queries are gated phasors and keys are phasors, so that

    s[h, t, u] = beta_h sum_n g[h, n] cos(theta[t, n] - theta[u, n] + (t - u) omega_n - a[h, n]):

phase coherence with rotary drift, invariant under a global rotation of the phases. A frustration
angle ``a = k omega`` makes the score largest k tokens back; without angles (``score_angles=False``)
``a = 0``. Source: arXiv 2606.18694 and 2606.11585, as reconstructed in docs/model.md; the angles
are ours.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jaxtyping import Array, Float

from fsn_jax.causal import split_heads
from fsn_jax.dense import PhasorDense
from fsn_jax.fields import ScoreFields, documented, shared_settings
from fsn_jax.torus import Complex, multiply, rotary_frequencies, times


def drift_frequencies(score: ScoreFields, num_phases: int) -> npt.NDArray[np.float64]:
    """Returns the drift ``omega`` of each pair of a head, in radians a position, ``[R]``.

    Where a head compares all phases every block of N / H phases has the whole range of frequencies.
    """
    pairs = score.num_score_pairs(num_phases)
    gated = score.score in ("gated", "content_gated")
    period = num_phases // score.num_heads if gated else pairs
    return np.tile(rotary_frequencies(period, score.rotary_base), pairs // max(period, 1))


@documented
class PhaseScore(ScoreFields, nn.Module):
    """Queries and keys whose inner product is the score of two tokens."""

    @nn.compact
    def __call__(
        self, z: Complex, drift: Complex
    ) -> tuple[Float[Array, "B H L E"], Float[Array, "B H L E"]]:
        """Returns drifted queries (times beta) and keys, E = 2R reals each, in the compute dtype.

        Args:
          z: phasors ``[B, L, N]``.
          drift: ``exp(i t omega)`` of the tokens' positions, ``[B or 1, 1, L, R]``.
        """
        heads, pairs = self.num_heads, drift.re.shape[-1]
        if self.score == "none":
            # An inner product over nothing: all scores are zero, the mean field is uniform.
            empty = jnp.zeros((z.re.shape[0], heads, z.re.shape[1], 0), self.dtype)
            return empty, empty
        sharpness = nn.initializers.constant(np.log(self.score_sharpness / np.sqrt(pairs)))
        log_beta = self.param("log_beta", sharpness, (heads,), jnp.float32)
        beta = jnp.exp(log_beta.astype(jnp.float32))[None, :, None, None]
        drift = self._by_head(drift)
        if self.score == "gated":
            return self._gated(z, drift, beta)
        queries = self._projected if self.score == "projected" else self._content_gated
        query, key = (multiply(side, drift) for side in queries(z, pairs))
        return self._to_reals(times(beta, query)), self._to_reals(key)

    def _by_head(self, drift: Complex) -> Complex:
        """Removes the drift of similarity heads, ``[B or 1, H or 1, L, R]``."""
        if not self.similarity_heads:
            return drift
        static = (np.arange(self.num_heads) < self.similarity_heads)[:, None, None]
        return Complex(jnp.where(static, 1.0, drift.re), jnp.where(static, 0.0, drift.im))

    def _gated(self, z: Complex, drift: Complex, beta: Array) -> tuple[Array, Array]:
        key = multiply(self._compared(z), drift)
        # Gates of one block a head are kept as one vector over all phases.
        pairs = key.re.shape[-1]
        block = self.score_scope == "block"
        shape = (self.num_heads * pairs,) if block else (self.num_heads, pairs)
        by_pair = (1, self.num_heads, 1, pairs)
        gate = self.param("gate", nn.initializers.ones, shape, jnp.float32)
        gate = beta * gate.astype(jnp.float32).reshape(by_pair)
        if self.score_angles:
            angle = self.param("gate_angle", self._initial_angles, shape)
            angle = angle.astype(jnp.float32).reshape(by_pair)
            query = multiply(key, Complex(gate * jnp.cos(angle), -gate * jnp.sin(angle)))
        else:
            query = times(gate, key)
        key = Complex(*(jnp.broadcast_to(part, query.re.shape) for part in key))
        return self._to_reals(query), self._to_reals(key)

    def _initial_angles(self, key: Array, shape: tuple[int, ...]) -> Array:
        """Draws normal angles; zero for similarity heads, which compare what tokens are."""
        angles = self.score_angle * jax.random.normal(key, shape, jnp.float32)
        similarity = np.arange(self.num_heads)[:, None] < self.similarity_heads
        return jnp.where(similarity, 0.0, angles.reshape(self.num_heads, -1)).reshape(shape)

    def _content_gated(self, z: Complex, pairs: int) -> list[Complex]:
        compared = self._compared(z)
        sides = []
        for name in ("query_gate", "key_gate"):
            dense = PhasorDense(
                **shared_settings(self, PhasorDense),
                outputs=self.num_heads * pairs,
                use_bias=True,
                kernel_init=nn.initializers.normal(0.02),
                name=name,
            )
            gate = split_heads(1.0 + dense(z).astype(jnp.float32), self.num_heads)
            sides.append(Complex(compared.re * gate, compared.im * gate))
        return sides

    def _projected(self, z: Complex, pairs: int) -> list[Complex]:
        shared = shared_settings(self, PhasorDense)
        heads, key_heads = self.num_heads, self.num_heads - self.similarity_heads
        queries = PhasorDense(**shared, outputs=2 * heads * pairs, groups=heads, name="query")(z)
        keys = queries[..., : 2 * self.similarity_heads * pairs]
        if key_heads:
            width = 2 * key_heads * pairs
            dense = PhasorDense(**shared, outputs=width, groups=key_heads, name="key")
            keys = jnp.concatenate([keys, dense(z)], axis=-1)
        return [self._as_pairs(queries), self._as_pairs(keys)]

    def _compared(self, z: Complex) -> Complex:
        """Returns the phasors that each head compares, ``[B, 1, L, N]`` or ``[B, H, L, P]``."""
        if self.score_scope == "all":
            return Complex(z.re[:, None], z.im[:, None])
        return Complex(split_heads(z.re, self.num_heads), split_heads(z.im, self.num_heads))

    def _as_pairs(self, x: Array) -> Complex:
        # Rotated in float32: bfloat16 rotary phasors would blur positions far apart.
        by_head = split_heads(x.astype(jnp.float32), self.num_heads)
        return Complex(*jnp.split(by_head, 2, axis=-1))

    def _to_reals(self, x: Complex) -> Array:
        return jnp.concatenate(x, axis=-1).astype(self.dtype)
