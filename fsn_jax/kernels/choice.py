"""Which implementation of the strictly causal sum is the faster on this machine."""

import functools
import time
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fsn_jax import kernels
from fsn_jax.config import Implementation

REPEATS = 5
"""Timed calls of each implementation; the quickest counts."""

TOLERANCE = 0.05
"""Largest error of a cotangent relative to its largest number: bfloat16 and TF32 products."""


class Sizes(NamedTuple):
    """Everything that the speed of the sum depends on.

    Attributes:
      batch: sequences on a device.
      heads: H.
      length: L.
      score_width: E.
      value_width: G.
      dtype: name of the dtype of queries, keys and values.
    """

    batch: int
    heads: int
    length: int
    score_width: int
    value_width: int
    dtype: str


def of_auto(query: Array, value_width: int) -> Implementation:
    """Returns what ``auto`` means for queries ``[B, H, L, E]`` and values ``[B, H, L, G]``.

    ``xla``, or ``auto`` itself for ``fsn_jax.kernels``: the kernel wherever it can be lowered.
    """
    if jax.default_backend() not in ("gpu", "tpu") or jax.process_count() > 1:
        return "xla"
    if jax.device_count() > 1 and not jax.sharding.get_abstract_mesh().manual_axes:
        return "xla"  # a kernel in a program that jax.jit divides by itself is gathered or refused
    batch, heads, length, score_width = query.shape
    sizes = Sizes(batch, heads, length, score_width, value_width, query.dtype.name)
    return "auto" if fastest(sizes) == "pallas" else "xla"


@functools.cache
def fastest(sizes: Sizes) -> Implementation:
    """Measures the fused kernel and the blocks, forward and backward, on one device.

    A kernel that does not compile, or is not right, is reported by a warning and not used.

    Returns:
      ``pallas`` or ``xla``; remembered for the life of the process.
    """
    rng = np.random.default_rng(0)
    leading = (sizes.batch, sizes.heads, sizes.length)
    widths = (sizes.score_width, sizes.score_width, sizes.value_width)
    with jax.ensure_compile_time_eval():  # a caller may be in the middle of tracing
        arrays = [
            jnp.asarray(rng.normal(size=(*leading, w)), jnp.dtype(sizes.dtype)) for w in widths
        ]
        arrays[0] *= max(sizes.score_width, 1) ** -0.5
    blocks_seconds, expected = _run("xla", arrays)
    try:
        seconds, found = _run("pallas", arrays)
        for ours, right in zip(found, expected, strict=True):
            error = np.abs(ours - right).max(initial=0)
            if not error <= TOLERANCE * max(1.0, np.abs(right).max(initial=0)):
                raise ArithmeticError(f"a cotangent is off by {error:.1e}")
    except Exception as error:  # whatever a compiler raises, there is another way
        first = (str(error).splitlines() or [""])[0]
        warnings.warn(
            f"the fused kernel is not used for {sizes}: {type(error).__name__}: {first}",
            stacklevel=2,
        )
        return "xla"
    return "pallas" if seconds < blocks_seconds else "xla"


def _run(implementation: Implementation, arrays: list[Array]) -> tuple[float, list[np.ndarray]]:
    """Seconds of one forward and backward pass, and the cotangents."""

    def both(query: Array, key: Array, value: Array) -> tuple[Array, ...]:
        total, own, log = kernels.forward(query, key, value, implementation=implementation)
        d_total = jnp.sin(total)
        mean = jnp.sum(d_total * total, axis=-1) + own
        d_own_score = own * (1 - mean)
        d_total = d_total.astype(value.dtype)
        return kernels.backward(
            query, key, value, log, d_total, mean, d_own_score, implementation=implementation
        )

    program = jax.jit(both).lower(*arrays).compile()
    cotangents = jax.block_until_ready(program(*arrays))
    quickest = np.inf
    for _ in range(REPEATS):
        began = time.perf_counter()
        jax.block_until_ready(program(*arrays))
        quickest = min(quickest, time.perf_counter() - began)
    return quickest, [np.asarray(x, np.float64) for x in cotangents]
