"""The primitives on the torus against NumPy in float64."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fsn_jax import torus


def test_phasor_is_the_complex_exponential():
    theta = cases.angles(3, 5, turns=3.0)
    z = torus.phasor(theta)
    expected = np.exp(1j * np.asarray(theta, np.float64))
    np.testing.assert_allclose(z[0], expected.real, atol=1e-6)
    np.testing.assert_allclose(z[1], expected.imag, atol=1e-6)


def test_angles_of_another_type_are_worked_on_in_float32():
    """The cosine of a bfloat16 angle is that of the number that it is."""
    theta = cases.angles(100, turns=50.0).astype(jnp.bfloat16)
    z = torus.phasor(theta)
    assert z.re.dtype == z.im.dtype == jnp.float32
    np.testing.assert_allclose(z.re, np.cos(np.asarray(theta, np.float64)), atol=1e-6)
    with pytest.raises(TypeError, match="real angles|Type-check error"):
        torus.phasor(jnp.exp(1j * cases.angles(3)))


@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_phasor_derivative(mode):
    """The hand-written derivative: d cos = -sin, d sin = cos, in both modes and to second order."""
    theta = cases.angles(6)
    weight_cos, weight_sin = cases.angles(6, seed=1), cases.angles(6, seed=2)

    def loss(theta):
        z = torus.phasor(theta)
        return (weight_cos * z[0] + weight_sin * z[1]).sum()

    jacobian = jax.jacrev if mode == "reverse" else jax.jacfwd
    exact = np.asarray(theta, np.float64)
    first = -weight_cos * np.sin(exact) + weight_sin * np.cos(exact)
    second = np.diag(-weight_cos * np.cos(exact) - weight_sin * np.sin(exact))
    np.testing.assert_allclose(jacobian(loss)(theta), first, atol=1e-6)
    np.testing.assert_allclose(jacobian(jacobian(loss))(theta), second, atol=1e-6)


def test_phasor_under_jit_and_vmap():
    theta = cases.angles(4, 3)
    plain = torus.phasor(theta)
    for z in (jax.jit(torus.phasor)(theta), jax.vmap(torus.phasor)(theta)):
        np.testing.assert_allclose(z[0], plain[0], atol=1e-7)
        np.testing.assert_allclose(z[1], plain[1], atol=1e-7)


def test_products_are_those_of_complex_numbers():
    parts = [cases.angles(2, 5, seed=seed) for seed in range(5)]
    x, y = torus.Complex(*parts[:2]), torus.Complex(*parts[2:4])
    numbers = [np.asarray(a, np.float64) + 1j * np.asarray(b, np.float64) for a, b in (x, y)]
    for found, expected in (
        (torus.multiply(x, y), numbers[0] * numbers[1]),
        (torus.seen_from(x, y), numbers[0].conj() * numbers[1]),
        (torus.along_circle(x, parts[4]), 1j * numbers[0] * np.asarray(parts[4], np.float64)),
    ):
        np.testing.assert_allclose(found.re, expected.real, atol=1e-5)
        np.testing.assert_allclose(found.im, expected.imag, atol=1e-5)


@pytest.mark.parametrize("num_harmonics", [1, 8])
def test_powers(num_harmonics):
    theta = cases.angles(2, 3, 4)
    powers = torus.powers(torus.phasor(theta), num_harmonics)
    assert len(powers) == num_harmonics
    for m, z in enumerate(powers, start=1):
        expected = np.exp(1j * m * np.asarray(theta, np.float64))
        np.testing.assert_allclose(z[0], expected.real, atol=2e-6)
        np.testing.assert_allclose(z[1], expected.imag, atol=2e-6)


def test_features_are_all_cosines_then_all_sines():
    theta = cases.angles(2, 4)
    f = torus.features(torus.phasor(theta))
    np.testing.assert_allclose(f, np.concatenate([np.cos(theta), np.sin(theta)], -1), atol=1e-6)


@pytest.mark.parametrize(("pairs", "base"), [(1, 10.0), (8, 10_000.0)])
def test_rotary_phasor(pairs, base):
    """exp(i t base^(-p / pairs)), accurate at the end of a long window too."""
    length = 5000
    z = torus.rotary_phasor(length, torus.rotary_frequencies(pairs, base))
    omega = base ** (-np.arange(pairs) / pairs)
    expected = np.exp(1j * np.arange(length)[:, None] * omega)
    assert z[0].shape == z[1].shape == (length, pairs)
    assert z[0].dtype == z[1].dtype == jnp.float32
    np.testing.assert_allclose(z[0], expected.real, atol=1e-6)
    np.testing.assert_allclose(z[1], expected.imag, atol=1e-6)


@pytest.mark.parametrize("harmonic", [1, 2, 3])
def test_order_parameter(harmonic):
    """One for agreeing phases; zero for the splay state, except in the harmonic that refolds it."""
    aligned = jnp.full((2, 6), 0.7)
    np.testing.assert_allclose(torus.order_parameter(aligned, harmonic), [1.0, 1.0], atol=1e-6)
    splay = jnp.arange(3) * (2 * jnp.pi / 3)
    expected = 1.0 if harmonic == 3 else 0.0
    np.testing.assert_allclose(torus.order_parameter(splay, harmonic), expected, atol=1e-6)


@pytest.mark.parametrize("harmonic", [0, -2])
def test_an_order_parameter_of_no_harmonic_is_refused(harmonic):
    with pytest.raises(ValueError, match=f"harmonics are counted from 1; got {harmonic}"):
        torus.order_parameter(jnp.zeros((2, 6)), harmonic)


def test_order_parameter_ignores_a_global_rotation():
    theta = cases.angles(4, 7)
    rotated = torus.order_parameter(theta + 1.3, 2)
    np.testing.assert_allclose(rotated, torus.order_parameter(theta, 2), atol=1e-6)
