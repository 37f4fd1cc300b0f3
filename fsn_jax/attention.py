"""Attention as synchronization: Flax modules that map phases to updates of phases.

``KuramotoAttention`` is the unfrustrated base layer (arXiv 2606.11585), ``FrustratedAttention`` the
full kernel (arXiv 2606.18694). Both take ``theta[B, L, N]`` and return ``dtheta[B, L, N]``, in
radians; both have ``extend``, the same computation for tokens that follow a cache.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from fsn_jax.cache import LayerCache, extend_sum, extend_weights
from fsn_jax.causal import (
    CausalSum,
    attention_weights,
    causal_sum,
    merge_heads,
    slots_before,
    split_heads,
    weighted_sum,
)
from fsn_jax.config import FSNConfig
from fsn_jax.coupling import field_of_sums, fold_values, local_field, side_by_side, unfold_sum
from fsn_jax.dense import PhasorDense
from fsn_jax.recompute import recomputed
from fsn_jax.score import PhaseScore
from fsn_jax.torus import Complex, rotary_phasor, token_phasor


def attention_entropy(weights: Float[Array, "*shape L"]) -> Float[Array, "*shape"]:
    """Entropy of each row of attention weights, in nats."""
    return -jnp.sum(jax.scipy.special.xlogy(weights, weights), axis=-1)


class _PhaseAttention(nn.Module):
    """What the phase layers share: score, full and cached passes, diagnostics."""

    config: FSNConfig

    def _rotary(self, length: int) -> Complex:
        return rotary_phasor(length, self.config.score_pairs, self.config.rotary_base)

    def _rotary_at(self, position: Array, length: int, capacity: int) -> Complex:
        table = self._rotary(capacity)
        return Complex(
            *(jax.lax.dynamic_slice_in_dim(part, position, length, axis=0) for part in table)
        )

    def _causal_sum(
        self, query: Array, key: Array, value: Array, *, include_self: bool
    ) -> CausalSum:
        implementation = self.config.implementation
        return causal_sum(
            query, key, value, include_self=include_self, implementation=implementation
        )

    def _heads(self, z: Complex) -> Complex:
        heads = self.config.num_heads
        return Complex(split_heads(z.re, heads), split_heads(z.im, heads))

    def _sow_entropy(self, query: Array, key: Array) -> None:
        if self.is_mutable_collection("diagnostics") and not self.is_initializing():
            entropy = attention_entropy(attention_weights(query, key))
            self.sow("diagnostics", "attention_entropy", entropy)

    def weights(self, theta: Float[Array, "B L N"]) -> Float[Array, "B H L L"]:
        """The attention ``A`` itself, which the layer's sum does not form."""
        z = token_phasor(theta, self.config.num_phases)
        return attention_weights(*self.score(z, self._rotary(theta.shape[1])))

    def empty_cache(self, batch: int, capacity: int) -> LayerCache:
        """A cache for ``capacity`` tokens of each of ``batch`` sequences."""
        c = self.config
        key = jnp.zeros((batch * c.num_heads, 2 * c.score_pairs, capacity), c.dtype)
        value = jnp.zeros((batch * c.num_heads, capacity, self._value_width()), c.dtype)
        return LayerCache(key, value)

    def _value_width(self) -> int:
        raise NotImplementedError


SOFTPLUS_FLOOR = 0.01
"""Least initial value of a positive coefficient: no parameter gives a softplus of zero."""


def _softplus_inverse(x: np.ndarray) -> np.ndarray:
    return np.log(np.expm1(np.maximum(x, SOFTPLUS_FLOOR)))


def initial_kernel(config: FSNConfig) -> np.ndarray:
    """Initial in-phase coefficients of the kernel; the initial frustration angles are 0.

    ``[T, M, N]``, or ``[T, M, J, N]`` if a phase hears J > 1 heads; all but the first head have
    coefficients of zero. Where the kernel must be positive (``signed_harmonics=False``) the least
    coefficient is ``SOFTPLUS_FLOOR``.
    """
    m = np.arange(1, config.num_harmonics + 1)
    wave = {"sawtooth": (-1.0) ** (m + 1) / m, "first_harmonic": 1.0 * (m == 1)}
    rho = config.kernel_scale * wave[config.kernel_init]
    kernel = np.zeros(
        (config.num_delays, config.num_harmonics, config.heads_per_phase, config.num_phases)
    )
    kernel[:, :, 0] = rho[:, None]
    return (kernel if config.heads_per_phase > 1 else kernel[:, :, 0]).astype(np.float32)


def _by_head(by_rank: Sequence[Array], axis: int) -> Array:
    """From arrays by block, one a rank, to what each head couples, side by side.

    The head of rank j for block h is h + j, so that head h couples blocks h, h - 1, ...
    """
    shifted = [jnp.roll(part, j, axis=axis) for j, part in enumerate(by_rank)]
    return jnp.concatenate(shifted, axis=-1)


