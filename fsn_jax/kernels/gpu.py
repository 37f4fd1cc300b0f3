"""The strictly causal sum for NVIDIA GPUs, by Pallas and Triton.

One program a block of queries (or, for the gradients of keys and values, a block of keys) of one
head of one sequence; it walks through the blocks on its side of the diagonal. Triton wants every
size to be a power of two and at least 16.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from fsn_jax.kernels import tiles

BLOCK = 64
"""Queries, and keys, of a tile."""

WIDE = 128
"""Values wider than this take tiles of half the size, to stay within the registers."""


def padded_width(width: int) -> int:
    """The smallest width not below it that the kernel takes."""
    return max(16, 1 << (width - 1).bit_length()) if width else 16


def block_size(width: int) -> int:
    """Rows of a tile for values of a padded width."""
    return BLOCK if width <= WIDE else BLOCK // 2


def forward(
    query: Array, key: Array, value: Array, *, interpret: bool
) -> tuple[Array, Array, Array]:
    """The strict sum ``[S, L, G]``, self weights and log normalisers ``[S, L, 1]``, float32.

    Args:
      query: ``[S, L, E]``; S counts the heads of all sequences.
      key: as ``query``.
      value: ``[S, L, G]``. L is a multiple of ``block_size(G)``.
      interpret: run in JAX instead of being compiled, for tests.
    """
    block, width = block_size(value.shape[2]), value.shape[2]

    def kernel(query_ref, key_ref, value_ref, total_ref, own_ref, log_ref):  # type: ignore[no-untyped-def]
        here = pl.program_id(1)
        query, own_key = query_ref[0], key_ref[0, pl.ds(here * block, block), :]
        row = tiles.start_row(query, own_key, width)

        def add(step: Array, row: tiles.Row) -> tiles.Row:
            rows = pl.ds(step * block, block)
            return tiles.add_tile(
                row, query, key_ref[0, rows, :], value_ref[0, rows, :], diagonal=False
            )

        row = jax.lax.fori_loop(0, here, add, row)
        own_value = value_ref[0, pl.ds(here * block, block), :]
        row = tiles.add_tile(row, query, own_key, own_value, diagonal=True)
        total_ref[0], own_ref[0], log_ref[0] = tiles.finish_row(row, query, own_key)

    shapes = [jax.ShapeDtypeStruct((*value.shape[:2], w), jnp.float32) for w in (width, 1, 1)]
    arrays = [query, key, value]
    specs = [_rows(query.shape, block), _whole(key.shape), _whole(value.shape)]
    total, own, log = _call(kernel, "fsn_forward", arrays, specs, shapes, block, interpret)
    return total, own, log


def backward(
    query: Array,
    key: Array,
    value: Array,
    log_normaliser: Array,
    d_total: Array,
    mean: Array,
    *,
    interpret: bool,
) -> tuple[Array, Array, Array]:
    """Gradients of the strict sum by query, key and value, float32.

    Args:
      query: as for ``forward``.
      key: as for ``forward``.
      value: as for ``forward``.
      log_normaliser: of ``forward``.
      d_total: gradient by the sum, in the type of ``value``.
      mean: of the gradient by the weights, under the weights, ``[S, L, 1]``.
      interpret: as for ``forward``.
    """
    block = block_size(value.shape[2])
    num_blocks = value.shape[1] // block

    def query_kernel(query_ref, key_ref, value_ref, log_ref, d_total_ref, mean_ref, out_ref):  # type: ignore[no-untyped-def]
        here = pl.program_id(1)
        query, log, d_total, mean = query_ref[0], log_ref[0], d_total_ref[0], mean_ref[0]

        def tile(step: Array, diagonal: bool) -> Array:
            rows = pl.ds(step * block, block)
            key, value = key_ref[0, rows, :], value_ref[0, rows, :]
            return tiles.query_gradient(query, key, value, log, d_total, mean, diagonal=diagonal)

        zero = jnp.zeros(query.shape, jnp.float32)
        past = jax.lax.fori_loop(0, here, lambda step, sum_: sum_ + tile(step, False), zero)
        out_ref[0] = past + tile(here, True)

    def key_kernel(  # type: ignore[no-untyped-def]
        query_ref, key_ref, value_ref, log_ref, d_total_ref, mean_ref, d_key_ref, d_value_ref
    ):
        here = pl.program_id(1)
        key, value = key_ref[0], value_ref[0]

        def tile(step: Array, diagonal: bool) -> tuple[Array, Array]:
            rows = pl.ds(step * block, block)
            query, d_total = query_ref[0, rows, :], d_total_ref[0, rows, :]
            log, mean = log_ref[0, rows, :], mean_ref[0, rows, :]
            return tiles.key_value_gradients(
                query, key, value, log, d_total, mean, diagonal=diagonal
            )

        def add(step: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
            d_key, d_value = tile(step, False)
            return sums[0] + d_key, sums[1] + d_value

        sums = jax.lax.fori_loop(here + 1, num_blocks, add, tile(here, True))
        d_key_ref[0], d_value_ref[0] = sums

    arrays = [query, key, value, log_normaliser, d_total, mean]
    by_query = [_rows, _whole, _whole, _rows, _rows, _rows]
    by_key = [_whole, _rows, _rows, _whole, _whole, _whole]

    def specs(kinds: list[Callable[..., pl.BlockSpec]]) -> list[pl.BlockSpec]:
        return [kind(x.shape, block) for kind, x in zip(kinds, arrays, strict=True)]

    like = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (query, key, value)]
    (d_query,) = _call(
        query_kernel, "fsn_backward_query", arrays, specs(by_query), like[:1], block, interpret
    )
    d_key, d_value = _call(
        key_kernel, "fsn_backward_key", arrays, specs(by_key), like[1:], block, interpret
    )
    return d_query, d_key, d_value


def _rows(shape: tuple[int, ...], block: int) -> pl.BlockSpec:
    return pl.BlockSpec((1, block, shape[2]), lambda s, i: (s, i, 0))


def _whole(shape: tuple[int, ...], block: int = 0) -> pl.BlockSpec:
    del block
    return pl.BlockSpec((1, *shape[1:]), lambda s, i: (s, 0, 0))


def _call(
    kernel: Callable[..., None],
    name: str,
    arrays: list[Array],
    specs: list[pl.BlockSpec],
    shapes: list[jax.ShapeDtypeStruct],
    block: int,
    interpret: bool,
) -> tuple[Array, ...]:
    sequences, length = shapes[0].shape[:2]
    call = pl.pallas_call(
        kernel,
        out_shape=shapes,
        grid=(sequences, length // block),
        in_specs=specs,
        out_specs=[_rows(x.shape, block) for x in shapes],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name=name,
    )
    return tuple(call(*arrays))
