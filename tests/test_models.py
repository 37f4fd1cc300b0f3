"""What both models must survive: bfloat16, remat, ensembles, sharding over devices."""

import functools
from typing import Any, NamedTuple

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from fsn_jax import FSN, Transformer
from train.mesh import data_mesh

MODELS = {
    "fsn": lambda **changes: FSN(cases.fsn_config(**changes)),
    "fsn_modes": lambda **changes: FSN(
        cases.fsn_config(score="content_gated", feedforward="collective_modes", **changes)
    ),
    "transformer": lambda **changes: Transformer(cases.transformer_config(**changes)),
    "transformer_tied": lambda **changes: Transformer(
        cases.transformer_config(tied_embedding=True, **changes)
    ),
}
every_model = pytest.mark.parametrize("name", MODELS)
main_models = pytest.mark.parametrize("name", ["fsn", "transformer"])


def loss_and_logits(model, params, tokens):
    """Cross-entropy of the next token, and the logits."""
    logits = model.apply({"params": params}, tokens)
    log_probability = jax.nn.log_softmax(logits[:, :-1])
    picked = jnp.take_along_axis(log_probability, tokens[:, 1:, None], axis=-1)
    return -picked.mean(), logits


def step(model):
    """Compile (params, tokens) -> ((loss, logits), gradients)."""
    return jax.jit(jax.value_and_grad(lambda p, t: loss_and_logits(model, p, t), has_aux=True))


class Plain(NamedTuple):
    """One step of a model in float32 on one device: what the others are compared with."""

    params: Any
    tokens: jax.Array
    loss: jax.Array
    logits: jax.Array
    gradients: Any


@functools.cache
def plain(name, num_layers=1):
    tokens = cases.tokens(16, 7)
    model = MODELS[name](num_layers=num_layers)
    params = cases.random_variables(model, tokens)["params"]
    (loss, logits), gradients = step(model)(params, tokens)
    return Plain(params, tokens, loss, logits, gradients)


def all_leaves(tree):
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize("name", ["fsn", "fsn_modes", "transformer", "transformer_tied"])
def test_a_fresh_model_knows_nothing(name):
    """Its parameters are float32 and reproducible, its loss is near that of a uniform guess."""
    tokens = cases.tokens(8, 16)
    model = MODELS[name]()
    init = jax.jit(model.init)
    params = init(jax.random.key(1), tokens)["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    loss, _ = jax.jit(lambda p, t: loss_and_logits(model, p, t))(params, tokens)
    assert abs(float(loss) - np.log(11)) < 1.5
    same = init(jax.random.key(1), tokens)["params"]
    np.testing.assert_array_equal(all_leaves(same), all_leaves(params))
    other = init(jax.random.key(2), tokens)["params"]
    assert (all_leaves(other) != all_leaves(params)).any()


@every_model
def test_bfloat16_compute(name):
    """Parameters, logits and gradients stay float32; only the matrix products are coarser.

    bfloat16 keeps 8 bits, so a product is off by 0.4% and a sum of a dozen of them by about 1%;
    a layer with scores of order one leaves a few percent of the logits' spread.
    """
    exact = plain(name)
    coarse = MODELS[name](num_layers=1, dtype="bfloat16")
    kept = jax.tree.leaves(jax.eval_shape(coarse.init, jax.random.key(1), exact.tokens))
    assert {leaf.dtype for leaf in kept} == {jnp.dtype("float32")}
    (loss, logits), gradients = step(coarse)(exact.params, exact.tokens)
    assert logits.dtype == loss.dtype == jnp.float32
    rounded = logits.astype(jnp.bfloat16).astype(jnp.float32)
    assert np.mean(logits != rounded) > 0.9, "the last sum is not rounded to bfloat16"
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}
    error = np.sqrt(np.mean(np.square(logits - exact.logits))) / np.std(exact.logits)
    assert 1e-4 < error < 0.05
    assert abs(float(loss) - float(exact.loss)) < 0.02 * float(exact.loss)
    ours, theirs = all_leaves(exact.gradients), all_leaves(gradients)
    assert np.isfinite(theirs).all()
    assert np.linalg.norm(ours - theirs) < 0.1 * np.linalg.norm(ours)


@main_models
def test_double_precision_elsewhere_leaves_a_model_as_it_is(name):
    """``jax_enable_x64``, as another library may set it: parameters and logits stay float32."""
    tokens = cases.tokens(1, 5)
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    for changes in ({}, {"implementation": "reference"}, {"dropout": 0.5}):
        model = MODELS[name](num_layers=1, **changes)
        applied = functools.partial(model.init_with_output, deterministic=False)
        with jax.enable_x64(True):
            logits, variables = jax.eval_shape(applied, rngs, tokens)
        leaves = jax.tree.leaves((logits, variables))
        assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}, changes


