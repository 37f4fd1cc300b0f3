"""The frustrated coupling of whole sequences: queries, keys and phasors to the local field.

``coupled_field`` is the fast form of ``fsn_jax.coupling.local_field`` under the softmax of
``fsn_jax.causal``. It differentiates by computing weights and values again; ``fsn_jax.kernels`` has
its platforms.
"""

import functools

import jax
from jaxtyping import Array, Float, Int

from fsn_jax import kernels
from fsn_jax.coupling import next_in_segment
from fsn_jax.documents import check_rows
from fsn_jax.fields import Implementation
from fsn_jax.kernels import choice
from fsn_jax.kernels.arrays import CouplingInputs, CouplingSums
from fsn_jax.recompute import match_varying_axes
from fsn_jax.reverse_mode import reverse_mode_only
from fsn_jax.torus import Complex, in_float32


def coupled_field(
    query: Float[Array, "B H L E"],
    key: Float[Array, "B H L E"],
    z: Complex,
    kappa: Complex,
    segment_ids: Int[Array, "B L"] | None = None,
    *,
    implementation: Implementation = "auto",
) -> Complex:
    """Computes the local field of every phase that each head couples.

    Args:
      query: float32 or bfloat16, which is also the dtype of values and their sums.
      key: of the same dtype.
      z: phasors of the phases that each head couples, ``[B, H, L, P]``, or ``[B, 1, L, P]`` if all
        heads couple the same. They are of length one: the derivative need not be right along z.
      kappa: the kernel by head, ``[T, M, H, P]``.
      segment_ids: tokens couple to those of their own segment; None: all are in one.
      implementation: as for ``fsn_jax.causal.causal_sum``, without ``reference``.

    Returns:
      The field of each head, or of all together, float32, of the shape of ``z``.

    Raises:
      ValueError: ``segment_ids`` is not ``[B, L]``, or no whole numbers.
    """
    check_rows((query.shape[0], query.shape[2]), segment_ids, None)
    if 0 in query.shape[:3]:
        return in_float32(z)
    if implementation == "auto":
        num_delays, num_harmonics, _, width = kappa.re.shape
        coupling = (num_delays, num_harmonics, z.re.shape[1])
        implementation = choice.of_auto(
            query,
            2 * num_harmonics * width,
            coupling=coupling,
            segments=segment_ids is not None,
        )
    follows = segments = None
    if segment_ids is not None:
        follows, segments = next_in_segment(segment_ids)[:, None, :, None], segment_ids[:, None]
    arrays = reverse_mode_only(match_varying_axes((query, key, z, kappa)))
    return _coupled_field(CouplingInputs(*arrays, follows, segments), implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _coupled_field(inputs: CouplingInputs, implementation: Implementation) -> Complex:
    return kernels.coupling_forward(inputs, implementation=implementation)[0]


def _forward(
    inputs: CouplingInputs, implementation: Implementation
) -> tuple[Complex, tuple[CouplingInputs, CouplingSums]]:
    field, sums = kernels.coupling_forward(inputs, implementation=implementation)
    return field, (inputs, sums)


def _backward(
    implementation: Implementation,
    residuals: tuple[CouplingInputs, CouplingSums],
    d_field: Complex,
) -> tuple[CouplingInputs]:
    return (kernels.coupling_backward(*residuals, d_field, implementation=implementation),)


_coupled_field.defvjp(_forward, _backward)
