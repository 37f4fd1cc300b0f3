"""Attention as frustrated synchronization: a Flax module that maps phases to updates of phases.

``FrustratedAttention`` takes ``theta[B, L, N]`` and returns ``dtheta[B, L, N]``, in radians, and
reads N from its input; ``extend`` is the same computation for tokens that follow a cache. Source:
arXiv 2606.18694, as reconstructed in docs/model.md.
"""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from fsn_jax.base_layer import PhaseAttention, softplus_inverse
from fsn_jax.cache import weighted_sum
from fsn_jax.causal import attention_weights, merge_heads
from fsn_jax.coupling import field_of_sums, local_field, side_by_side
from fsn_jax.coupling_sum import coupled_field
from fsn_jax.fields import CouplingFields, documented
from fsn_jax.torus import Complex, in_float32, kept_in


def initial_kernel(layer: CouplingFields, num_phases: int) -> np.ndarray:
    """Returns the initial in-phase coefficients ``rho cos(alpha)``: the first harmonic alone.

    ``[T, M, N]``, or ``[T, M, J, N]`` if a phase hears J > 1 heads; all but the first head have
    coefficients of zero. Where the kernel must be positive (``signed_harmonics=False``)
    ``softplus_inverse`` makes ``SOFTPLUS_FLOOR`` of the zeros.
    """
    heard = layer.heads_per_phase
    kernel = np.zeros((layer.num_delays, layer.num_harmonics, heard, num_phases), np.float32)
    kernel[:, 0, 0] = layer.kernel_scale
    return kernel if heard > 1 else kernel[:, :, 0]


def initial_quadrature(layer: CouplingFields, num_phases: int) -> nn.initializers.Initializer:
    """Returns an initializer of the imaginary part, ``-rho sin(alpha)``, for normal angles alpha.

    The in-phase part is ``initial_kernel`` whatever the angle, so it is that times ``-tan(alpha)``:
    coefficients of the first harmonic have ``rho = kernel_scale / cos(alpha)``.
    """
    in_phase = jnp.asarray(initial_kernel(layer, num_phases))
    if not layer.kernel_angle:
        return nn.initializers.zeros

    def init(key: Array, shape: Sequence[int], dtype: object) -> Array:
        alpha = layer.kernel_angle * jax.random.normal(key, shape, jnp.float32)
        return -in_phase * jnp.tan(alpha)

    return init


def _by_head(by_rank: Sequence[Array], axis: int) -> Array:
    """Puts side by side what each head couples, from arrays by block, one a rank.

    The head of rank j for block h is h + j, so that head h couples blocks h, h - 1, ...
    """
    shifted = [jnp.roll(part, j, axis=axis) for j, part in enumerate(by_rank)]
    return jnp.concatenate(shifted, axis=-1)


