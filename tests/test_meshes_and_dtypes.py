"""Gradients in other set-ups: JAX's default meshes, parameters of other dtypes, no tokens."""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from fsn_jax import FSN, FrustratedAttention, KuramotoAttention, Transformer, TransformerConfig
from fsn_jax.base_layer import LinearValueAttention
from fsn_jax.dense import PhasorDense
from fsn_jax.lookup import lookup
from fsn_jax.torus import Complex
from fsn_jax.transformer import RotaryAttention

BATCH, LENGTH = 4, 9
CONFIG = cases.fsn_config(num_layers=1)
EVERYTHING = cases.fsn_config(
    num_layers=1,
    heads_per_phase=2,
    features="quadrature",
    field_features=True,
    similarity_heads=1,
    feedforward="collective_modes",
)
TRANSFORMER = TransformerConfig(
    vocab_size=CONFIG.vocab_size, num_layers=1, width=8, num_heads=2, feedforward_width=12
)
MODULES = {
    "frustrated": cases.layer(FrustratedAttention, CONFIG),
    "gated": FrustratedAttention(num_heads=3),
    "linear_values": cases.layer(LinearValueAttention, CONFIG),
    "base": cases.layer(KuramotoAttention, CONFIG),
    "fsn": FSN(EVERYTHING),
    "transformer": Transformer(TRANSFORMER),
}


def inputs(name, batch=BATCH, length=LENGTH):
    module = MODULES[name]
    if isinstance(module, FSN | Transformer):
        return cases.tokens(batch, length, module.config.vocab_size)
    return cases.angles(batch, length, CONFIG.num_phases)


@functools.cache
def variables_of(name):
    return jax.jit(MODULES[name].init)(jax.random.key(0), inputs(name, batch=1))


@functools.cache
def gradient_of(name):
    """The compiled gradient of a loss by the variables, and the output."""

    def loss(variables, x):
        out = MODULES[name].apply(variables, x)
        return jnp.mean(jnp.sin(out)), out

    return jax.jit(jax.grad(loss, has_aux=True))


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=["explicit", "auto"])
@pytest.mark.parametrize("name", MODULES)
def test_a_batch_divided_over_a_mesh_of_either_kind(name, kind):
    """``jax.make_mesh`` makes Explicit axes by default."""
    x, variables, gradient = inputs(name), variables_of(name), gradient_of(name)
    expected = gradient(variables, x)
    mesh = jax.make_mesh((4,), ("data",), (kind,), devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        rows = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
        whole = jax.device_put(variables, NamedSharding(mesh, PartitionSpec()))
        found = gradient(whole, rows)
        assert found[1].sharding.spec[0] == "data"
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_rows_of_a_table_are_divided_as_their_ids_are():
    """Also where no mesh is set around the program."""
    mesh = jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])
    table = jax.device_put(jnp.ones((5, 3)), NamedSharding(mesh, PartitionSpec()))
    ids = jax.device_put(jnp.zeros((8, 2), int), NamedSharding(mesh, PartitionSpec("data")))
    assert jax.jit(lookup)(table, ids).sharding.spec[0] == "data"


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "bfloat16") for name in MODULES), ("frustrated", "float16")]
)
def test_gradients_have_the_dtype_of_their_parameters(name, dtype):
    x, gradient = inputs(name), gradient_of(name)
    cast = jax.tree.map(lambda leaf: leaf.astype(dtype), variables_of(name))
    gradients, _ = gradient(cast, x)
    expected, _ = gradient(jax.tree.map(jnp.float32, cast), x)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
        assert a.dtype == dtype
        scale = float(jnp.abs(b).max())
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=0.1, atol=0.05 * scale + 1e-6)


def test_what_all_tokens_share_learns_from_sums_in_float32():
    """A sum of 32,768 ones in bfloat16 ends at 256, in parts of it that are summed at 16,384."""
    z = Complex(*jnp.ones((2, 64, 512, 4)))
    dense = PhasorDense(outputs=3, use_bias=True, dtype="bfloat16")
    params = dense.init(jax.random.key(0), z)
    gradient = jax.jit(jax.grad(lambda p: dense.apply(p, z).astype(jnp.float32).sum()))(params)
    np.testing.assert_array_equal(gradient["params"]["bias"], 64 * 512)

    x, still = jnp.ones((64, 512, 8)), jnp.zeros(512, jnp.int32)
    expected = actual = None
    for dtype in ("float32", "bfloat16"):
        config = cases.transformer_config(token_shift="keys", width=8, num_heads=2, dtype=dtype)
        layer = RotaryAttention(config)
        params = layer.init(jax.random.key(1), x)

        def keys(params, layer=layer):
            _, key, _ = layer.apply(params, x, None, still, method="_of_whole_sequences")
            return key.astype(jnp.float32).sum()

        expected, actual = actual, jax.jit(jax.grad(keys))(params)["params"]["key_shift"]
    np.testing.assert_allclose(actual, expected, rtol=0.02, atol=0.01 * np.abs(expected).max())


@pytest.mark.parametrize("name", MODULES)
def test_parameters_of_half_precision_are_worked_on_in_float32(name):
    """Angles, temperatures and strengths lose what their type rounds, and nothing more."""
    cast = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), variables_of(name))
    apply, x = jax.jit(MODULES[name].apply), inputs(name)
    expected = apply(jax.tree.map(jnp.float32, cast), x)
    np.testing.assert_allclose(apply(cast, x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_reference_takes_parameters_of_other_dtypes(dtype):
    fast, x = MODULES["gated"], inputs("gated")
    slow = FrustratedAttention(num_heads=3, implementation="reference")
    cast = jax.tree.map(lambda leaf: leaf.astype(dtype), variables_of("gated"))
    actual, expected = (jax.jit(layer.apply)(cast, x) for layer in (slow, fast))
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
    assert {part.dtype for part in slow.apply(cast, method="kappa")} == {np.dtype("float32")}


@pytest.mark.parametrize("name", ["frustrated", "base"])
def test_float64_parameters(name):
    with jax.enable_x64(True):
        cast = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), variables_of(name))
        gradients, _ = gradient_of(name)(cast, inputs(name))
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {np.dtype("float64")}


@pytest.mark.parametrize(("batch", "length"), [(2, 0), (0, 3)])
@pytest.mark.parametrize("name", MODULES)
def test_no_tokens(name, batch, length):
    """The gradient is zero, not an error."""
    module, x = MODULES[name], inputs(name, batch, length)
    gradients = jax.jit(jax.grad(lambda v: jnp.sum(module.apply(v, x) ** 2)))(variables_of(name))
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradients))
