"""A layer in somebody else's program: under Flax's and JAX's transformations, at the edges."""

import doctest
import functools
import subprocess
import sys

import cases
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fsn_jax.attention
from fsn_jax import FSN, CollectiveModes, FrustratedAttention, PhasorSwiGLU, Transformer

THETA = cases.angles(2, 5, 8)
LAYER = FrustratedAttention(num_heads=2)
MODELS = {
    "fsn": lambda **changes: FSN(cases.fsn_config(score="gated", **changes)),
    "transformer": lambda **changes: Transformer(cases.transformer_config(**changes)),
}
every_model = pytest.mark.parametrize("name", MODELS)


def test_the_example_of_the_docstring():
    result = doctest.testmod(fsn_jax.attention)
    assert result.attempted > 4 and not result.failed


@pytest.mark.parametrize("layer", [LAYER, CollectiveModes(num_modes=3), PhasorSwiGLU()])
def test_a_layer_reads_the_number_of_phases_from_its_input(layer):
    for num_phases in (8, 12):
        theta = cases.angles(1, 3, num_phases)
        update, variables = jax.jit(layer.init_with_output)(jax.random.key(0), theta)
        assert update.shape == theta.shape and update.dtype == jnp.float32
        widths = [leaf.shape for leaf in jax.tree.leaves(variables)]
        assert any(num_phases in shape for shape in widths)


def test_scanned_and_rematerialized_layers_are_the_layers_one_by_one():
    class Step(nn.Module):
        @nn.compact
        def __call__(self, theta, _):
            return theta + FrustratedAttention(num_heads=2, name="layer")(theta), None

    stack = nn.scan(
        nn.remat(Step), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
    )()
    variables = jax.jit(stack.init)(jax.random.key(0), THETA, None)

    def one_by_one(variables):
        theta = THETA
        for i in range(3):
            params = jax.tree.map(lambda leaf, i=i: leaf[i], variables["params"]["layer"])
            theta = theta + LAYER.apply({"params": params}, theta)
        return theta

    def scanned(variables):
        return stack.apply(variables, THETA, None)[0]

    def loss(variables, stack):
        theta = stack(variables)
        return jnp.sin(theta).sum(), theta

    gradient = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    (ours, theta), (theirs, expected) = (
        gradient(variables, stack) for stack in (scanned, one_by_one)
    )
    np.testing.assert_allclose(theta, expected, atol=1e-5)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_an_ensemble_over_seeds():
    ensemble = nn.vmap(
        FrustratedAttention, in_axes=None, variable_axes={"params": 0}, split_rngs={"params": True},
        axis_size=3,
    )(num_heads=2)  # fmt: skip
    updates, variables = jax.jit(ensemble.init_with_output)(jax.random.key(0), THETA)
    assert updates.shape == (3, *THETA.shape)
    apply = jax.jit(LAYER.apply)
    for i in range(3):
        alone = apply(jax.tree.map(lambda leaf, i=i: leaf[i], variables), THETA)
        np.testing.assert_allclose(updates[i], alone, atol=1e-5)


def test_checkpointed_and_with_donated_arguments():
    variables = cases.random_variables(LAYER, THETA)

    def loss(variables, theta):
        return jnp.sin(LAYER.apply(variables, theta)).sum()

    expected = jax.jit(jax.grad(loss))(variables, THETA)
    again = jax.jit(jax.grad(jax.checkpoint(loss)))(variables, THETA)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    donated = jnp.copy(THETA)
    move = jax.jit(lambda v, theta: theta + LAYER.apply(v, theta), donate_argnums=1)
    moved = move(variables, donated)
    np.testing.assert_allclose(moved, THETA + LAYER.apply(variables, THETA), atol=1e-5)
    assert donated.is_deleted()


def test_second_derivatives_of_the_reference():
    layer = LAYER.clone(implementation="reference")
    variables = cases.random_variables(layer, THETA)
    theta = THETA[:1, :2]

    def loss(theta):
        return jnp.sin(layer.apply(variables, theta)).sum()

    hessian = np.asarray(jax.jit(jax.hessian(loss))(theta)).reshape(theta.size, -1)
    np.testing.assert_allclose(hessian, hessian.T, atol=1e-4)
    assert np.abs(hessian).max() > 0.1


