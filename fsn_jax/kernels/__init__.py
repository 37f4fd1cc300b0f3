"""The strictly causal sum on each platform: a fused kernel, or blocks compiled by XLA.

``fsn_jax.causal`` calls ``forward`` and ``backward``; ``fsn_jax.coupling_sum`` calls the other two,
for the whole frustrated coupling. A fused kernel is imported where a program is traced for it, so
that a platform without Pallas or its Triton backend loses nothing.
"""

import contextlib
import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
from jax import Array

from fsn_jax.fields import Implementation
from fsn_jax.kernels import parts, xla
from fsn_jax.kernels.arrays import CouplingInputs, CouplingSums
from fsn_jax.torus import Complex

PLATFORMS = {"tpu": "tpu", "cuda": "gpu"}
"""Platforms of ``jax.jit`` that have a fused kernel for the sum, and the module that it is in."""

COUPLING = {"tpu": "tpu_coupling", "cuda": "gpu_coupling"}
"""Those that have one for the whole coupling, and its module."""

PLATFORM_OF_BACKEND = {"tpu": "tpu", "gpu": "cuda"}
"""The same platforms by the names that ``jax.default_backend`` has for them."""


def forward(
    query: Array,
    key: Array,
    value: Array,
    segments: Array | None = None,
    *,
    implementation: Implementation,
) -> tuple[Array, ...]:
    """Computes ``sum_{u < t} A[t, u] v_u``, ``A[t, t]`` and the log normalizers.

    ``A[t, u] = softmax_u(q_t . k_u)`` over ``u <= t`` in the segment of t.

    Args:
      query: ``[B, H, L, E]``, float32 or bfloat16.
      key: ``[B, H, L, E]``.
      value: ``[B, H, L, G]``.
      segments: int32 ``[B, 1, L]``; tokens see those of their own segment. None: one segment.
      implementation: ``xla`` (blocks), ``pallas`` (fused kernel; interpreted, slowly, on a CPU), or
        ``auto`` (fused kernel where the program runs on this machine's GPU or TPU, else blocks).

    Returns:
      ``[B, H, L, G]`` in the dtype of ``value``, and float32 ``[B, H, L]`` twice. Sums are
      float32 on the way.
    """
    arrays = (query, key, value, segments)
    with jax.named_scope("causal_sum"):
        return _by_platform("forward", implementation, xla.forward, PLATFORMS, *arrays)


def backward(
    query: Array,
    key: Array,
    value: Array,
    log_normalizer: Array,
    d_total: Array,
    mean: Array,
    d_own_score: Array,
    segments: Array | None = None,
    *,
    implementation: Implementation,
) -> tuple[Array, ...]:
    """Computes the cotangents of query, key and value by the strict sum, in their dtype.

    Args:
      query: ``[B, H, L, E]``.
      key: ``[B, H, L, E]``.
      value: ``[B, H, L, G]``.
      log_normalizer: of ``forward``, ``[B, H, L]``.
      d_total: cotangent of the sum in the dtype of ``value``, ``[B, H, L, G]``.
      mean: mean of the cotangent of the weights, under the weights, ``[B, H, L]``.
      d_own_score: cotangent of the token's own score, ``[B, H, L]``.
      segments: int32 ``[B, 1, L]`` or None.
      implementation: see ``forward``.
    """
    arrays = (query, key, value, log_normalizer, d_total, mean, d_own_score, segments)
    with jax.named_scope("causal_sum"):
        return _by_platform("backward", implementation, xla.backward, PLATFORMS, *arrays)


def coupling_forward(
    inputs: CouplingInputs, *, implementation: Implementation
) -> tuple[Complex, CouplingSums]:
    """Computes the local field of the frustrated coupling, and what its derivative needs.

    Args:
      inputs: see ``CouplingInputs``.
      implementation: see ``forward``; without a kernel for the coupling, that for the sum is taken.

    Returns:
      The field, float32, of the shape of ``z``, and the sums.
    """
    by_parts = functools.partial(
        parts.forward, functools.partial(forward, implementation=implementation)
    )
    return _by_platform("forward", implementation, by_parts, COUPLING, inputs)


def coupling_backward(
    inputs: CouplingInputs, sums: CouplingSums, d_field: Complex, *, implementation: Implementation
) -> CouplingInputs:
    """Computes the cotangents of query, key, z and kappa by the field, in their dtype.

    Phasors stay on the circle: a cotangent of z may have no part along z.

    Args:
      inputs: of ``coupling_forward``.
      sums: of ``coupling_forward``.
      d_field: cotangent of the field, of the shape of ``z``.
      implementation: see ``forward``.
    """
    by_parts = functools.partial(
        parts.backward, functools.partial(backward, implementation=implementation)
    )
    return _by_platform("backward", implementation, by_parts, COUPLING, inputs, sums, d_field)


def _by_platform(
    name: str,
    implementation: Implementation,
    compiled: Callable[..., Any],
    modules: dict[str, str],
    *arrays: Any,
) -> Any:
    """Calls ``name`` of the module for the platform, or what XLA compiles where there is none.

    Raises:
      ValueError: there is no such implementation.
    """
    if implementation == "xla":
        return compiled(*arrays)
    if implementation == "auto":
        here = PLATFORM_OF_BACKEND.get(jax.default_backend())
        fused = _fused(name, {p: module for p, module in modules.items() if p == here})
        return jax.lax.platform_dependent(*arrays, **fused, default=compiled)
    if implementation != "pallas":
        raise ValueError(
            f"implementation must be 'auto', 'xla', 'pallas' or, of causal_sum and the layers, "
            f"'reference'; got {implementation!r}"
        )
    interpreted = functools.partial(getattr(_module(modules["tpu"]), name), interpret=True)
    fused = dict.fromkeys((*PLATFORMS, "rocm"), compiled) | _fused(name, modules)
    return jax.lax.platform_dependent(*arrays, **fused, default=interpreted)


def _fused(name: str, modules: dict[str, str]) -> dict[str, Callable[..., Any]]:
    """Returns ``name`` of each platform's module, of those that can be imported."""
    found: dict[str, Callable[..., Any]] = {}
    for platform, module in modules.items():
        with contextlib.suppress(ImportError):
            found[platform] = functools.partial(getattr(_module(module), name), interpret=False)
    return found


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")
