"""What the kernels of the frustrated coupling take, and what its derivative reads."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from fsn_jax.recompute import match_varying_axes
from fsn_jax.torus import Complex


class CouplingInputs(NamedTuple):
    """What the frustrated coupling of whole sequences is computed from.

    Attributes:
      query: ``[B, H, L, E]``, float32 or bfloat16, which is also the dtype of values and sums.
      key: ``[B, H, L, E]``, of the same dtype.
      z: phasors of the phases that each head couples, ``[B, H, L, P]``, or ``[B, 1, L, P]`` if all
        heads couple the same.
      kappa: the kernel by head, ``[T, M, H, P]``.
      follows: ``fsn_jax.coupling.next_in_segment``, float32 ``[B, 1, L, 1]``; None: all tokens of a
        row are in one segment.
      segments: int32 ``[B, 1, L]``; tokens couple to those of their own. None: one segment.
    """

    query: Array
    key: Array
    z: Complex
    kappa: Complex
    follows: Array | None = None
    segments: Array | None = None


class CouplingSums(NamedTuple):
    """What the derivative of the frustrated coupling reads beside its inputs.

    A platform reads ``total`` and ``self_weight``, or ``field`` and ``turning``. The others are
    zeros there, which the compiler drops.

    Attributes:
      log_normalizer: of the softmax, float32 ``[B, H, L]``.
      total: strictly causal sums of the folded values, ``S[t, m]``, ``[B, H, L, 2 M P]``.
      self_weight: ``A[t, t]``, float32 ``[B, H, L]``.
      field: of each head, in the dtype of the query, ``[B, H, L, P]``.
      turning: ``sum_m m z_t**-m S[t, m]``, likewise: the field turns by ``-i`` times it a radian of
        the phase that sees it.
    """

    log_normalizer: Array
    total: Array
    self_weight: Array
    field: Complex
    turning: Complex

    @classmethod
    def of(
        cls,
        inputs: CouplingInputs,
        log_normalizer: Array,
        *,
        total: Array | None = None,
        self_weight: Array | None = None,
        field: Complex | None = None,
        turning: Complex | None = None,
    ) -> "CouplingSums":
        """Returns sums with zeros for those that are not given."""
        _, num_harmonics, _, phases = inputs.kappa.re.shape

        def zeros(columns: int) -> Array:
            return jnp.zeros((*inputs.query.shape[:3], columns), inputs.query.dtype)

        sums = cls(
            log_normalizer,
            zeros(2 * num_harmonics * phases) if total is None else total,
            jnp.zeros_like(log_normalizer) if self_weight is None else self_weight,
            field or Complex(zeros(phases), zeros(phases)),
            turning or Complex(zeros(phases), zeros(phases)),
        )
        return match_varying_axes(sums)  # every platform returns the same types


def varying_alike(
    arrays: Sequence[Any], shapes: Sequence[jax.ShapeDtypeStruct]
) -> tuple[list[Any], list[jax.ShapeDtypeStruct]]:
    """Returns what a kernel reads and the shapes of what it writes, alike in varying axes.

    Inside ``jax.shard_map`` a kernel's operands and results must all vary over the same axes.
    """
    operands = match_varying_axes([jnp.asarray(x) for x in arrays])
    axes = jax.typeof(operands[0]).manual_axis_type
    return operands, [jax.ShapeDtypeStruct(s.shape, s.dtype, manual_axis_type=axes) for s in shapes]


def dot(x: Array, y: Array, contract: tuple[int, int]) -> Array:
    """Multiplies matrices over the axes given, with float32 sums."""
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32)
