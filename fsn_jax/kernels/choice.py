"""Which implementation of the strictly causal sum, or of the coupling, is the faster here."""

import functools
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from fsn_jax import kernels
from fsn_jax.coupling import next_in_segment
from fsn_jax.fields import Implementation
from fsn_jax.kernels.arrays import CouplingInputs
from fsn_jax.torus import Complex, imaginary_product, kept_in, phasor

REPEATS = 5
"""Timed calls of each implementation; the quickest counts."""

TOLERANCE = 0.05
"""Largest error of a cotangent relative to its largest number, or to 1 if that is less.

Products are of bfloat16 or TF32.
"""


class Sizes(NamedTuple):
    """Everything that the speed of the sum depends on.

    Attributes:
      batch: sequences on a device.
      heads: H.
      length: L.
      score_width: E.
      value_width: G.
      dtype: name of the dtype of queries, keys and values.
      coupling: of the frustrated coupling, whose values are folded: T, M, and H of its phasors, 1
        if all heads couple the same phases. None: the sum alone.
      segments: whether tokens have segments.
    """

    batch: int
    heads: int
    length: int
    score_width: int
    value_width: int
    dtype: str
    coupling: tuple[int, int, int] | None = None
    segments: bool = False


def of_auto(
    query: Array,
    value_width: int,
    *,
    coupling: tuple[int, int, int] | None = None,
    segments: bool,
) -> Implementation:
    """Returns what ``auto`` means for queries ``[B, H, L, E]`` and values ``[B, H, L, G]``.

    ``xla``, or ``auto`` itself for ``fsn_jax.kernels``: the kernel wherever it can be lowered.
    ``coupling`` and ``segments`` are those of ``Sizes``.
    """
    if not all(isinstance(size, int) for size in query.shape):
        return "xla"  # of a size that jax.export leaves open there is nothing to measure
    if jax.default_backend() not in ("gpu", "tpu") or jax.process_count() > 1:
        return "xla"
    if jax.device_count() > 1 and not _is_wholly_manual(jax.sharding.get_abstract_mesh()):
        return "xla"  # a kernel in a program that jax.jit divides by itself is gathered or refused
    batch, heads, length, score_width = query.shape
    dtype = query.dtype.name
    sizes = Sizes(batch, heads, length, score_width, value_width, dtype, coupling, segments)
    return "auto" if fastest(sizes) == "pallas" else "xla"


def _is_wholly_manual(mesh: jax.sharding.AbstractMesh) -> bool:
    """Whether ``jax.shard_map`` (or ``jax.pmap``) divides over all axes."""
    return bool(mesh.manual_axes) and {*mesh.axis_names} <= {*mesh.manual_axes}


def fastest(sizes: Sizes) -> Implementation:
    """Returns what ``measured`` found, ``xla`` where it found nothing."""
    return measured(sizes) or "xla"


@functools.cache
def measured(sizes: Sizes) -> Implementation | None:
    """Measures the fused kernel and the blocks, forward and backward, on one device.

    Returns:
      ``pallas`` or ``xla``; None, with a warning, where the kernel does not compile, is not right,
      or finds no memory. Remembered for the life of the process.
    """
    # A thread has no mesh, and traces nothing, whatever its caller is in the middle of.
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_measured, sizes).result()


def _measured(sizes: Sizes) -> Implementation | None:
    try:
        arrays = _arrays(sizes)
        segments = None
        if sizes.segments:  # two of each row
            ids = np.arange(sizes.length, dtype=np.int32) // max(1, sizes.length // 2)
            segments = jnp.broadcast_to(ids, (sizes.batch, 1, sizes.length))
        blocks_seconds, expected = _run("xla", arrays, segments)
        seconds, found = _run("pallas", arrays, segments)
        for ours, right in zip(found, expected, strict=True):
            error = float(_largest(ours - right))
            if not error <= TOLERANCE * max(1.0, float(_largest(right))):
                raise ArithmeticError(f"a cotangent is off by {error:.1e}")
    except Exception as error:  # whatever a compiler or a full memory raises, there is another way
        first = (str(error).splitlines() or [""])[0]
        warnings.warn(
            f"the fused kernel is not used for {sizes}: {type(error).__name__}: {first}",
            stacklevel=2,
        )
        return None
    return "pallas" if seconds < blocks_seconds else "xla"


def _largest(x: Array) -> Array:
    return jnp.abs(x).max(initial=0)


def _arrays(sizes: Sizes) -> list[Array]:
    """Queries, keys and values; or instead of values phases and the kernel by head."""
    rng = np.random.default_rng(0)

    def draw(*shape: int, dtype: str = "float32") -> Array:
        return jnp.asarray(rng.normal(size=shape), jnp.dtype(dtype))

    batch, heads, length, score_width, value_width, dtype, coupling, _ = sizes
    query, key = (draw(batch, heads, length, score_width, dtype=dtype) for _ in range(2))
    query *= max(score_width, 1) ** -0.5
    if coupling is None:
        return [query, key, draw(batch, heads, length, value_width, dtype=dtype)]
    num_delays, num_harmonics, phasor_heads = coupling
    width = value_width // (2 * num_harmonics)
    kappa = [draw(num_delays, num_harmonics, heads, width) for _ in range(2)]
    return [query, key, draw(batch, phasor_heads, length, width), *kappa]


def _sum_cotangents(
    segments: Array | None,
    query: Array,
    key: Array,
    value: Array,
    *,
    implementation: Implementation,
) -> tuple[Array, ...]:
    total, own, log = kernels.forward(query, key, value, segments, implementation=implementation)
    d_total = jnp.sin(total)
    mean = jnp.sum(d_total * total, axis=-1) + own
    d_own_score = own * (1 - mean)
    return kernels.backward(
        query,
        key,
        value,
        log,
        d_total.astype(value.dtype),
        mean,
        d_own_score,
        segments,
        implementation=implementation,
    )


def _coupling_cotangents(
    segments: Array | None,
    query: Array,
    key: Array,
    theta: Array,
    *kappa: Array,
    implementation: Implementation,
) -> tuple[Array, ...]:
    z = kept_in(phasor(theta), query.dtype.name)
    follows = None if segments is None else next_in_segment(segments[:, 0])[:, None, :, None]
    inputs = CouplingInputs(query, key, z, Complex(*kappa), follows, segments)
    field, sums = kernels.coupling_forward(inputs, implementation=implementation)
    d_field = Complex(jnp.sin(field.re), jnp.sin(field.im))
    cotangents = kernels.coupling_backward(inputs, sums, d_field, implementation=implementation)
    return *cotangents[:2], imaginary_product(z, cotangents.z), *cotangents.kappa


def _run(
    implementation: Implementation, arrays: list[Array], segments: Array | None
) -> tuple[float, list[Array]]:
    """Seconds of one forward and backward pass, and the cotangents, float32."""
    cotangents_of = _sum_cotangents if len(arrays) == 3 else _coupling_cotangents
    both = functools.partial(cotangents_of, implementation=implementation)
    program = jax.jit(both).lower(segments, *arrays).compile()
    cotangents = jax.block_until_ready(program(segments, *arrays))
    quickest = np.inf
    for _ in range(REPEATS):
        began = time.perf_counter()
        jax.block_until_ready(program(segments, *arrays))
        quickest = min(quickest, time.perf_counter() - began)
    return quickest, [x.astype(jnp.float32) for x in cotangents]