class FrustratedAttention(_PhaseAttention):
    """Attention whose value pathway is one complex coupling kernel over harmonics and delays.

    See ``fsn_jax.coupling`` for the equation. With ``values="linear"`` the kernel gives way to
    dense values and an output matrix, as in a transformer (an ablation).
    """

    def setup(self) -> None:
        c = self.config
        self.score = PhaseScore(c)
        if c.values == "linear":
            self.value = PhasorDense(c, c.num_phases)
            self.output = nn.Dense(c.num_phases, use_bias=False, dtype=jnp.dtype(c.dtype))
            return
        initial = initial_kernel(c)
        real = initial if c.signed_harmonics else _softplus_inverse(initial)
        self.kernel_real = self.param("kernel_real", lambda _: jnp.asarray(real, jnp.float32))
        if c.static_angles:
            self.kernel_imag = self.param(
                "kernel_imag", nn.initializers.zeros, initial.shape, jnp.float32
            )

    def kappa(self) -> Complex:
        """The coupling kernel ``[T, M, J, N]``, real and imaginary parts.

        ``jax.lax.complex(*kappa)[:, :, j]`` is what ``fsn_jax.coupling`` takes, for the j-th of the
        heads that a phase hears.
        """
        c = self.config
        real = self.kernel_real if c.signed_harmonics else jax.nn.softplus(self.kernel_real)
        imag = self.kernel_imag if c.static_angles else jnp.zeros_like(real)
        shape = (c.num_delays, c.num_harmonics, c.heads_per_phase, c.num_phases)
        return Complex(real.reshape(shape), imag.reshape(shape))

    def __call__(self, theta: Float[Array, "B L N"]) -> Float[Array, "B L N"]:
        """The update of the phases, in radians, float32.

        Differentiable in reverse mode; for forward mode take ``implementation="reference"``.

        Raises:
          ValueError: ``theta`` is not ``[B, L, num_phases]``.
        """
        return self.field(theta).im

    def field(self, theta: Float[Array, "B L N"]) -> Complex:
        """The local field of every phase, ``[B, L, N]``, seen from that phase.

        ``im`` is the torque, the update of the phases in radians; ``re`` is the coherence of a
        phase with its field. Dense values have no coherence: zero.
        """
        c = self.config
        z = token_phasor(theta, c.num_phases)
        query, key = self.score(z, self._rotary(theta.shape[1]))
        self._sow_entropy(query, key)
        if c.values == "linear":
            value = split_heads(self.value(z), c.num_heads)
            summed = self._causal_sum(query, key, value, include_self=True)
            return self._linear_output(summed.total)
        if c.implementation == "reference":
            return self._reference(theta, attention_weights(query, key))
        kappa, zh = self._kappa_by_head(), self._coupled(z)
        value = recomputed(fold_values)(zh, kappa).astype(c.dtype)
        total, self_weight = self._causal_sum(query, key, value, include_self=False)
        return self._gather(unfold_sum(zh, total, self_weight, kappa))

    def extend(
        self, theta: Float[Array, "B S N"], cache: LayerCache, position: Int[Array, ""]
    ) -> tuple[Float[Array, "B S N"], LayerCache]:
        """``__call__`` for S tokens at ``position`` and on, after those in the cache."""
        field, cache = self.extend_field(theta, cache, position)
        return field.im, cache

    def extend_field(
        self, theta: Float[Array, "B S N"], cache: LayerCache, position: Int[Array, ""]
    ) -> tuple[Complex, LayerCache]:
        """As ``extend``, but the whole ``field``."""
        c = self.config
        z = token_phasor(theta, c.num_phases)
        rotary = self._rotary_at(position, theta.shape[1], cache.capacity)
        query, key = self.score(z, rotary)
        if c.values == "linear":
            value = split_heads(self.value(z), c.num_heads)
            total, cache = extend_sum(query, key, value, cache, position)
            return self._linear_output(total), cache
        zh = self._heads(z)
        waves = side_by_side(zh, c.num_harmonics)
        weights, cache = extend_weights(query, key, waves, cache, position)
        rows = self._rows(weights, position)
        sums = weighted_sum(rows.reshape(*rows.shape[:2], -1, rows.shape[-1]), cache.value)
        kappa = Complex(*(part.reshape(*part.shape[:3], c.num_heads, -1) for part in self.kappa()))
        field = field_of_sums(zh, sums.reshape(*rows.shape[:-1], -1), kappa)
        return Complex(*map(merge_heads, field)), cache

    def _rows(self, weights: Array, position: Array) -> Array:
        """The weights of every block's tokens, ``[B, H, T, J, S, C]``: by delay and head heard."""
        c = self.config
        heard = [jnp.roll(weights, -j, axis=1) for j in range(c.heads_per_phase)]
        rows = [jnp.stack(heard, axis=2)]
        if c.delay:
            # What was the weight of a token is that of its successor, if that is in the past.
            shifted = jnp.pad(rows[0][..., :-1], ((0, 0),) * 4 + ((1, 0),))
            rows.append(jnp.where(slots_before(position + 1, *weights.shape[2:]), shifted, 0.0))
        return jnp.stack(rows, axis=2)

    def _kappa_by_head(self) -> Complex:
        """The kernel by head, ``[T, M, H, J P]``, over the phases in the order of ``_coupled``."""
        c = self.config
        shape = (c.num_delays, c.num_harmonics, c.heads_per_phase, c.num_heads, c.phases_per_head)
        block = np.arange(c.num_heads)

        def by_head(part: Array) -> Array:
            part = part.reshape(shape)
            if c.heads_per_phase < c.num_heads:
                return _by_head(list(jnp.moveaxis(part, 2, 0)), axis=2)
            rank = (block[:, None] - block) % c.num_heads  # of each head for each block
            return part[:, :, rank, block[None]].reshape(*shape[:2], c.num_heads, -1)

        kappa = self.kappa()
        return Complex(by_head(kappa.re), by_head(kappa.im))

    def _coupled(self, z: Complex) -> Complex:
        """The phases that each head couples, ``[B, H, L, J P]``; if J = H all, ``[B, 1, L, N]``."""
        if self.config.heads_per_phase == self.config.num_heads:
            return Complex(z.re[:, None], z.im[:, None])
        zh = self._heads(z)
        return Complex(*(_by_head([part] * self.config.heads_per_phase, axis=1) for part in zh))

    def _gather(self, field: Complex) -> Complex:
        """The field of all heads together, ``[B, L, N]``."""
        return Complex(*map(self._gather_part, field))

    def _gather_part(self, part: Array) -> Array:
        if self.config.heads_per_phase == self.config.num_heads:
            return part[:, 0]
        by_rank = jnp.split(part, self.config.heads_per_phase, axis=-1)
        by_block = [jnp.roll(one, -j, axis=1) for j, one in enumerate(by_rank)]
        return merge_heads(jnp.stack(by_block).sum(axis=0))

    def _reference(self, theta: Array, attention: Array) -> Complex:
        kappa = jax.lax.complex(*self.kappa())
        heard = range(self.config.heads_per_phase)
        by_rank = jnp.stack([jnp.roll(attention, -j, axis=1) for j in heard])
        field = jax.vmap(local_field, in_axes=(None, 0, 2))(theta, by_rank, kappa).sum(axis=0)
        return Complex(field.real, field.imag)

    def _linear_output(self, total: Array) -> Complex:
        update = self.output(merge_heads(total)).astype(jnp.float32)
        return Complex(jnp.zeros_like(update), update)

    def _value_width(self) -> int:
        c = self.config
        return (
            c.phases_per_head if c.values == "linear" else 2 * c.num_harmonics * c.phases_per_head
        )


