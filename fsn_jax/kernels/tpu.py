"""The strictly causal sum for TPUs, by Pallas and Mosaic.

Rows of the arrays are features and columns are tokens, so that a width of 28 costs 32 sublanes and
not 128 lanes, and statistics of a query are a row. Scores are ``[keys, queries]``. The softmax is
taken tile by tile, as in FlashAttention (arXiv 2205.14135); one backward kernel computes all three
cotangents. The grid has the tiles below and on the diagonal only.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu

from fsn_jax.kernels.xla import MASKED

Ref = Any
"""A reference to a block of an array, inside of a kernel."""

Columns = Any
"""What ``pl.ds`` returns."""

LANES = 128
"""Tokens come in multiples of this."""

MAX_BLOCK = 512
"""Most queries, and keys, of a tile."""

FORWARD_CHUNK, BACKWARD_CHUNK = 1, 2
"""Queries of a tile that are worked on together, in LANES; fastest by the compiler's schedule."""

VMEM = 16 * 2**20
"""Bytes of vector memory, beside the cotangent of a whole sequence of queries."""


def forward(
    query: Array, key: Array, value: Array, segments: Array | None = None, *, interpret: bool
) -> tuple[Array, ...]:
    """Computes the strict sum; see ``fsn_jax.kernels.forward``."""
    block = block_size(value.shape[2])
    chunk = _chunk_size(block, FORWARD_CHUNK)

    def kernel(tile: _Tile, inputs: Sequence[Ref], outputs: Sequence[Ref]) -> None:
        query, key, value, *segment_refs = inputs
        total_ref, own_ref, log_ref, largest_ref, normalizer_ref = outputs

        def work(diagonal: bool, first: bool) -> None:
            for start in range(0, block, chunk):
                columns = pl.ds(start, chunk)
                stop = start + chunk if diagonal else block
                q = query[0, :, columns]
                scores = _scores(key, q, segment_refs, columns, stop, diagonal)
                largest = jnp.max(scores, axis=0, keepdims=True)
                if diagonal:
                    own_score = _inner(q, key[0, :, columns])
                    largest = jnp.maximum(largest, own_score)
                if not first:
                    largest = jnp.maximum(largest, largest_ref[:, columns])
                weights = jnp.exp(scores - largest)
                normalizer = jnp.sum(weights, axis=0, keepdims=True)
                total = _dot(value[0, :, :stop], weights.astype(value.dtype), (1, 0))
                if not first:
                    fade = jnp.exp(largest_ref[:, columns] - largest)
                    normalizer += fade * normalizer_ref[:, columns]
                    total += fade * total_ref[0, :, columns]
                if diagonal:
                    own = jnp.exp(own_score - largest)
                    normalizer += own
                    inverse = 1 / normalizer
                    total_ref[0, :, columns] = total * inverse
                    own_ref[0, :, columns] = own * inverse
                    log_ref[0, :, columns] = largest + jnp.log(normalizer)
                else:
                    total_ref[0, :, columns] = total
                    largest_ref[:, columns], normalizer_ref[:, columns] = largest, normalizer

        tile.run(work)

    total, own, log = _call(
        kernel,
        "fsn_forward",
        [(query, _BY_QUERY), (key, _BY_KEY), (value, _BY_KEY)],
        segments,
        [(value.shape[3], _BY_QUERY), (1, _BY_QUERY), (1, _BY_QUERY)],
        keys_outside=False,
        scratch=[tpu.VMEM((1, block), jnp.float32)] * 2,
        interpret=interpret,
    )
    return total.astype(value.dtype), own[..., 0], log[..., 0]


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
    interpret: bool,
) -> tuple[Array, ...]:
    """Differentiates the strict sum; see ``fsn_jax.kernels.backward``."""
    block = block_size(value.shape[2])
    chunk = _chunk_size(block, BACKWARD_CHUNK)

    def kernel(tile: _Tile, inputs: Sequence[Ref], outputs: Sequence[Ref]) -> None:
        query, key, value, log, d_total, mean, d_own, *segment_refs = inputs
        d_query_ref, d_key_ref, d_value_ref = outputs

        def work(diagonal: bool, first: bool) -> None:
            # The last chunk first: on the diagonal it alone meets all keys.
            for start in reversed(range(0, block, chunk)):
                columns = pl.ds(start, chunk)
                stop = start + chunk if diagonal else block
                q, d_sum = query[0, :, columns], d_total[0, :, columns]
                scores = _scores(key, q, segment_refs, columns, stop, diagonal)
                weights = jnp.exp(scores - log[0, :, columns])
                d_weights = _dot(value[0, :, :stop], d_sum, (0, 0))
                d_scores = (weights * (d_weights - mean[0, :, columns])).astype(q.dtype)
                d_query = _dot(key[0, :, :stop], d_scores, (1, 0))
                if diagonal:
                    d_query += d_own[0, :, columns] * key[0, :, columns]
                rows = pl.ds(pl.multiple_of(jnp.int32(tile.query * block + start), LANES), chunk)
                _put(d_query_ref, rows, d_query, add=not first)
                add = not diagonal or stop < block
                _put(d_key_ref, pl.ds(0, stop), _dot(q, d_scores, (1, 1)), add=add)
                weights = weights.astype(d_sum.dtype)
                _put(d_value_ref, pl.ds(0, stop), _dot(d_sum, weights, (1, 1)), add=add)
            if diagonal:
                d_key_ref[0] += d_own[0] * query[0]

        tile.run(work)

    rows = [log_normalizer, mean, d_own_score]
    log_normalizer, mean, d_own_score = (x[..., None] for x in rows)
    cotangents = _call(
        kernel,
        "fsn_backward",
        [(query, _BY_QUERY), (key, _BY_KEY), (value, _BY_KEY)]
        + [(x, _BY_QUERY) for x in (log_normalizer, d_total, mean, d_own_score)],
        segments,
        [(query.shape[3], _WHOLE), (key.shape[3], _BY_KEY), (value.shape[3], _BY_KEY)],
        keys_outside=True,
        interpret=interpret,
    )
    return tuple(x.astype(query.dtype) for x in cotangents)


