"""Fused kernels of the strictly causal sum, one for NVIDIA GPUs and one for TPUs.

``fsn_jax.causal`` calls them; both have the same ``forward`` and ``backward``. They lower for their
platforms and are tested in interpreted mode, but **have not yet run on real hardware**.
"""

import functools
import warnings
from collections.abc import Callable
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fsn_jax.config import Implementation
from fsn_jax.kernels import gpu, tpu

Elsewhere = Callable[..., tuple[Array, ...]] | None
"""What runs on platforms without a kernel."""


def forward(
    query: Array, key: Array, value: Array, *, otherwise: Elsewhere = None
) -> tuple[Array, ...]:
    """The strict sum ``[B, H, L, G]``, self weights and log normalisers ``[B, H, L]``, float32.

    Compiled for the platform that the program is lowered for.

    Args:
      query: ``[B, H, L, E]``, float32 or bfloat16.
      key: as ``query``.
      value: ``[B, H, L, G]``.
      otherwise: takes the same arrays on a platform that has no kernel; None interprets the GPU's,
        which is slow and for tests.
    """
    leading, width = value.shape[:3], value.shape[3]

    def run(kernel: ModuleType, interpret: bool, *arrays: Array) -> tuple[Array, ...]:
        total, own, log = kernel.forward(*_pack(kernel, width, *arrays), interpret=interpret)
        return tuple(_unpack(x, leading) for x in (total[..., :width], own[..., 0], log[..., 0]))

    return _by_platform(run, otherwise, query, key, value)


def backward(
    query: Array,
    key: Array,
    value: Array,
    log_normaliser: Array,
    d_total: Array,
    mean: Array,
    *,
    otherwise: Elsewhere = None,
) -> tuple[Array, ...]:
    """Gradients of the strict sum by query, key and value, float32.

    Args:
      query: as for ``forward``.
      key: as for ``forward``.
      value: as for ``forward``.
      log_normaliser: of ``forward``.
      d_total: gradient by the sum, in the type of ``value``.
      mean: mean of the gradient by the weights, under the weights, ``[B, H, L]``.
      otherwise: as for ``forward``.
    """
    leading, widths = value.shape[:3], [x.shape[3] for x in (query, key, value)]

    def run(kernel: ModuleType, interpret: bool, *arrays: Array) -> tuple[Array, ...]:
        gradients = kernel.backward(*_pack(kernel, widths[2], *arrays), interpret=interpret)
        return tuple(
            _unpack(x[..., :width], leading) for x, width in zip(gradients, widths, strict=True)
        )

    return _by_platform(run, otherwise, query, key, value, log_normaliser, d_total, mean)


def _by_platform(
    run: Callable[..., tuple[Array, ...]], otherwise: Elsewhere, *arrays: Array
) -> tuple[Array, ...]:
    return jax.lax.platform_dependent(
        *arrays,
        tpu=functools.partial(run, tpu, False),
        cuda=functools.partial(run, gpu, False),
        default=otherwise or functools.partial(run, gpu, True),
    )


def _pack(kernel: ModuleType, width: int, *arrays: Array) -> list[Array]:
    """Heads and sequences to one axis, rows and widths up to what the kernel takes.

    Padding is harmless: padded keys come after every real query, padded queries are cut off, and
    zeros add nothing to an inner product.
    """
    block = kernel.block_size(kernel.padded_width(width))
    packed = []
    for x in arrays:
        batch, heads, length = x.shape[:3]
        wide = 1 if x.ndim == 3 else kernel.padded_width(x.shape[3])
        x = x.reshape(batch * heads, length, *(x.shape[3:] or (1,)))
        packed.append(jnp.pad(x, ((0, 0), (0, -length % block), (0, wide - x.shape[2]))))
    return packed


def _unpack(x: Array, leading: tuple[int, ...]) -> Array:
    return x[:, : leading[2]].reshape(*leading, *x.shape[2:])


@functools.cache
def works(length: int, score_width: int, value_width: int, dtype: str) -> bool:
    """Whether the kernels compile for these sizes on this machine, and are right.

    Forward and backward run once on one head of random numbers, against the XLA path; a
    kernel that fails is reported by a warning and not used. Later calls remember the answer.
    """
    from fsn_jax.causal import causal_sum  # it imports this module

    rng = np.random.default_rng(0)
    widths = (score_width, score_width, value_width)
    arrays = [rng.normal(size=(1, 1, length, w)).astype(jnp.dtype(dtype)) for w in widths]

    def gradients(implementation: Implementation) -> tuple[Array, ...]:
        def loss(*arrays: Array) -> Array:
            result = causal_sum(*arrays, include_self=False, implementation=implementation)
            return (jnp.sin(result.total).sum() + result.self_weight.sum()).astype(jnp.float32)

        # Compiled apart: a caller may be in the middle of tracing a program of its own.
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*arrays).compile()(*arrays)

    try:
        for pair in zip(gradients("pallas"), gradients("xla"), strict=True):
            actual, expected = (np.asarray(x, np.float64) for x in pair)
            error = np.abs(actual - expected).max(initial=0)
            if not error <= 0.05 * max(1.0, np.abs(expected).max(initial=0)):
                raise ArithmeticError(f"a gradient is off by {error:.1e}")
    except Exception as error:  # whatever a compiler raises, there is another way
        first = (str(error).splitlines() or [""])[0]
        warnings.warn(
            f"the fused kernel is not used for length {length}, widths {score_width} and "
            f"{value_width}, {dtype}: {type(error).__name__}: {first}",
            stacklevel=2,
        )
        return False
    return True