def test_bfloat16_keeps_the_angles_of_an_fsn():
    """The state between blocks is float32: a bfloat16 angle of three turns is off by 0.06 rad."""
    tokens = cases.tokens(2, 5)
    model = FSN(cases.fsn_config(dtype="bfloat16"))
    _, state = jax.eval_shape(
        lambda: model.apply(
            model.init(jax.random.key(0), tokens),
            tokens,
            capture_intermediates=lambda _, method: method in ("__call__", "field"),
        )
    )
    for i in range(2):
        block = state["intermediates"][f"block_{i}"]
        (theta,), (field,) = block["__call__"], block["attention"]["field"]
        (update,) = block["feedforward"]["__call__"]
        assert {x.dtype for x in (theta, *field, update)} == {jnp.dtype("float32")}


@main_models
def test_remat_changes_nothing(name):
    before = plain(name, num_layers=2)
    model, remat = MODELS[name](), MODELS[name](remat=True)
    params, tokens = before.params, before.tokens
    assert cases.leaf_paths(params) == cases.leaf_paths(
        jax.eval_shape(remat.init, jax.random.key(1), tokens)["params"]
    )
    (loss, logits), gradients = step(remat)(params, tokens)
    # The same operations, but the compiler may fuse them differently: the last bits may differ.
    np.testing.assert_allclose(loss, before.loss, rtol=1e-6)
    np.testing.assert_allclose(logits, before.logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        all_leaves(gradients), all_leaves(before.gradients), rtol=1e-5, atol=1e-6
    )
    # Saved residuals, not only values: fewer numbers are kept for the backward pass.
    assert residuals(remat, params, tokens) < 0.6 * residuals(model, params, tokens)


def residuals(model, params, tokens):
    """Count the numbers that a forward pass keeps for the backward pass."""
    _, backward = jax.eval_shape(
        lambda p: jax.vjp(lambda q: loss_and_logits(model, q, tokens)[0], p), params
    )
    return sum(leaf.size for leaf in jax.tree.leaves(backward))


@every_model
def test_the_definition_has_derivatives_of_forward_mode(name):
    """Along a random direction, against the gradient of reverse mode."""
    p = plain(name)
    model = MODELS[name](num_layers=1, implementation="reference")
    along = jax.tree.map(lambda g: g + 0.1, p.gradients)

    def loss(params):
        return loss_and_logits(model, params, p.tokens)[0]

    slope = jax.jit(lambda *x: jax.jvp(loss, x[:1], x[1:])[1])(p.params, along)
    inner = np.vdot(all_leaves(along), all_leaves(p.gradients))
    np.testing.assert_allclose(slope, inner, rtol=1e-4)


@main_models
def test_ensemble_by_vmap(name):
    """Two models at once, each with its own parameters, on the same tokens."""
    alone = plain(name)
    model = MODELS[name](num_layers=1)
    other = cases.random_variables(model, alone.tokens, seed=1)["params"]
    stacked = jax.tree.map(lambda x, y: jnp.stack([x, y]), alone.params, other)
    together = jax.jit(
        jax.vmap(
            jax.value_and_grad(lambda p, t: loss_and_logits(model, p, t), has_aux=True),
            in_axes=(0, None),
        )
    )
    (losses, logits), gradients = together(stacked, alone.tokens)
    assert logits.shape == (2, *alone.logits.shape)
    assert losses[0] != losses[1]
    first = jax.tree.map(lambda leaf: leaf[0], gradients)
    np.testing.assert_allclose(losses[0], alone.loss, rtol=1e-5)
    np.testing.assert_allclose(logits[0], alone.logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(all_leaves(first), all_leaves(alone.gradients), rtol=1e-5, atol=1e-6)


@main_models
def test_batch_sharded_over_eight_devices(name):
    """A batch spread over a mesh gives the loss, logits and gradients of one device."""
    assert jax.device_count() == 8
    mesh = data_mesh()
    alone = plain(name)
    tokens = jax.device_put(alone.tokens, NamedSharding(mesh, PartitionSpec("data")))
    params = jax.device_put(alone.params, NamedSharding(mesh, PartitionSpec()))
    (loss, logits), gradients = step(MODELS[name](num_layers=1))(params, tokens)
    assert logits.sharding.shard_shape(logits.shape) == (2, 7, 11)
    # The sums over the batch run in another order, nothing else.
    np.testing.assert_allclose(loss, alone.loss, rtol=1e-6)
    np.testing.assert_allclose(logits, alone.logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        all_leaves(gradients), all_leaves(alone.gradients), rtol=1e-5, atol=1e-6
    )


@every_model
def test_gradients_inside_shard_map(name):
    """As in a training step of a user's own: JAX sums what each device finds for the parameters."""
    alone = plain(name)
    model, batch = MODELS[name](num_layers=1), PartitionSpec("data")

    def gradients(params, tokens):
        mean = jax.grad(lambda p: loss_and_logits(model, p, tokens)[0])(params)
        return jax.tree.map(lambda g: g / jax.device_count(), mean)

    divided = jax.shard_map(
        gradients,
        mesh=data_mesh(),
        in_specs=(PartitionSpec(), batch),
        out_specs=PartitionSpec(),
    )
    found = jax.jit(divided)(alone.params, alone.tokens)
    np.testing.assert_allclose(all_leaves(found), all_leaves(alone.gradients), rtol=1e-5, atol=1e-6)