def block_size(length: int) -> int:
    """Returns how many queries, and keys, a tile has: what pads the length least, then the most."""
    if length <= MAX_BLOCK:
        return -(-length // LANES) * LANES
    sizes = range(MAX_BLOCK, MAX_BLOCK // 2 - 1, -LANES)
    return min(sizes, key=lambda size: -length % size)


def _chunk_size(block: int, lanes: int) -> int:
    return lanes * LANES if block % (lanes * LANES) == 0 else LANES


def _dot(x: Array, y: Array, contract: tuple[int, int]) -> Array:
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32)


def _inner(x: Array, y: Array) -> Array:
    product = x.astype(jnp.float32) * y.astype(jnp.float32)
    return jnp.sum(product, axis=0, keepdims=True)


def _scores(
    key: Ref,
    query: Array,
    segments: Sequence[Ref],
    columns: Columns,
    stop: int,
    diagonal: bool,
) -> Array:
    """Scores ``[keys, queries]`` of the first keys of a tile; masked pairs have MASKED."""
    scores = _dot(key[0, :, :stop], query, (0, 0))
    if segments:
        of_query, of_key = segments
        alike = of_key[0, :stop, :] == of_query[0, :, columns]
        scores = jnp.where(alike, scores, MASKED)
    if diagonal:
        source, time = (jax.lax.broadcasted_iota(jnp.int32, scores.shape, a) for a in (0, 1))
        scores = jnp.where(source < time + (stop - query.shape[1]), scores, MASKED)
    return scores


def _put(ref: Ref, columns: Columns, value: Array, *, add: bool) -> None:
    if add:
        ref[0, :, columns] += value
    else:
        ref[0, :, columns] = value


class _Tile(NamedTuple):
    """The block of queries and the block of keys that a grid point works on.

    Attributes:
      query: index of the block of queries.
      key: index of the block of keys.
      alone: whether it is the only tile of its sequence.
    """

    query: Array | int
    key: Array | int
    alone: bool

    def run(self, work: Callable[[bool, bool], None]) -> None:
        """Calls ``work(diagonal, first)``; ``first`` is the first block of keys of all queries."""
        if self.alone:
            work(True, True)
            return
        for diagonal in (True, False):
            for first in (True, False):
                here = ((self.query == self.key) == diagonal) & ((self.key == 0) == first)
                pl.when(here)(functools.partial(work, diagonal, first))


# Which columns of an array a grid point works on: those of its queries, of its keys, or all.
_BY_QUERY, _BY_KEY, _WHOLE = "query", "key", "whole"


def _tiles(num_blocks: int, keys_outside: bool) -> tuple[np.ndarray, ...]:
    """Blocks of queries and of keys of every tile, int32, in the order of the grid."""
    pairs = [(i, j) for i in range(num_blocks) for j in range(i + 1)]
    if keys_outside:
        pairs.sort(key=lambda pair: pair[::-1])
    return tuple(np.array(pairs, np.int32).T)


def _packed(x: Array, padded: int) -> Array:
    """``[B, H, L, W]`` as the kernels take it, ``[B H, W, padded]``."""
    batch, heads, length, width = x.shape
    x = x.reshape(batch * heads, length, width).swapaxes(1, 2)
    # Padded keys come after every real query, and padded queries are cut off.
    return jnp.pad(x, ((0, 0), (0, int(width == 0)), (0, padded - length)))


def _spec(width: int, columns: str, *, block: int, length: int) -> pl.BlockSpec:
    if columns == _WHOLE:
        return pl.BlockSpec((1, width, length), lambda s, tile, query, key: (s, 0, 0))
    pick = {_BY_QUERY: 0, _BY_KEY: 1}[columns]
    return pl.BlockSpec((1, width, block), lambda s, tile, *blocks: (s, 0, blocks[pick][tile]))


def _call(
    kernel: Callable[[_Tile, Sequence[Ref], Sequence[Ref]], None],
    name: str,
    inputs: list[tuple[Array, str]],
    segments: Array | None,
    outputs: list[tuple[int, str]],
    *,
    keys_outside: bool,
    scratch: Sequence[Any] = (),
    interpret: bool,
) -> tuple[Array, ...]:
    """Runs a kernel over the tiles of all heads of all sequences.

    Inputs are ``[B, H, L, W]``; outputs, of which the widths are given, are float32 of that form.
    """
    batch, heads, length, _ = inputs[0][0].shape
    block = block_size(length)
    padded = length + -length % block
    num_blocks = padded // block
    tiles = _tiles(num_blocks, keys_outside)

    spec = functools.partial(_spec, block=block, length=padded)
    arrays = [_packed(x, padded) for x, _ in inputs]
    in_specs = [spec(x.shape[1], c) for x, (_, c) in zip(arrays, inputs, strict=True)]
    if segments is not None:
        row = jnp.pad(segments, ((0, 0), (0, 0), (0, padded - length)))
        arrays += [row, row.swapaxes(1, 2)]
        in_specs += [
            pl.BlockSpec((1, 1, block), lambda s, tile, query, key: (s // heads, 0, query[tile])),
            pl.BlockSpec((1, block, 1), lambda s, tile, query, key: (s // heads, key[tile], 0)),
        ]

    def body(query_ref: Ref, key_ref: Ref, *refs: Ref) -> None:
        tile = pl.program_id(1)
        here = _Tile(query_ref[tile], key_ref[tile], num_blocks == 1)
        kernel(here, refs[: len(arrays)], refs[len(arrays) :])

    widths = [max(width, 1) for width, _ in outputs]
    whole = sum(w for w, (_, columns) in zip(widths, outputs, strict=True) if columns == _WHOLE)
    results = pl.pallas_call(
        body,
        out_shape=[jax.ShapeDtypeStruct((batch * heads, w, padded), jnp.float32) for w in widths],
        grid_spec=tpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch * heads, len(tiles[0])),
            in_specs=in_specs,
            out_specs=[spec(w, c) for w, (_, c) in zip(widths, outputs, strict=True)],
            scratch_shapes=scratch,
        ),
        compiler_params=tpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=VMEM + 8 * (whole + 8) * padded,  # twice, while one is written out
        ),
        interpret=interpret,
        name=name,
    )(*tiles, *arrays)
    return tuple(
        x[:, :width, :length].swapaxes(1, 2).reshape(batch, heads, length, width)
        for x, (width, _) in zip(results, outputs, strict=True)
    )
