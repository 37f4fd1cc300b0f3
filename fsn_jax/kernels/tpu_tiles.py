"""What the TPU's kernels share: tiles of a sequence, and the grid over them.

Rows of the arrays are features and columns are tokens, so that a width of 28 costs 32 sublanes and
not 128 lanes, and statistics of a query are a row. Scores are ``[keys, queries]``. The grid has the
tiles below and on the diagonal only.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu

from fsn_jax.kernels.arrays import dot, varying_alike
from fsn_jax.kernels.xla import MASKED

Ref = Any
"""A reference to a block of an array, inside of a kernel."""

Columns = Any
"""What ``pl.ds`` returns."""

LANES = 128
"""Tokens come in multiples of this."""

MAX_BLOCK = 512
"""Most queries, and keys, of a tile."""

VMEM = 12 * 2**20
"""Bytes of vector memory for what is computed on the way, beside blocks of arrays and scratch."""

BY_QUERY, BY_KEY, AFTER_KEY, WHOLE, FIXED = "query", "key", "after", "whole", "fixed"
"""Which columns of an array a tile works on: its queries, its keys, LANES after them, the whole
sequence, or columns that are no tokens."""


class Tile(NamedTuple):
    """The block of queries and the block of keys that a grid point works on.

    Attributes:
      head: index of the head.
      query: index of the block of queries.
      key: index of the block of keys.
      num_blocks: of queries, and of keys.
      block: tokens of a block.
    """

    head: Array
    query: Array | int
    key: Array | int
    num_blocks: int
    block: int

    def run(self, work: Callable[[bool, bool], None]) -> None:
        """Calls ``work(diagonal, first)``; ``first`` is the first block of keys of all queries."""
        if self.num_blocks == 1:
            work(True, True)
            return
        for diagonal in (True, False):
            for first in (True, False):
                here = ((self.query == self.key) == diagonal) & ((self.key == 0) == first)
                pl.when(here)(functools.partial(work, diagonal, first))

    def in_sequence(self, block: Array | int, columns: Columns) -> Columns:
        """Where the columns of a block are in its sequence."""
        start = jnp.int32(block * self.block + columns.start)
        return pl.ds(pl.multiple_of(start, LANES), columns.size)

    def starts(self, shared: bool) -> Array | bool:
        """Whether it is the first tile of its sequence; if it is shared, of the first head."""
        first = (self.query == 0) & (self.key == 0)
        return first & (self.head == 0) if shared else first


def block_size(length: int) -> int:
    """Returns how many queries, and keys, a tile has: what pads the length least, then the most."""
    if length <= MAX_BLOCK:
        return -(-length // LANES) * LANES
    sizes = range(MAX_BLOCK, MAX_BLOCK // 2 - 1, -LANES)
    return min(sizes, key=lambda size: -length % size)


def chunk_size(block: int, lanes: int) -> int:
    """Returns how many queries of a tile are taken together: ``lanes`` times LANES, or LANES."""
    return lanes * LANES if block % (lanes * LANES) == 0 else LANES


def inner(x: Array, y: Array) -> Array:
    """Multiplies columns, float32 ``[1, columns]``."""
    product = x.astype(jnp.float32) * y.astype(jnp.float32)
    return jnp.sum(product, axis=0, keepdims=True)


def scores(
    key: Ref,
    query: Array,
    segments: Sequence[Ref],
    columns: Columns,
    stop: int,
    diagonal: bool,
) -> Array:
    """Scores ``[keys, queries]`` of the first keys of a tile; masked pairs have MASKED."""
    found = dot(key[:, :stop], query, (0, 0))
    if segments:
        of_query, of_key = segments
        found = jnp.where(of_key[:stop, :] == of_query[:, columns], found, MASKED)
    if diagonal:
        source, time = (jax.lax.broadcasted_iota(jnp.int32, found.shape, a) for a in (0, 1))
        found = jnp.where(source < time + (stop - query.shape[1]), found, MASKED)
    return found


def features_first(x: Array, multiple: int = 1) -> Array:
    """``[B, H, L, W]`` as the kernels take it, ``[B, H, W, L]``, of at least one row."""
    x = x.swapaxes(2, 3)
    rows = x.shape[2]
    return jnp.pad(x, ((0, 0), (0, 0), (0, max(rows, 1) - rows + -rows % multiple), (0, 0)))


def tokens_first(x: Array, width: int) -> Array:
    """The inverse of ``features_first``, given W."""
    return x[:, :, :width].swapaxes(2, 3)


def _tiles(num_blocks: int, keys_outside: bool) -> tuple[np.ndarray, ...]:
    """Blocks of queries and of keys of every tile, int32, in the order of the grid."""
    pairs = [(i, j) for i in range(num_blocks) for j in range(i + 1)]
    if keys_outside:
        pairs.sort(key=lambda pair: pair[::-1])
    return tuple(np.array(pairs, np.int32).T)


def _spec(shape: Sequence[int], columns: str, block: int) -> pl.BlockSpec:
    by_batch, by_head = (int(size > 1) for size in shape[:2])

    def index(b: Array, h: Array, tile: Array, query: Ref, key: Ref) -> tuple[Any, ...]:
        column: Any = 0
        if columns == AFTER_KEY:
            after = (key[tile] + 1) * (block // LANES)
            column = jnp.minimum(after, shape[3] // LANES - 1)
        elif columns in (BY_QUERY, BY_KEY):
            column = (query if columns == BY_QUERY else key)[tile]
        return b * by_batch, h * by_head, 0, column

    width = {BY_QUERY: block, BY_KEY: block, AFTER_KEY: LANES}.get(columns, shape[3])
    return pl.BlockSpec((None, None, shape[2], width), index)


def _column_spec(block: int) -> pl.BlockSpec:
    """Of an array ``[B, 1, L, 1]``: the rows of a tile's keys."""
    return pl.BlockSpec((None, None, block, 1), lambda b, h, tile, query, key: (b, 0, key[tile], 0))


