"""The frustrated coupling in three parts: values are folded, summed by a kernel, and unfolded."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from fsn_jax.coupling import fold_values, fold_values_transposed, unfold_sum
from fsn_jax.kernels.arrays import CouplingInputs, CouplingSums
from fsn_jax.kernels.xla import own_inner
from fsn_jax.recompute import delay_until
from fsn_jax.torus import Complex

Sum = Callable[..., tuple[Array, ...]]
"""``fsn_jax.kernels.forward`` or ``backward`` of an implementation."""


def forward(sum_forward: Sum, inputs: CouplingInputs) -> tuple[Complex, CouplingSums]:
    """Computes the local field; see ``fsn_jax.kernels.coupling_forward``."""
    query, key, z, kappa, follows, segments = inputs
    value = fold_values(z, kappa, follows, query.dtype.name)
    total, self_weight, log_normalizer = sum_forward(query, key, value, segments)
    field = unfold_sum(z, total, self_weight, kappa)
    sums = CouplingSums.of(inputs, log_normalizer, total=total, self_weight=self_weight)
    return field, sums


def backward(
    sum_backward: Sum, inputs: CouplingInputs, sums: CouplingSums, d_field: Complex
) -> CouplingInputs:
    """Differentiates the local field; see ``fsn_jax.kernels.coupling_backward``."""
    query, key, z, kappa, follows, segments = inputs
    log_normalizer, total, self_weight, *_ = sums
    # The compiler merges it with that of the forward pass; the derivative is to keep nothing.
    value = fold_values(z, kappa, follows, query.dtype.name)
    _, pull_back = jax.vjp(unfold_sum, z, total, self_weight, kappa)
    d_received, d_total, d_self, d_kappa_received = pull_back(d_field)
    mean = own_inner(d_total, total) + d_self * self_weight
    d_query, d_key, d_value = sum_backward(
        query, key, value, log_normalizer, d_total, mean, self_weight * (d_self - mean), segments
    )
    d_z, d_kappa = fold_values_transposed(*delay_until(d_value, (z, kappa)), follows, d_value)
    d_z, d_kappa = jax.tree.map(jnp.add, (d_z, d_kappa), (d_received, d_kappa_received))
    return CouplingInputs(d_query, d_key, d_z, d_kappa)
