"""Both attention layers: against the oracle for every switch, and what the switches imply."""

import itertools
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from fsn_jax import (
    ConfigError,
    FrustratedAttention,
    KuramotoAttention,
    fsn,
)
from fsn_jax.base_layer import LinearValueAttention

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
SCORES: dict[str, dict[str, Any]] = {
    "gated": {"score": "gated"},
    "gated_no_angles": {"score": "gated", "score_angles": False},
    "gated_block": {"score": "gated", "score_scope": "block"},
    "content_gated": {"score": "content_gated"},
    "content_gated_block": {"score": "content_gated", "score_scope": "block"},
    "projected": {"score": "projected"},
    "none": {"score": "none"},
}
ROTATION = 0.8


def circular_switches():
    """The product of the switches that shape the kernel, as keyword arguments."""
    names = ("num_harmonics", "delay", "static_angles", "signed_harmonics")
    choices = ((1, 2, 5), (True, False), (True, False), (True, False))
    for combination in itertools.product(*choices):
        yield dict(zip(names, combination, strict=True))


SWITCHES = [{"values": "circular", **kernel} for kernel in circular_switches()]
SWITCHES.append({"values": "linear"})
SWITCHES += [
    {"heads_per_phase": 2, "num_harmonics": m, "delay": delay, "signed_harmonics": delay}
    for m, delay in itertools.product((1, 3), (True, False))
]


@pytest.mark.parametrize("implementation", cases.IMPLEMENTATIONS)
@pytest.mark.parametrize("score", SCORES)
def test_every_switch_against_oracle(score, implementation):
    """All combinations of values, M, delay, static angles and sign for gates, some for the rest."""
    theta = cases.angles(2, 7, 8, turns=2.0)
    for switches in SWITCHES if score == "gated" else SWITCHES[::6]:
        config = cases.fsn_config(
            num_phases=8,
            num_heads=4,
            implementation=implementation,
            **SCORES[score],
            **switches,
        )
        layer = cases.layer(fsn.ATTENTION[config.values], config)
        variables = cases.random_variables(layer, theta)
        expected = oracle.frustrated_attention(
            oracle.as_float64(variables["params"]), oracle.as_float64(theta), config
        )
        actual = layer.apply(variables, theta)
        assert actual.dtype == jnp.float32
        np.testing.assert_allclose(actual, expected, **TOLERANCE, err_msg=str(switches))


@pytest.mark.parametrize("layer", [FrustratedAttention, KuramotoAttention, LinearValueAttention])
def test_phases_that_heads_do_not_divide_are_refused(layer):
    expected = rf"{layer.__name__}\.num_heads must divide the number of phases \(7\); got 2"
    with pytest.raises(ConfigError, match=expected):
        layer(num_heads=2).init(jax.random.key(0), jnp.zeros((2, 5, 7)))


@pytest.mark.parametrize("implementation", cases.IMPLEMENTATIONS)
def test_no_tokens_are_no_update(implementation):
    layer = FrustratedAttention(num_heads=2, implementation=implementation)
    variables = cases.random_variables(layer, cases.angles(1, 3, 8))
    assert layer.apply(variables, jnp.zeros((2, 0, 8))).shape == (2, 0, 8)


@pytest.mark.parametrize("implementation", cases.IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("batch", "length", "phases", "heads", "pairs"),
    [(1, 1, 3, 1, 0), (3, 2, 12, 2, 7), (1, 13, 10, 5, 3)],
)
def test_odd_shapes_against_oracle(batch, length, phases, heads, pairs, implementation):
    theta = cases.angles(batch, length, phases)
    config = cases.fsn_config(
        num_phases=phases, num_heads=heads, score_phases=pairs, implementation=implementation
    )
    layer = cases.layer(FrustratedAttention, config)
    variables = cases.random_variables(layer, theta)
    expected = oracle.frustrated_attention(
        oracle.as_float64(variables["params"]), oracle.as_float64(theta), config
    )
    actual = jax.jit(layer.apply)(variables, theta)
    np.testing.assert_allclose(actual, expected, **TOLERANCE)


@pytest.mark.parametrize("score", SCORES)
def test_base_layer_against_oracle(score):
    theta = cases.angles(2, 9, 9, turns=2.0)
    config = cases.fsn_config(**SCORES[score])
    layer = cases.layer(KuramotoAttention, config)
    variables = cases.random_variables(layer, theta)
    expected = oracle.kuramoto_attention(
        oracle.as_float64(variables["params"]), oracle.as_float64(theta), config
    )
    np.testing.assert_allclose(layer.apply(variables, theta), expected, **TOLERANCE)