def _num_bytes(arrays: Sequence[Any], specs: Sequence[pl.BlockSpec], scratch: Sequence[Any]) -> int:
    """Vector memory of blocks, each there twice while one is read or written, and of scratch."""

    def of_block(x: Any, spec: Any) -> int:
        rows, columns = spec.block_shape[2:]
        # Rows come eight at a time, and columns LANES.
        size: int = (rows + -rows % 8) * (columns + -columns % LANES) * x.dtype.itemsize
        return size

    blocks = sum(map(of_block, arrays, specs))
    return 2 * blocks + sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in scratch)


def _pad(x: Array, length: int) -> Array:
    # Padded keys come after every real query, and padded queries are cut off.
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, length - x.shape[3])))


def call(
    kernel: Callable[[Tile, Sequence[Ref], Sequence[Ref]], None],
    name: str,
    inputs: Sequence[tuple[Array, str]],
    segments: Array | None,
    outputs: Sequence[tuple[jax.ShapeDtypeStruct, str]],
    *,
    keys_outside: bool,
    scratch: Sequence[Any] = (),
    interpret: bool,
) -> tuple[Array, ...]:
    """Runs a kernel over the tiles of all heads of all sequences.

    Args:
      kernel: of a tile, inputs (then the segments of queries ``[1, block]`` and of keys
        ``[block, 1]``, if there are any), and outputs with scratch; arrays have rows and columns.
      name: of the kernel.
      inputs: ``[B, H, W, L]``, either B or H may be 1, and which columns a tile has. The first has
        all of B, H and L.
      segments: int32 ``[B, 1, L]`` or None.
      outputs: likewise. One that has one head is there for all heads of a sequence if it is WHOLE.
      keys_outside: whether all queries of a block of keys follow each other, or all keys of a block
        of queries.
      scratch: what remains from tile to tile.
      interpret: whether it runs as JAX operations.
    """
    batch, heads, _, length = inputs[0][0].shape
    block = block_size(length)
    padded = length + -length % block
    num_blocks = padded // block
    tiles = _tiles(num_blocks, keys_outside)

    arrays = [x if columns == FIXED else _pad(x, padded) for x, columns in inputs]
    in_specs = [_spec(x.shape, c, block) for x, (_, c) in zip(arrays, inputs, strict=True)]
    if segments is not None:
        row = _pad(segments[:, None], padded)
        arrays += [row, row.swapaxes(2, 3)]
        in_specs += [_spec(row.shape, BY_QUERY, block), _column_spec(block)]
    shapes = [
        jax.ShapeDtypeStruct((*s.shape[:3], s.shape[3] if c == FIXED else padded), s.dtype)
        for s, c in outputs
    ]

    def body(query_ref: Ref, key_ref: Ref, *refs: Ref) -> None:
        tile = pl.program_id(2)
        here = Tile(pl.program_id(1), query_ref[tile], key_ref[tile], num_blocks, block)
        kernel(here, refs[: len(arrays)], refs[len(arrays) :])

    out_specs = [_spec(s.shape, c, block) for s, (_, c) in zip(shapes, outputs, strict=True)]
    operands, shapes = varying_alike([*tiles, *arrays], shapes)
    results = pl.pallas_call(
        body,
        out_shape=shapes,
        grid_spec=tpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, heads, len(tiles[0])),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=scratch,
        ),
        compiler_params=tpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=VMEM
            + _num_bytes([*arrays, *shapes], [*in_specs, *out_specs], scratch),
        ),
        interpret=interpret,
        name=name,
    )(*operands)
    return tuple(
        x if columns == FIXED else x[..., :length]
        for x, (_, columns) in zip(results, outputs, strict=True)
    )