@every_model
def test_nothing_is_nan_or_infinite_on_the_way(name):
    tokens = cases.tokens(1, 4)
    model = MODELS[name](num_layers=1)
    variables = cases.random_variables(model, tokens)
    with jax.debug_nans(True), jax.debug_infs(True):
        gradient = jax.grad(lambda v: jnp.sin(model.apply(v, tokens)).sum())(variables)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@every_model
def test_token_ids_out_of_range_give_nan(name):
    """From the token on, at least; with the cache, too."""
    model = MODELS[name](num_layers=1)
    tokens = cases.tokens(1, 4)
    variables = cases.random_variables(model, tokens)
    apply = jax.jit(model.apply, static_argnames="method")
    for token in (-1, -11, 11, 2**31 - 1):
        spoiled = tokens.at[0, 2].set(token)
        logits = apply(variables, spoiled)
        assert np.isnan(logits[:, 2:]).all()
        cache = model.apply(variables, 1, 4, method="empty_cache")
        cached, _ = apply(variables, spoiled, cache, method="extend")
        assert np.isnan(cached[:, 2:]).all()


@every_model
def test_tokens_of_64_bits(name):
    model = MODELS[name](num_layers=1)
    tokens = cases.tokens(1, 4)
    variables = cases.random_variables(model, tokens)
    expected = jax.jit(model.apply)(variables, tokens)
    with jax.enable_x64(True):
        wide = jnp.asarray(np.asarray(tokens), jnp.int64)
        assert wide.dtype == jnp.int64
        logits = jax.jit(model.apply)(variables, wide)
        assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, atol=1e-5)


@every_model
@pytest.mark.parametrize("shape", [(0, 4), (2, 1), (2, 0)])
def test_no_rows_and_rows_of_one_token_or_none(name, shape):
    model = MODELS[name](num_layers=1)
    variables = cases.random_variables(model, cases.tokens(1, 4))
    tokens = jnp.zeros(shape, jnp.int32)

    def loss(variables):
        logits = model.apply(variables, tokens)
        return jnp.sin(logits).sum(), logits

    gradient, logits = jax.jit(jax.grad(loss, has_aux=True))(variables)
    assert logits.shape == (*shape, 11)
    leaves = jax.tree.leaves(gradient)
    assert all(np.isfinite(leaf).all() for leaf in leaves)
    assert any(leaf.any() for leaf in leaves) == (tokens.size > 0)


EXPORTED = """
import jax, jax.export, jax.numpy as jnp
from fsn_jax import FSN, FSNConfig, Transformer, TransformerConfig

fsn = FSN(FSNConfig(vocab_size=11, num_layers=1, num_phases=8))
for model in (fsn, Transformer(TransformerConfig(vocab_size=11, num_layers=1, width=8))):
    tokens = jnp.arange(12).reshape(3, 4) % 11
    variables = jax.jit(model.init)(jax.random.key(0), tokens)

    def exported(shape):
        shape = jax.export.symbolic_shape(shape)
        tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
        return jax.export.export(jax.jit(model.apply))(variables, tokens)

    logits = exported("b, 4").call(variables, tokens)
    same = jnp.allclose(logits, jax.jit(model.apply)(variables, tokens), atol=1e-5)
    try:
        exported("2, l")
    except ValueError as error:
        print(same, error)
"""


def test_an_exported_program_may_leave_its_batch_open_but_not_its_length():
    """In a process of its own: the run-time type checks of the tests know no symbolic lengths."""
    command = [sys.executable, "-c", EXPORTED]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    line = "True the sequence length must be a number, not l: export one program for each length"
    assert [text[: len(line)] for text in printed.splitlines()] == [line, line]


def test_weights_that_are_not_causal_give_nan():
    theta, weights = cases.angles(1, 4, 6), cases.random_attention(1, 2, 4)
    kappa = jnp.ones((2, 1, 6), jnp.complex64)
    update = functools.partial(fsn_jax.coupling.coupling_update, theta, kappa=kappa)
    assert np.isfinite(update(attention=weights)).all()
    assert np.isnan(update(attention=jnp.ones((1, 2, 4, 4)) / 4)).any()
