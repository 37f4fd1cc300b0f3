"""What is computed again in the backward pass: the same numbers, and nothing kept for it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from fsn_jax.recompute import delay_until, recomputed
from fsn_jax.torus import Complex
from train.mesh import data_mesh

SHAPE = (4, 256)
leaves = jax.tree.leaves


def mix(z: Complex, gain):
    """Several elementwise arrays on the way to one, of a tree of arguments."""
    wave = jnp.sin(z.re * gain) * jnp.exp(-z.im * z.im)
    return wave * jax.nn.sigmoid(wave) + z.re


def arguments(dtype="float32"):
    rng = np.random.default_rng(0)
    re, im, gain = (
        jnp.asarray(rng.normal(size=shape), dtype) for shape in (SHAPE, SHAPE, (1, 256))
    )
    return Complex(re, im), gain


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("compiled", [True, False])
def test_the_same_values_and_gradients(dtype, compiled):
    def of(function):
        program = jax.value_and_grad(lambda *a: jnp.sum(function(*a) ** 2), argnums=(0, 1))
        return (jax.jit(program) if compiled else program)(*arguments(dtype))

    rtol = 1e-6 if dtype == "float32" else 0.05
    for plain, again in zip(leaves(of(mix)), leaves(of(recomputed(mix))), strict=True):
        assert plain.dtype == again.dtype
        np.testing.assert_allclose(
            again.astype("float32"), plain.astype("float32"), rtol=rtol, atol=rtol
        )


def test_second_derivatives_of_reverse_mode():
    def of(function):
        def slope(x):
            return jnp.sum(jax.grad(lambda x: jnp.sum(function(*x) ** 2))(x)[1] ** 2)

        return jax.grad(slope)(arguments())

    for plain, again in zip(leaves(of(mix)), leaves(of(recomputed(mix))), strict=True):
        np.testing.assert_allclose(again, plain, rtol=1e-4, atol=1e-5)


def test_for_each_of_an_ensemble_and_on_each_of_a_mesh():
    z, gain = arguments()
    gradient = jax.grad(lambda z, gain: jnp.sum(recomputed(mix)(z, gain)))
    expected = jax.grad(lambda z, gain: jnp.sum(mix(z, gain)))(z, gain)
    mesh = data_mesh(jax.devices()[:4])
    rows, whole = PartitionSpec("data"), PartitionSpec()
    divided = jax.shard_map(gradient, mesh=mesh, in_specs=(rows, whole), out_specs=rows)
    by_row = jax.vmap(gradient, (0, None))(z, gain[0])
    for found in (by_row, jax.jit(divided)(z, gain)):
        for part, right in zip(found, expected, strict=True):
            np.testing.assert_allclose(part, right, rtol=1e-5, atol=1e-6)


def test_the_definition_keeps_forward_mode():
    z, gain = arguments()
    assert recomputed(mix, "reference") is mix
    with pytest.raises(TypeError, match='implementation="reference"'):
        jax.jvp(lambda x: recomputed(mix)(z, x), (gain,), (gain,))


def layers(function, x, matrices):
    for matrix in matrices:
        x = function(Complex(x, x), matrix[:1]) @ matrix
    return jnp.sum(x * x)


def test_a_cpu_keeps_less():
    """Eight layers of five arrays between two products; the two products alone are kept."""
    x = jax.ShapeDtypeStruct((1024, 256), jnp.float32)
    matrices = jax.ShapeDtypeStruct((8, 256, 256), jnp.float32)

    def scratch(function):
        program = jax.jit(jax.grad(lambda x, m: layers(function, x, m)))
        memory = program.lower(x, matrices).compile().memory_analysis()
        return memory.temp_size_in_bytes / (1024 * 256 * 4)

    plain, again = scratch(mix), scratch(recomputed(mix))
    assert again < 0.5 * plain


@pytest.mark.parametrize(("platform", "barrier"), [("cuda", True), ("tpu", True), ("cpu", False)])
def test_accelerators_get_a_barrier(platform, barrier):
    z, gain = arguments()
    traced = jax.jit(lambda g, z: delay_until(g, z)).trace(gain, z)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert ("optimization_barrier" in text) == barrier


def test_what_is_known_later_is_the_same():
    z, gain = arguments()
    for part, same in zip(delay_until(gain, z), z, strict=True):
        np.testing.assert_array_equal(part, same)
    np.testing.assert_array_equal(delay_until(jnp.zeros((0, 3)), gain), gain)
    overflowed = delay_until(jnp.full(3, jnp.inf), gain)
    assert jnp.isnan(overflowed).all(), "the step that this belongs to is not finite, and shows it"
