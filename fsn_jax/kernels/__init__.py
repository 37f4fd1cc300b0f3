"""The strictly causal sum on each platform: a fused kernel, or blocks compiled by XLA.

``fsn_jax.causal`` calls ``forward`` and ``backward``. A fused kernel is imported where a program is
traced for it, so that a platform without Pallas or its Triton backend loses nothing.
"""

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterable
from types import ModuleType

import jax
from jax import Array

from fsn_jax.config import Implementation
from fsn_jax.kernels import xla

PLATFORMS = {"tpu": "tpu", "cuda": "gpu"}
"""Platforms of ``jax.jit`` that have a fused kernel, and the module that it is in."""


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
    return _by_platform("forward", implementation, query, key, value, segments)


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
    return _by_platform("backward", implementation, *arrays)


def _by_platform(
    name: str, implementation: Implementation, *arrays: Array | None
) -> tuple[Array, ...]:
    in_blocks = getattr(xla, name)
    if implementation == "xla":
        return in_blocks(*arrays)
    if implementation == "auto":
        fused = _fused(
            name, [p for p, module in PLATFORMS.items() if module == jax.default_backend()]
        )
        return jax.lax.platform_dependent(*arrays, **fused, default=in_blocks)
    interpreted = functools.partial(getattr(_module("tpu"), name), interpret=True)
    return jax.lax.platform_dependent(*arrays, **_fused(name, PLATFORMS), default=interpreted)


def _fused(name: str, platforms: Iterable[str]) -> dict[str, Callable[..., tuple[Array, ...]]]:
    """Returns ``forward`` or ``backward`` of the fused kernels, of those that can be imported."""
    found = {}
    for platform in platforms:
        with contextlib.suppress(ImportError):
            found[platform] = functools.partial(
                getattr(_module(PLATFORMS[platform]), name), interpret=False
            )
    return found


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")
