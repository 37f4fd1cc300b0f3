"""What only a GPU or TPU can show: the fused kernels compiled, at the sizes of the tuned arms.

``python -m pytest -m gpu`` runs them on whatever accelerator JAX finds.
"""

import dataclasses

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import enwik8
from fsn_jax import FSN
from fsn_jax.causal import causal_sum
from fsn_jax.kernels import choice
from train.kernel_choice import sizes_of

pytestmark = pytest.mark.gpu

ARMS = {
    "fsn_pocket": (enwik8.FSN_POCKET, 256),
    "fsn_1m": (enwik8.FSN_1M, 512),
    "projected_pocket": (enwik8.PROJECTED_POCKET, 256),
    "projected_1m": (enwik8.PROJECTED_1M, 512),
}
# TF32 and bfloat16 keep 10 and 7 bits of each factor.
TOLERANCE = {"float32": 5e-3, "bfloat16": 5e-2}


@pytest.fixture(autouse=True)
def _accelerator():
    if jax.default_backend() not in ("gpu", "tpu"):
        pytest.skip("JAX finds no accelerator")


def widths(config):
    return 2 * config.score_pairs, 2 * config.num_harmonics * config.phases_per_kernel


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("arm", ARMS)
def test_the_kernel_compiles_and_is_right(arm, dtype):
    """A kernel that is not would be a warning, which is an error here."""
    config, length = ARMS[arm]
    choice.measured.cache_clear()
    config = dataclasses.replace(config, dtype=dtype)
    assert choice.fastest(sizes_of(config, rows=8, context=length)) in ("pallas", "xla")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("length", [200, 512, 1024])
def test_the_sum_and_its_gradients_are_those_of_the_whole_matrix(length, dtype):
    rng = np.random.default_rng(0)
    score, value = widths(enwik8.PROJECTED_1M)
    arrays = [jnp.asarray(rng.normal(size=(2, 4, length, w)), dtype) for w in (score, score, value)]
    arrays[0] *= score**-0.5

    def loss(implementation, *arrays):
        summed = causal_sum(*arrays, include_self=False, implementation=implementation)
        return jnp.sin(summed.total).sum() + summed.self_weight.sum(), summed

    found = {
        name: jax.jit(
            jax.grad(lambda *a, name=name: loss(name, *a), argnums=(0, 1, 2), has_aux=True)
        )(*arrays)
        for name in ("pallas", "reference")
    }
    for ours, exact in zip(*map(jax.tree.leaves, found.values()), strict=True):
        exact = np.asarray(exact, np.float64)
        error = np.abs(np.asarray(ours, np.float64) - exact).max()
        assert error < TOLERANCE[dtype] * max(1.0, np.abs(exact).max())


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_model_has_the_same_loss_and_gradients_with_the_kernel(dtype):
    config, length = ARMS["fsn_pocket"]
    tokens = cases.tokens(4, length)
    params = jax.jit(FSN(config).init)(jax.random.key(0), tokens)

    def run(implementation):
        model = FSN(dataclasses.replace(config, implementation=implementation, dtype=dtype))

        def loss(params):
            return -jax.nn.log_softmax(model.apply(params, tokens))[..., 0].mean()

        return jax.jit(jax.value_and_grad(loss))(params)

    (ours, gradients), (exact, expected) = run("pallas"), run("reference")
    assert abs(float(ours) - float(exact)) < TOLERANCE[dtype] * float(exact)
    ours, exact = (
        np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
        for tree in (gradients, expected)
    )
    assert np.linalg.norm(ours - exact) < 4 * TOLERANCE[dtype] * np.linalg.norm(exact)
