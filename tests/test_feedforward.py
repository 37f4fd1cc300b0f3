"""SwiGLU, collective modes and what they read: against the oracle, and by their equations."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from fsn_jax import CollectiveModes
from fsn_jax.dense import _read_by_part, _read_together
from fsn_jax.feedforward import PhasorSwiGLU
from fsn_jax.fsn import Block
from fsn_jax.torus import Complex

LAYERS = {
    "swiglu": {"feedforward": "swiglu"},
    "coherence": {"feedforward": "collective_modes"},
    "dense_modes": {"feedforward": "collective_modes", "mode_weights": "dense"},
}


def build(kind, **changes):
    config = cases.fsn_config(**LAYERS[kind], **changes)
    layer = PhasorSwiGLU if kind == "swiglu" else CollectiveModes
    return cases.layer(layer, config), config


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
    cases.check_gradients(jax.jit(jax.grad(library))(at), exact, oracle.as_float64(at))


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
    layer, _ = build("dense_modes", num_phases=4, num_heads=1, num_modes=1)
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


@pytest.mark.parametrize("switches", [{}, {"field_features": True}, {"num_harmonics": 3}])
def test_a_block_of_gated_attention_and_modes_commutes_with_a_rotation(switches):
    """All phases plus one angle: all phases after the block plus that angle."""
    config = cases.fsn_config(score="gated", feedforward="collective_modes", **switches)
    theta, turn = cases.angles(2, 6, 9, turns=2.0), 1.3
    block = Block(config)
    variables = cases.random_variables(block, theta)
    after = block.apply(variables, theta)
    assert np.abs(after - theta).max() > 0.1
    np.testing.assert_allclose(block.apply(variables, theta + turn), after + turn, atol=3e-5)


@pytest.mark.parametrize("breaks", [{"mode_weights": "dense"}, {"feedforward": "swiglu"}])
def test_a_feedforward_with_a_preferred_direction_does_not_commute(breaks):
    config = cases.fsn_config(**{"score": "gated", "feedforward": "collective_modes", **breaks})
    theta, turn = cases.angles(2, 6, 9), 1.3
    block = Block(config)
    variables = cases.random_variables(block, theta)
    turned = block.apply(variables, theta + turn) - turn
    assert np.abs(turned - block.apply(variables, theta)).max() > 0.1


def test_a_mode_drives_only_tokens_whose_order_parameters_agree():
    """One mode: a is phase 0, b is phase 1, and phase 2 moves by w sin(theta_1 - theta_2)."""
    layer, _ = build("coherence", num_phases=3, num_heads=1, num_modes=1, feature_scale=1.0)
    size, bias = 4.0, -2.0
    params = {f"{name}_imag": jnp.zeros((3, 1)) for name in ("gate", "up")}
    params |= {
        "gate_real": jnp.array([[size], [0.0], [0.0]]),
        "up_real": jnp.array([[0.0], [1.0], [0.0]]),
        "down_real": jnp.array([[0.0, 0.0, 1.0]]),
        "down_imag": jnp.zeros((1, 3)),
        "bias": jnp.full(1, bias),
    }
    apart = jnp.array([0.0, np.pi / 3, np.pi / 2, np.pi])
    theta = jnp.stack([0.4 + apart, jnp.full(4, 0.4), jnp.full(4, -0.7)], axis=-1)
    update = layer.apply({"params": params}, theta[None])[0]
    weight = np.array([oracle.silu(size * float(np.cos(d)) + bias) for d in apart])
    np.testing.assert_allclose(update[:, 2], weight * np.sin(1.1), atol=5e-4)
    np.testing.assert_allclose(update[:, :2], 0.0, atol=1e-6)


@pytest.mark.parametrize("quadrature", [False, True])
@pytest.mark.parametrize("field", [False, True])
def test_gpus_read_the_same_values(field, quadrature):
    """Cosines and sines in one array or one by one: what they read, and what each array learns."""
    rng = np.random.default_rng(0)
    z, around = (Complex(*jnp.asarray(rng.normal(size=(2, 2, 5, 4)), jnp.float32)) for _ in "zf")
    gains, parts = (jnp.asarray(rng.normal(size=(2, 4)), jnp.float32) for _ in "gq")
    arrays = (z, around if field else None, gains if field else None, parts if quadrature else None)

    def both(read):
        loss = lambda *arrays: jnp.sum(jnp.sin(read(*arrays)))  # noqa: E731
        return jax.tree.leaves((read(*arrays), jax.grad(loss, (0, 1, 2, 3))(*arrays)))

    for ours, plain in zip(both(_read_together), both(_read_by_part), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-5)


def test_without_an_order_parameter_the_gradient_is_finite():
    """Phases that cancel in every mode: b = 0, whose phase has no derivative."""
    layer, _ = build("coherence", num_phases=2, num_heads=1, num_modes=1)
    theta = jnp.array([[[0.3, 0.3 + np.pi]]])
    variables = cases.random_variables(layer, theta)
    params = dict(variables["params"])
    for name in ("up_real", "up_imag"):
        params[name] = jnp.ones((2, 1))
    gradient = jax.grad(lambda x: layer.apply({"params": params}, x).sum())(theta)
    assert np.isfinite(gradient).all()
