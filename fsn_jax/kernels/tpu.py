"""The strictly causal sum for TPUs, by Pallas and Mosaic.

The last axis of the grid runs in order and goes through the blocks on one side of the diagonal,
with the sums so far in scratch memory; a step on the other side does nothing, and names the block
that is already there so that nothing is fetched for it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu

from fsn_jax.kernels import tiles

BLOCK = 128
"""Queries, and keys, of a tile."""


def padded_width(width: int) -> int:
    """The smallest width not below it that the kernel takes."""
    return max(8, width)


def block_size(width: int) -> int:
    """Rows of a tile."""
    del width
    return BLOCK


def forward(
    query: Array, key: Array, value: Array, *, interpret: bool
) -> tuple[Array, Array, Array]:
    """As ``fsn_jax.kernels.gpu.forward``."""
    width = value.shape[2]

    def kernel(query_ref, own_key_ref, key_ref, value_ref, *outputs_and_row):  # type: ignore[no-untyped-def]
        total_ref, own_ref, log_ref, *row_refs = outputs_and_row
        here, step = pl.program_id(1), pl.program_id(2)

        def write(row: tiles.Row) -> None:
            for ref, part in zip(row_refs, row, strict=True):
                ref[...] = part

        def add(diagonal: bool) -> tiles.Row:
            row = tiles.Row(*(ref[...] for ref in row_refs))
            return tiles.add_tile(row, query_ref[0], key_ref[0], value_ref[0], diagonal=diagonal)

        @pl.when(step == 0)
        def _start() -> None:
            write(tiles.start_row(query_ref[0], own_key_ref[0], width))

        @pl.when(step < here)
        def _past() -> None:
            write(add(False))

        @pl.when(step == here)
        def _finish() -> None:
            row = add(True)
            total_ref[0], own_ref[0], log_ref[0] = tiles.finish_row(
                row, query_ref[0], own_key_ref[0]
            )

    total, own, log = _call(
        kernel,
        "fsn_forward",
        [(query, _outer), (key, _outer), (key, _not_after), (value, _not_after)],
        [(*value.shape[:2], w) for w in (width, 1, 1)],
        scratch=[1, 1, width],
        interpret=interpret,
    )
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
    """As ``fsn_jax.kernels.gpu.backward``."""

    def query_kernel(*refs) -> None:  # type: ignore[no-untyped-def]
        *inputs, out_ref, sum_ref = refs
        here, step = pl.program_id(1), pl.program_id(2)

        def add(diagonal: bool) -> None:
            sum_ref[...] += tiles.query_gradient(*(ref[0] for ref in inputs), diagonal=diagonal)

        @pl.when(step == 0)
        def _start() -> None:
            sum_ref[...] = jnp.zeros_like(sum_ref)

        @pl.when(step < here)
        def _past() -> None:
            add(False)

        @pl.when(step == here)
        def _finish() -> None:
            add(True)
            out_ref[0] = sum_ref[...]

    def key_kernel(*refs) -> None:  # type: ignore[no-untyped-def]
        *inputs, d_key_ref, d_value_ref, key_sum_ref, value_sum_ref = refs
        here, step = pl.program_id(1), pl.program_id(2)

        def tile(diagonal: bool) -> tuple[Array, Array]:
            return tiles.key_value_gradients(*(ref[0] for ref in inputs), diagonal=diagonal)

        @pl.when(step == here)
        def _start() -> None:
            key_sum_ref[...], value_sum_ref[...] = tile(True)

        @pl.when(step > here)
        def _later() -> None:
            d_key, d_value = tile(False)
            key_sum_ref[...] += d_key
            value_sum_ref[...] += d_value

        @pl.when(step == pl.num_programs(2) - 1)
        def _finish() -> None:
            d_key_ref[0], d_value_ref[0] = key_sum_ref[...], value_sum_ref[...]

    arrays = [query, key, value, log_normaliser, d_total, mean]
    by_query = [_outer, _not_after, _not_after, _outer, _outer, _outer]
    by_key = [_not_before, _outer, _outer, _not_before, _not_before, _not_before]
    call = functools.partial(_call, interpret=interpret)
    (d_query,) = call(
        query_kernel,
        "fsn_backward_query",
        list(zip(arrays, by_query, strict=True)),
        [query.shape],
        scratch=[query.shape[2]],
    )
    d_key, d_value = call(
        key_kernel,
        "fsn_backward_key",
        list(zip(arrays, by_key, strict=True)),
        [key.shape, value.shape],
        scratch=[key.shape[2], value.shape[2]],
    )
    return d_query, d_key, d_value


# Which block of an array a grid point (sequence and head, outer block, step) works on.
def _outer(s: Array, here: Array, step: Array) -> tuple[Any, ...]:
    del step
    return s, here, 0


def _not_after(s: Array, here: Array, step: Array) -> tuple[Any, ...]:
    return s, jnp.minimum(step, here), 0


def _not_before(s: Array, here: Array, step: Array) -> tuple[Any, ...]:
    return s, jnp.maximum(step, here), 0


def _call(
    kernel: Callable[..., None],
    name: str,
    inputs: Sequence[tuple[Array, Callable[..., tuple[Any, ...]]]],
    shapes: Sequence[tuple[int, ...]],
    *,
    scratch: Sequence[int],
    interpret: bool,
) -> tuple[Array, ...]:
    def spec(width: int, index: Callable[..., tuple[Any, ...]]) -> pl.BlockSpec:
        return pl.BlockSpec((1, BLOCK, width), index)

    sequences, length = shapes[0][:2]
    num_blocks = length // BLOCK
    call = pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
        grid=(sequences, num_blocks, num_blocks),
        in_specs=[spec(x.shape[2], index) for x, index in inputs],
        out_specs=[spec(shape[2], _outer) for shape in shapes],
        scratch_shapes=[tpu.VMEM((BLOCK, width), jnp.float32) for width in scratch],
        compiler_params=tpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
        name=name,
    )
    return tuple(call(*(x for x, _ in inputs)))
