"""SwiGLU on phasors and collective modes: against the oracle, and what their equations imply."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from fsn_jax import CollectiveModes
from fsn_jax.feedforward import PhasorSwiGLU

LAYERS = {"swiglu": PhasorSwiGLU, "collective_modes": CollectiveModes}


def build(kind, **changes):
    config = cases.fsn_config(feedforward=kind, **changes)
    return cases.layer(LAYERS[kind], config), config


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("shape", [(2, 7, 9), (1, 1, 3), (3, 4, 12)])
def test_against_oracle(kind, shape):
    layer, config = build(kind, num_phases=shape[-1], num_heads=1)
    theta = cases.angles(*shape, turns=2.0)
    variables = cases.random_variables(layer, theta)
    expected = oracle.feedforward(
        oracle.as_float64(variables["params"]), oracle.as_float64(theta), config
    )
    np.testing.assert_allclose(layer.apply(variables, theta), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_against_central_differences(kind):
    layer, config = build(kind, num_phases=6)
    theta = cases.angles(1, 3, 6)
    variables = cases.random_variables(layer, theta)
    weights = cases.angles(*theta.shape, seed=5)

    def library(inputs):
        return (weights * layer.apply({"params": inputs["params"]}, inputs["theta"])).sum()

    def exact(inputs):
        update = oracle.feedforward(inputs["params"], inputs["theta"], config)
        return float((oracle.as_float64(weights) * update).sum())

    at = {"params": variables["params"], "theta": theta}
    cases.check_gradients(cases.quick_jit(jax.grad(library))(at), exact, oracle.as_float64(at))


@pytest.mark.parametrize("kind", LAYERS)
def test_tokens_do_not_meet(kind):
    layer, _ = build(kind)
    theta = cases.angles(2, 4, 9)
    variables = cases.random_variables(layer, theta)
    jacobian = np.asarray(jax.jacrev(lambda x: layer.apply(variables, x))(theta))
    size = np.abs(jacobian).max(axis=(2, 5)).reshape(8, 8)
    assert (size[~np.eye(8, dtype=bool)] == 0).all()
    assert (np.diag(size) > 0).all()


@pytest.mark.parametrize("kind", LAYERS)
def test_periodic(kind):
    """Whole turns change nothing but the rounding of the angle (1e-6 rad at three turns)."""
    layer, _ = build(kind)
    theta = cases.angles(2, 4, 9)
    variables = cases.random_variables(layer, theta)
    turns = np.random.default_rng(0).integers(-3, 4, size=theta.shape)
    wound = jnp.asarray(theta + 2 * np.pi * turns, jnp.float32)
    np.testing.assert_allclose(
        layer.apply(variables, wound), layer.apply(variables, theta), atol=3e-5
    )


def test_a_phase_rests_on_the_field_of_its_mode():
    """One mode with Z = exp(i psi): dtheta = w sin(psi - theta), zero and stable at theta = psi."""
    layer, _ = build("collective_modes", num_phases=4, num_heads=1, num_modes=1)
    psi = jnp.array([0.3, -1.2, 2.0, 3.0])
    drive = 1.7  # w = silu(1.7), the same for every token
    params = {
        "weights": {"kernel": jnp.zeros((8, 1)), "bias": jnp.full(1, drive)},
        "modes_real": jnp.cos(psi)[None],
        "modes_imag": jnp.sin(psi)[None],
    }
    for offset in (0.0, 0.5, -0.5):
        update = layer.apply({"params": params}, (psi + offset)[None, None])
        expected = -oracle.silu(drive) * np.sin(offset)
        np.testing.assert_allclose(update[0, 0], np.full(4, expected), atol=1e-6)