@pytest.mark.parametrize("score", SCORES)
def test_base_layer_is_one_real_undelayed_positive_harmonic(score):
    """KuramotoAttention(gain) = FrustratedAttention(kernel_real[0, 0] = gain) in that corner."""
    theta = cases.angles(2, 9, 9)
    config = cases.fsn_config(**SCORES[score], **cases.BASE_LAYER)
    base = cases.layer(KuramotoAttention, config)
    variables = cases.random_variables(base, theta)
    params = dict(variables["params"])
    params["kernel_real"] = params.pop("gain")[None, None]
    full = cases.layer(FrustratedAttention, config)
    shapes = jax.eval_shape(full.init, jax.random.key(0), theta)["params"]
    assert cases.leaf_paths(params) == cases.leaf_paths(shapes)
    one = full.apply({"params": params}, theta, method="field")
    other = base.apply(variables, theta, method="field")
    for part in ("re", "im"):
        np.testing.assert_allclose(getattr(one, part), getattr(other, part), **TOLERANCE)


@pytest.mark.parametrize("num_heads", [1, 4])
def test_base_layer_of_its_own_has_a_real_score_with_positions(num_heads):
    """Frustration angles are what it is without, and no head is one that has no drift."""
    layer, theta = KuramotoAttention(num_heads=num_heads), 0.2 * cases.angles(1, 6, 8)
    variables = layer.init(jax.random.key(0), theta)
    assert set(variables["params"]["score"]) == {"gate", "log_beta"}
    far = jnp.arange(6) * 40
    weights, apart = (
        layer.apply(variables, theta, positions=p, method="weights") for p in (None, far)
    )
    assert (np.abs(weights - apart).max(axis=(0, 2, 3)) > 0.01).all()


def test_base_layer_ignores_the_switches_of_the_kernel():
    theta = cases.angles(2, 9, 9)
    plain = cases.layer(KuramotoAttention, cases.fsn_config(**cases.BASE_LAYER))
    switched = cases.layer(KuramotoAttention, cases.fsn_config(num_harmonics=3))
    variables = cases.random_variables(plain, theta)
    np.testing.assert_array_equal(plain.apply(variables, theta), switched.apply(variables, theta))


INVARIANT = ("gated", "gated_no_angles", "gated_block", "none")


def rotation_error(kind, **changes):
    """Largest change of the attention and of the update when all phases turn by one angle."""
    theta = cases.angles(2, 9, 9)
    layer = cases.layer(kind, cases.fsn_config(**changes))
    variables = cases.random_variables(layer, theta)
    turned = theta + ROTATION
    weights, moved = (layer.apply(variables, x, method="weights") for x in (theta, turned))
    update, updated = (layer.apply(variables, x) for x in (theta, turned))
    return np.abs(moved - weights).max(), np.abs(updated - update).max()


@pytest.mark.parametrize(
    ("score", "kernel"),
    [
        *((score, {}) for score in INVARIANT),
        ("gated", cases.BASE_LAYER),
        ("gated", {"num_harmonics": 5}),
    ],
)
def test_attention_and_coupling_commute_with_a_global_rotation(score, kernel):
    """For every harmonic. The rest is rounding of the angles (1e-7 rad) times sums of order ten."""
    of_weights, of_update = rotation_error(FrustratedAttention, **SCORES[score], **kernel)
    assert of_weights < 1e-5
    assert of_update < 5e-5


@pytest.mark.parametrize("score", [name for name in SCORES if name not in INVARIANT])
def test_content_scores_break_the_invariance(score):
    of_weights, of_update = rotation_error(FrustratedAttention, **SCORES[score])
    assert of_weights > 0.01 and of_update > 0.01


def test_linear_values_break_the_invariance_of_the_update_alone():
    of_weights, of_update = rotation_error(LinearValueAttention, score="gated")
    assert of_weights < 1e-5
    assert of_update > 0.01


@pytest.mark.parametrize("implementation", cases.IMPLEMENTATIONS)
def test_rotary_drift_depends_on_the_distance(implementation):
    """Distance alone separates tokens with equal angles.

    Every angle is zero, so ``A[t, u] = softmax_u(beta sum_p cos((t - u) omega_p))``. One phase is
    gated out of the score; turned by a quarter at one source, it reads that source's weight.
    """
    length, beta, base = 6, 1.5, 7.0
    config = cases.fsn_config(
        num_phases=4,
        num_heads=1,
        score="gated",
        score_angles=False,
        rotary_base=base,
        implementation=implementation,
        **cases.BASE_LAYER,
    )
    params = {
        "score": {
            "gate": jnp.array([[1.0, 1.0, 1.0, 0.0]]),
            "log_beta": jnp.log(jnp.array([beta])),
        },
        "kernel_real": jnp.full((1, 1, 4), np.log(np.e - 1)),  # softplus gives one
    }
    distance = np.arange(length)[:, None, None] - np.arange(length)[:, None]
    omega = base ** (-np.array([0, 1, 2]) / 4)
    weights = np.tril(np.exp(beta * np.cos(distance * omega).sum(-1)))
    weights /= weights.sum(-1, keepdims=True)
    for source in range(length):
        theta = jnp.zeros((1, length, 4)).at[0, source, 3].set(np.pi / 2)
        update = np.asarray(
            cases.layer(FrustratedAttention, config).apply({"params": params}, theta)
        )
        later = slice(source + 1, length)
        np.testing.assert_allclose(update[0, later, 3], weights[later, source], atol=1e-6)


