"""The blocked causal sum against the whole matrix: values, gradients, shapes, memory."""

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from fsn_jax.cache import attention_weights_cached, weighted_sum
from fsn_jax.causal import (
    CausalSum,
    causal_sum,
    merge_heads,
    split_heads,
)
from fsn_jax.kernels import choice, xla
from fsn_jax.kernels.xla import BLOCK, MAX_STRETCHES
from train.mesh import data_mesh

# float32 sums over at most 30 terms in another order; bfloat16 has 8 bits of mantissa.
TOLERANCE = {"float32": {"rtol": 1e-4, "atol": 1e-5}, "bfloat16": {"rtol": 0.1, "atol": 0.1}}


def inputs(length: int, dtype: str) -> tuple[list[jax.Array], CausalSum]:
    rng = np.random.default_rng(length)
    arrays = [jnp.asarray(rng.normal(size=(2, 3, length, w)), dtype) for w in (6, 6, 10)]
    weights = CausalSum(
        jnp.asarray(rng.normal(size=(2, 3, length, 10)), jnp.float32),
        jnp.asarray(rng.normal(size=(2, 3, length)), jnp.float32),
    )
    return arrays, weights


def value_and_gradients(implementation: str, arrays, weights, include_self):
    def weighted(query, key, value):
        result = causal_sum(
            query, key, value, include_self=include_self, implementation=implementation
        )
        total = jnp.sum(result.total * weights.total)
        return total + jnp.sum(result.self_weight * weights.self_weight), result

    # A new function each time, so that jit sees the block size of the moment.
    both = jax.jit(jax.value_and_grad(weighted, argnums=(0, 1, 2), has_aux=True))
    (_, result), gradients = both(*arrays)
    return result, gradients


@pytest.mark.parametrize(
    ("block", "max_stretches", "length", "dtype", "include_self", "narrow"),
    [
        (128, 8, 13, "float32", False, 64),  # one block, shorter than BLOCK
        (4, 8, 13, "float32", False, 64),  # several, the last one padded
        (4, 2, 29, "float32", True, 64),  # a scan over the blocks of each of two stretches
        (4, 3, 16, "bfloat16", False, 64),  # stretches of unequal length
        (1, 8, 3, "float32", True, 64),
        (4, 2, 13, "float32", False, 6),  # the products that wide models take, for all arrays
    ],
)
def test_blocks_equal_the_whole_matrix(
    monkeypatch, block, max_stretches, length, dtype, include_self, narrow
):
    monkeypatch.setattr(xla, "BLOCK", block)
    monkeypatch.setattr(xla, "MAX_STRETCHES", max_stretches)
    monkeypatch.setattr(xla, "NARROW", narrow)
    arrays, weights = inputs(length, dtype)
    got = value_and_gradients("xla", arrays, weights, include_self)
    expected = value_and_gradients("reference", arrays, weights, include_self)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(b, np.float64), **TOLERANCE[dtype]
        )