class KuramotoAttention(_PhaseAttention):
    """The base layer: ``dtheta_t = g * sum_u A[t, u] sin(theta_u - theta_t)``, g > 0 learned.

    Written from its own equation; ``FrustratedAttention`` with one harmonic, no delay and a real
    positive kernel is the same layer.
    """

    def setup(self) -> None:
        self.score = PhaseScore(self.config)
        initial = _softplus_inverse(np.full(self.config.num_phases, self.config.kernel_scale))
        self.gain = self.param("gain", lambda _: jnp.asarray(initial, jnp.float32))

    def __call__(self, theta: Float[Array, "B L N"]) -> Float[Array, "B L N"]:
        """The update of the phases, in radians, float32.

        Raises:
          ValueError: ``theta`` is not ``[B, L, num_phases]``.
        """
        z = token_phasor(theta, self.config.num_phases)
        query, key = self.score(z, self._rotary(theta.shape[1]))
        self._sow_entropy(query, key)
        summed = self._causal_sum(query, key, self._values(z), include_self=True)
        return self._pull(z, summed.total)

    def extend(
        self, theta: Float[Array, "B S N"], cache: LayerCache, position: Int[Array, ""]
    ) -> tuple[Float[Array, "B S N"], LayerCache]:
        """``__call__`` for S tokens at ``position`` and on, after those in the cache."""
        z = token_phasor(theta, self.config.num_phases)
        query, key = self.score(z, self._rotary_at(position, theta.shape[1], cache.capacity))
        total, cache = extend_sum(query, key, self._values(z), cache, position)
        return self._pull(z, total), cache

    def _values(self, z: Complex) -> Array:
        return jnp.concatenate(self._heads(z), axis=-1).astype(self.config.dtype)

    def _pull(self, z: Complex, total: Array) -> Array:
        mean = Complex(*(merge_heads(part) for part in jnp.split(total, 2, axis=-1)))
        return jax.nn.softplus(self.gain)[None, None] * (mean.im * z.re - mean.re * z.im)

    def _value_width(self) -> int:
        return 2 * self.config.phases_per_head