@pytest.mark.parametrize("signed", [True, False])
def test_the_kernel_begins_with_normal_angles_and_a_given_part_in_phase(signed):
    settings = {"kernel_scale": 0.7, "kernel_angle": 0.2, "signed_harmonics": signed}
    layer = FrustratedAttention(num_heads=2, **settings)
    params = jax.jit(layer.init)(jax.random.key(0), cases.angles(1, 2, 400))["params"]
    real, imag = (np.asarray(params[f"kernel_{part}"], np.float64) for part in ("real", "imag"))
    if not signed:
        real = np.log1p(np.exp(real))
    first = np.zeros(real.shape, bool)
    first[:, 0, 0] = True  # first harmonic, first head heard
    np.testing.assert_allclose(real, np.where(first, 0.7, 0.0 if signed else 0.01), rtol=1e-6)
    assert not imag[~first].any()
    angles = np.arctan2(-imag, real)[first]
    assert abs(angles.mean()) < 0.02 and abs(angles.std() - 0.2) < 0.02


@pytest.mark.parametrize("scale", [0.002, 0.5, 100.0])
def test_a_positive_kernel_begins_as_large_as_it_is_told(scale):
    theta = cases.angles(1, 2, 8)
    base = KuramotoAttention(kernel_scale=scale)
    layer = FrustratedAttention(kernel_scale=scale, signed_harmonics=False)
    gain, kernel = (jax.jit(x.init)(jax.random.key(0), theta)["params"] for x in (base, layer))
    gain, first = gain["gain"], kernel["kernel_real"][:, 0, 0]
    for parameter in (gain, first):
        np.testing.assert_allclose(np.logaddexp(0, np.asarray(parameter, np.float64)), scale, 1e-5)


@pytest.mark.parametrize("implementation", cases.IMPLEMENTATIONS)
def test_phases_of_double_precision_are_read_in_single(implementation):
    layer = FrustratedAttention(implementation=implementation)
    with jax.enable_x64(True):
        theta = jax.ShapeDtypeStruct((1, 3, 8), jnp.float64)
        update, variables = jax.eval_shape(layer.init_with_output, jax.random.key(0), theta)
    leaves = jax.tree.leaves((update, variables))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}


@pytest.mark.parametrize("layer_class", [KuramotoAttention, FrustratedAttention])
def test_exactly_causal(layer_class):
    """d dtheta[t] / d theta[u] is exactly zero for u > t and for another window of the batch.

    test_fsn.py has the same of the whole model, for every variant.
    """
    length = 5
    layer = cases.layer(layer_class, cases.fsn_config())
    theta = cases.angles(2, length, 9)
    variables = cases.random_variables(layer, theta)
    jacobian = np.asarray(jax.jit(jax.jacrev(lambda x: layer.apply(variables, x)))(theta))
    size = np.abs(jacobian).max(axis=(2, 5))  # [B, L, B, L] over outputs and inputs
    for t in range(length):
        assert (size[0, t, 0, t + 1 :] == 0).all()
        assert (size[1, t, 1, t + 1 :] == 0).all()
        assert (size[0, t, 1] == 0).all() and (size[1, t, 0] == 0).all()
    # The zeros mean something: what may be seen is seen.
    assert (size[0, :, 0][np.tri(length, k=-1, dtype=bool)] > 0).all()


@pytest.mark.parametrize(
    ("score", "implementation"),
    [("projected", "reference"), ("gated", "reference"), *((score, "xla") for score in SCORES)],
)
def test_gradients_against_central_differences(score, implementation):
    """d loss along a random direction of each parameter and of the angles, against float64."""
    theta = cases.angles(1, 6, 6)
    config = cases.fsn_config(
        num_phases=6, num_heads=2, implementation=implementation, **SCORES[score]
    )
    layer = cases.layer(FrustratedAttention, config)
    variables = cases.random_variables(layer, theta)
    weights = cases.angles(*theta.shape, seed=5)

    def library(inputs):
        return (weights * layer.apply({"params": inputs["params"]}, inputs["theta"])).sum()

    def exact(inputs):
        update = oracle.frustrated_attention(inputs["params"], inputs["theta"], config)
        return float((oracle.as_float64(weights) * update).sum())

    at = {"params": variables["params"], "theta": theta}
    cases.check_gradients(jax.jit(jax.grad(library))(at), exact, oracle.as_float64(at))


def test_how_a_score_begins():
    """Its temperature, and angles in all heads but the similarity head."""
    layer = FrustratedAttention(num_heads=4, score_angle=0.3, score_sharpness=2.0)
    init = jax.jit(layer.init)(jax.random.key(0), cases.angles(1, 2, 1600))
    score = init["params"]["score"]
    np.testing.assert_allclose(score["log_beta"], np.log(2 / np.sqrt(400)), rtol=1e-6)
    similarity, *others = np.split(np.asarray(score["gate_angle"]), 4)
    assert not similarity.any() and np.std(others) == pytest.approx(0.3, abs=0.02)