@pytest.mark.parametrize("include_self", [True, False])
def test_packed_segments_are_what_each_is_alone(monkeypatch, include_self):
    """Segments of 5, 9 and 3 tokens in one row, across blocks of four, in two stretches."""
    monkeypatch.setattr(xla, "BLOCK", 4)
    monkeypatch.setattr(xla, "MAX_STRETCHES", 2)
    arrays, _ = inputs(17, "float32")
    lengths = (5, 9, 3)
    ids = jnp.broadcast_to(np.repeat([7, 2, 9], lengths), (2, 17)).astype(jnp.int32)

    def run(segment_ids, *arrays):
        def loss(*arrays):
            result = causal_sum(
                *arrays, segment_ids, include_self=include_self, implementation="xla"
            )
            return jnp.sin(result.total).sum() + jnp.cos(result.self_weight).sum(), result

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*arrays)

    packed = run(ids, *arrays)
    ends = np.cumsum(lengths)
    alone = [
        run(None, *(x[:, :, end - length : end] for x in arrays))
        for length, end in zip(lengths, ends, strict=True)
    ]
    alone = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=2), *alone)
    for a, b in zip(jax.tree.leaves(packed), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_gradient_has_the_dtype_of_its_array():
    """Also where queries and keys are kept in fewer bits than values."""
    arrays, weights = inputs(13, "bfloat16")
    mixed = [*arrays[:2], arrays[2].astype(jnp.float32)]
    _, gradients = value_and_gradients("xla", mixed, weights, include_self=False)
    assert [x.dtype.name for x in gradients] == ["bfloat16", "bfloat16", "float32"]


def test_for_no_tokens_no_kernel_is_measured(monkeypatch):
    monkeypatch.setattr(choice, "of_auto", None)
    empty = [jnp.zeros((2, 3, 0, width)) for width in (6, 6, 10)]
    assert causal_sum(*empty, include_self=True).total.shape == (2, 3, 0, 10)


def test_the_first_token_has_only_itself():
    arrays, _ = inputs(5, "float32")
    strict = causal_sum(*arrays, include_self=False)
    np.testing.assert_array_equal(strict.total[:, :, 0], 0)
    np.testing.assert_array_equal(strict.self_weight[:, :, 0], 1)
    whole = causal_sum(*arrays, include_self=True)
    np.testing.assert_allclose(whole.total[:, :, 0], arrays[2][:, :, 0], rtol=1e-6)


def test_extreme_scores_stay_finite():
    (query, key, value), weights = inputs(9, "float32")
    result, gradients = value_and_gradients("xla", [1e4 * query, key, value], weights, False)
    for array in jax.tree.leaves((result, gradients)):
        assert np.isfinite(array).all()


@pytest.mark.parametrize("length", [1024, 4096])
def test_no_square_array_at_any_length(length):
    """Neither the forward nor the backward pass holds an [L, L] array, block by block or whole."""
    shape = jax.ShapeDtypeStruct((1, 1, length, 8), jnp.float32)

    def loss(query, key, value):
        return causal_sum(query, key, value, include_self=False).total.sum()

    program = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(shape, shape, shape)
    largest = max(_sizes(program.jaxpr))
    assert largest <= BLOCK * length


def test_long_sequences_inside_shard_map():
    """With its default checks, where stretches of several blocks loop."""

    def gradient(x):
        return jax.grad(lambda x: jnp.sum(causal_sum(x, x, x, include_self=False).total ** 2))(x)

    rows = PartitionSpec("data")
    mesh = data_mesh(jax.devices()[:2])
    divided = jax.jit(jax.shard_map(gradient, mesh=mesh, in_specs=rows, out_specs=rows))
    x = jax.random.normal(jax.random.key(0), (2, 1, 2 * MAX_STRETCHES * BLOCK, 4))
    np.testing.assert_allclose(divided(x), jax.jit(gradient)(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("same", ["query", "key", "value"])
def test_what_is_the_same_on_all_devices_of_a_shard_map_gets_the_sum_of_its_cotangents(same):
    rng = np.random.default_rng(0)
    names = ("query", "key", "value")
    arrays = [jnp.asarray(rng.normal(size=(2, 1, 5, 4)), jnp.float32) for _ in names]
    arrays = [x[:1] if name == same else x for name, x in zip(names, arrays, strict=True)]

    def gradient(*arrays):
        def loss(*arrays):
            batch = max(x.shape[0] for x in arrays)
            alike = (jnp.broadcast_to(x, (batch, *x.shape[1:])) for x in arrays)
            return jnp.sin(causal_sum(*alike, include_self=True, implementation="xla").total).sum()

        return jax.grad(loss, argnums=(0, 1, 2))(*arrays)

    specs = tuple(PartitionSpec() if name == same else PartitionSpec("data") for name in names)
    mesh = data_mesh(jax.devices()[:2])
    divided = jax.jit(jax.shard_map(gradient, mesh=mesh, in_specs=specs, out_specs=specs))
    for ours, whole in zip(divided(*arrays), jax.jit(gradient)(*arrays), strict=True):
        np.testing.assert_allclose(ours, whole, rtol=1e-4, atol=1e-6)


def test_memory_does_not_grow_with_the_length():
    """Scratch of the compiled gradient, for as many tokens in fewer, longer sequences."""

    def scratch(length):
        def loss(query, key, value):
            return jnp.sum(causal_sum(query, key, value, include_self=False).total ** 2)

        narrow, wide = (
            jax.ShapeDtypeStruct((4096 // length, 1, length, width), jnp.float32)
            for width in (8, 64)
        )
        gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
        return gradient.lower(narrow, narrow, wide).compile().memory_analysis().temp_size_in_bytes

    assert scratch(4096) < 1.1 * scratch(1024)


def _sizes(jaxpr) -> list[int]:
    """Elements of every array that a program makes, inner programs included."""
    found = []
    for equation in jaxpr.eqns:
        found += [int(np.prod(v.aval.shape)) for v in equation.outvars]
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            found += _sizes(inner)
    return found


def test_the_cached_sum_of_two_queries():
    """At positions 3 and 4 of a cache of 7 slots, two sequences of three heads."""
    (query, key, value), _ = inputs(7, "float32")
    cached = key.swapaxes(2, 3).reshape(6, -1, 7)  # the layout of LayerCache
    weights = attention_weights_cached(
        query[:, :, :2], cached, xla.slots_before(jnp.int32(4), 2, 7)
    )
    scores = np.einsum("bhte,bhue->bhtu", query[:, :, :2], key, dtype=np.float64)
    for t in range(2):
        seen = np.exp(scores[:, :, t, : 4 + t])
        expected = seen / seen.sum(axis=-1, keepdims=True)
        np.testing.assert_allclose(weights[:, :, t, : 4 + t], expected, rtol=1e-5)
        assert not np.asarray(weights[:, :, t, 4 + t :]).any()
    total = np.einsum("bhtu,bhug->bhtg", weights, value, dtype=np.float64)
    summed = weighted_sum(weights, value.reshape(6, 7, -1))
    np.testing.assert_allclose(summed, total, rtol=1e-5, atol=1e-6)


def test_heads_are_contiguous_blocks():
    x = jnp.arange(2 * 3 * 8.0).reshape(2, 3, 8)
    heads = split_heads(x, 4)
    np.testing.assert_array_equal(heads[1, 2, 0], x[1, 0, 4:6])
    np.testing.assert_array_equal(merge_heads(heads), x)