@documented
class FrustratedAttention(CouplingFields, PhaseAttention):
    r"""Attention whose value pathway is one complex coupling kernel over harmonics and delays.

    .. math::

        \Delta\theta_{t,n} = \operatorname{Im} \sum_{\tau=0}^{T-1} \sum_{m=1}^{M} \sum_{h \in H(n)}
        \kappa_{\tau,m,h,n} e^{-i m \theta_{t,n}}
        \sum_{u : u + \tau \le t} A_{h,t,u} \, e^{i m \theta_{u+\tau,n}}

        A_{h,t,u} = \operatorname{softmax}_{u \le t} \Bigl( \beta_h \sum_{n \in h} g_n
        \cos\bigl(\theta_{t,n} - \theta_{u,n} + (t - u)\,\omega_n - a_n\bigr) \Bigr)

    Head h compares its own block of N / H phases; phase n hears the J heads ``H(n)``. Phases are
    angles in radians, ``theta[B, L, N]``; N is read from the input. Parameters: ``kernel_real`` and
    ``kernel_imag``, the kernel ``kappa`` ``[T, M, J, N]`` (``[T, M, N]`` for J = 1), its real part
    before a softplus if ``signed_harmonics`` is off; ``score/gate`` and ``score/gate_angle``, ``g``
    and ``a`` ``[N]`` (``[H, N]`` if heads compare all phases); ``score/log_beta`` ``[H]``. There is
    no query, key, value or output matrix.

    Cost of a token, compared with multi-head attention of width N and the same L: no dense layers
    (attention: ``8 N**2`` FLOPs), scores of ``2 N / H`` reals a head (``N / H``) and values of
    ``2 M J N / H`` (``N / H``). Neither pass, forward or backward, holds an ``[L, L]`` array, but
    for ``implementation="reference"`` and traces of the attention.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from fsn_jax import FrustratedAttention
      >>> layer = FrustratedAttention(num_heads=2, num_harmonics=2)
      >>> theta = jax.random.normal(jax.random.key(0), (1, 6, 8))  # [B, L, N], radians
      >>> variables = layer.init(jax.random.key(1), theta)
      >>> theta = theta + layer.apply(variables, theta)
      >>> jax.tree.map(jnp.shape, variables["params"]["kernel_real"])
      (2, 2, 2, 8)
    """

    @nn.compact
    def _kernel(self, num_phases: int) -> Complex:
        """Returns the coupling kernel ``[T, M, J, N]``, real and imaginary parts."""
        initial = initial_kernel(self, num_phases)
        start = initial if self.signed_harmonics else softplus_inverse(initial)
        real = self.param("kernel_real", lambda _: jnp.asarray(start, jnp.float32))
        if not self.signed_harmonics:
            real = jax.nn.softplus(real.astype(jnp.float32))
        imag = jnp.zeros_like(real)
        if self.static_angles:
            quadrature = initial_quadrature(self, num_phases)
            imag = self.param("kernel_imag", quadrature, initial.shape, jnp.float32)
        shape = (self.num_delays, self.num_harmonics, self.heads_per_phase, num_phases)
        return in_float32(Complex(real.reshape(shape), imag.reshape(shape)))

    def kappa(self) -> Complex:
        """Returns the coupling kernel ``[T, M, J, N]``, real and imaginary parts.

        ``jax.lax.complex(*kappa)[:, :, j]`` is what ``fsn_jax.coupling`` takes, for the j-th of the
        heads that a phase hears.
        """
        return self._kernel(self.get_variable("params", "kernel_real").shape[-1])

    def _field(
        self, theta: Array, z: Complex, query: Array, key: Array, segment_ids: Array | None
    ) -> Complex:
        kappa = self._kernel(theta.shape[-1])
        if self.implementation == "reference":
            attention = attention_weights(query, key, segment_ids)
            return self._reference(theta, attention, kappa, segment_ids)
        field = coupled_field(
            query,
            key,
            self._coupled(kept_in(z, self.dtype)),
            self._kappa_by_head(kappa),
            segment_ids,
            implementation=self.implementation,
        )
        return self._gather(field)

    def _values(self, z: Complex) -> Array:
        return side_by_side(self._heads(z), self.num_harmonics)

    def _field_of_weights(
        self, z: Complex, weights: Array, values: Array, visible: Array
    ) -> Complex:
        kappa, zh = self._kernel(z.re.shape[2]), self._heads(z)
        rows = self._rows(weights, visible)
        sums = weighted_sum(rows.reshape(*rows.shape[:2], -1, rows.shape[-1]), values)
        kappa = Complex(*(part.reshape(*part.shape[:3], self.num_heads, -1) for part in kappa))
        field = field_of_sums(zh, sums.reshape(*rows.shape[:-1], -1), kappa)
        return Complex(*map(merge_heads, field))

    def _rows(self, weights: Array, visible: Array) -> Array:
        """Returns the weights of each block by delay and head heard, ``[B, H, T, J, S, C]``."""
        heard = [jnp.roll(weights, -j, axis=1) for j in range(self.heads_per_phase)]
        rows = [jnp.stack(heard, axis=2)]
        if self.delay:
            # The weight of a token becomes that of its successor, where the successor is visible.
            shifted = jnp.pad(rows[0][..., :-1], ((0, 0),) * 4 + ((1, 0),))
            if visible.ndim == 4:
                visible = visible[:, :, None]
            rows.append(jnp.where(visible, shifted, 0.0))
        return jnp.stack(rows, axis=2)

    def _kappa_by_head(self, kappa: Complex) -> Complex:
        """Returns the kernel by head, ``[T, M, H, J P]``, phases in the order of ``_coupled``."""
        heads, heard = self.num_heads, self.heads_per_phase
        num_phases = kappa.re.shape[3]
        block = np.arange(num_phases) // (num_phases // heads)
        rank = (np.arange(heads)[:, None] - block) % heads  # of each head for each phase
        is_heard = (rank[:, None] == np.arange(heard)[:, None])[None, None]  # [1, 1, H, J, N]

        def by_head(part: Array) -> Array:
            if heard < heads:
                part = part.reshape(*part.shape[:3], heads, -1)  # [T, M, J, H, P]
                return _by_head(list(jnp.moveaxis(part, 2, 0)), axis=2)
            return jnp.where(is_heard, part[:, :, None], 0.0).sum(axis=3)

        return Complex(by_head(kappa.re), by_head(kappa.im))

    def _coupled(self, z: Complex) -> Complex:
        """Returns what each head couples, ``[B, H, L, J P]``; ``[B, 1, L, N]`` if J = H."""
        if self.phasor_heads == 1:
            return Complex(z.re[:, None], z.im[:, None])
        zh = self._heads(z)
        return Complex(*(_by_head([part] * self.heads_per_phase, axis=1) for part in zh))

    def _gather(self, field: Complex) -> Complex:
        """Sums the fields of all heads, ``[B, L, N]``."""
        return Complex(*map(self._gather_part, field))

    def _gather_part(self, part: Array) -> Array:
        if self.phasor_heads == 1:
            return part[:, 0]
        by_rank = jnp.split(part, self.heads_per_phase, axis=-1)
        by_block = [jnp.roll(one, -j, axis=1) for j, one in enumerate(by_rank)]
        return merge_heads(jnp.stack(by_block).sum(axis=0))

    def _reference(
        self, theta: Array, attention: Array, kappa: Complex, segment_ids: Array | None
    ) -> Complex:
        heard = range(self.heads_per_phase)
        by_rank = jnp.stack([jnp.roll(attention, -j, axis=1) for j in heard])
        of_rank = jax.vmap(local_field, in_axes=(None, 0, 2, None))
        theta = theta.astype(jnp.float32)
        field = of_rank(theta, by_rank, jax.lax.complex(*kappa), segment_ids).sum(axis=0)
        return Complex(field.real, field.imag)

    def _value_width(self, num_phases: int) -> int:
        return 2 * self.num_harmonics * (num_phases // self.num_heads)
