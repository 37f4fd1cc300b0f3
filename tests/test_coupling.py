"""The coupling kernel: against the oracle, and the identities that its equation implies."""

import subprocess
import sys

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from fsn_jax import coupling
from fsn_jax.coupling import _fold_parts, _fold_rows, fold_values_transposed
from fsn_jax.torus import Complex

coupling_update = jax.jit(coupling.coupling_update)
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def random_kernel(delays: int, harmonics: int, phases: int, *, real: bool = False, seed: int = 0):
    rng = np.random.default_rng(seed)
    kappa = rng.normal(size=(delays, harmonics, phases)).astype(np.complex64)
    if not real:
        kappa += 1j * rng.normal(size=kappa.shape).astype(np.float32)
    return jnp.asarray(kappa)


def update(theta, attention, kappa) -> np.ndarray:
    """Call the library with NumPy arrays of any precision."""
    arrays = (theta, jnp.float32), (attention, jnp.float32), (kappa, jnp.complex64)
    return np.asarray(coupling_update(*(jnp.asarray(x, dtype) for x, dtype in arrays)))


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize(
    ("batch", "length", "heads", "phases", "delays", "harmonics"),
    [
        *((2, 7, 2, 8, delays, harmonics) for delays in (1, 2) for harmonics in (1, 2, 5)),
        (1, 13, 3, 9, 2, 3),
        (3, 1, 1, 5, 2, 2),
        (1, 2, 4, 4, 2, 1),
    ],
)
def test_against_oracle(batch, length, heads, phases, delays, harmonics, real):
    theta = cases.angles(batch, length, phases, turns=2.0)
    attention = cases.random_attention(batch, heads, length)
    kappa = random_kernel(delays, harmonics, phases, real=real)
    expected = oracle.coupling(oracle.as_float64(theta), oracle.as_float64(attention), kappa)
    np.testing.assert_allclose(coupling_update(theta, attention, kappa), expected, **TOLERANCE)


@pytest.mark.parametrize("argument", ["theta", "attention", "kappa_real", "kappa_imag"])
def test_gradients_against_central_differences(argument):
    shape = batch, length, phases = 2, 7, 8
    at = {
        "theta": cases.angles(*shape),
        "attention": cases.random_attention(batch, 2, length),
        "kappa_real": random_kernel(2, 3, phases).real,
        "kappa_imag": random_kernel(2, 3, phases).imag,
    }
    weights = cases.angles(*shape, seed=5)
    rng = np.random.default_rng(7)
    direction = rng.normal(size=at[argument].shape)
    if argument == "attention":
        direction = np.tril(direction)

    def library(x):
        p = {**at, argument: x}
        kappa = jax.lax.complex(p["kappa_real"], p["kappa_imag"])
        return (weights * coupling_update(p["theta"], p["attention"], kappa)).sum()

    def exact(p):
        kappa = p["kappa_real"] + 1j * p["kappa_imag"]
        return float(
            (oracle.as_float64(weights) * oracle.coupling(p["theta"], p["attention"], kappa)).sum()
        )

    expected = oracle.directional_derivative(exact, oracle.as_float64(at), {argument: direction})
    gradient = np.asarray(jax.grad(library)(at[argument]), np.float64)
    actual = (gradient * direction).sum()
    scale = np.linalg.norm(gradient) * np.linalg.norm(direction) / np.sqrt(direction.size)
    assert abs(actual - expected) <= 1e-5 * scale


@pytest.mark.parametrize("harmonic", [1, 2, 3])
def test_delay_identity(harmonic):
    """The data's own transition is the frustration angle.

    ``sin(m (theta_{u+1} - theta_t)) = sin(m (theta_u - theta_t) - m alpha_u)`` with
    ``alpha_u = -(theta_{u+1} - theta_u)``: coupling to u with a delay of one step is coupling to u
    itself with the frustration angle ``m alpha_u``. One source u at a time, seen by every later t.
    """
    length, phases = 9, 6
    theta = oracle.as_float64(cases.angles(1, length, phases, turns=2.0))
    rho = np.random.default_rng(3).normal(size=phases)
    for u in range(length - 1):
        attention = np.eye(length)
        attention[u + 1 :] = np.eye(length)[u]
        delayed = np.zeros((2, harmonic, phases))
        delayed[1, harmonic - 1] = rho
        alpha = -(theta[0, u + 1] - theta[0, u])
        frustrated = np.zeros((1, harmonic, phases), complex)
        frustrated[0, harmonic - 1] = rho * np.exp(-1j * harmonic * alpha)

        left = update(theta, attention[None, None], delayed)[0, u + 1 :]
        right = update(theta, attention[None, None], frustrated)[0, u + 1 :]
        np.testing.assert_allclose(left, right, **TOLERANCE)
        spelled_out = rho * np.sin(harmonic * (theta[0, u + 1] - theta[0, u + 1 :]))
        np.testing.assert_allclose(left, spelled_out, **TOLERANCE)
        # The identity says something only if the transition is not zero.
        assert np.abs(alpha).max() > 0.1


def test_frustration_angle_is_the_phase_at_rest():
    """With kappa = rho exp(-i alpha) a phase that trails its source by alpha / m feels no push."""
    rho, alpha, harmonic = 1.7, 0.6, 2
    theta = np.array([[[0.3], [0.3 - alpha / harmonic]]])
    attention = np.array([[[[1.0, 0.0], [1.0, 0.0]]]])
    kappa = np.zeros((1, harmonic, 1), complex)
    kappa[0, harmonic - 1] = rho * np.exp(-1j * alpha)
    pushes = update(theta, attention, kappa)
    np.testing.assert_allclose(pushes[0, 1, 0], 0.0, atol=1e-6)
    # A token coupled to itself is pushed by the angle alone.
    np.testing.assert_allclose(pushes[0, 0, 0], -rho * np.sin(alpha), atol=1e-6)


@pytest.mark.parametrize("rho", [1.0, -1.0])
def test_positive_coupling_attracts_and_negative_repels(rho):
    theta = np.array([[[0.0], [1.0]]])
    attention = np.array([[[[1.0, 0.0], [1.0, 0.0]]]])
    pushes = update(theta, attention, np.full((1, 1, 1), rho))
    np.testing.assert_allclose(pushes[0, 1, 0], -rho * np.sin(1.0), atol=1e-6)


def test_weight_on_self_has_no_delay_term():
    """A row that rests on u = t reads no successor: nothing of t + 1, and nothing wrapped round."""
    theta = cases.angles(1, 6, 4)
    kappa = np.array(random_kernel(2, 2, 4))
    kappa[0] = 0.0
    pushes = update(theta, np.eye(6)[None, None], kappa)
    np.testing.assert_array_equal(pushes, np.zeros_like(pushes))


@pytest.mark.parametrize("harmonics", [1, 3])
def test_global_rotation_leaves_the_update(harmonics):
    theta = cases.angles(2, 7, 8)
    attention, kappa = cases.random_attention(2, 2, 7), random_kernel(2, harmonics, 8)
    plain = coupling_update(theta, attention, kappa)
    rotated = coupling_update(theta + 0.9, attention, kappa)
    np.testing.assert_allclose(rotated, plain, **TOLERANCE)


def test_each_head_couples_its_own_block_of_phases():
    theta, kappa = cases.angles(1, 5, 6), random_kernel(2, 2, 6)
    attention = cases.random_attention(1, 3, 5)
    whole = np.asarray(coupling_update(theta, attention, kappa))
    for head in range(3):
        block = slice(2 * head, 2 * head + 2)
        alone = coupling_update(theta[..., block], attention[:, head : head + 1], kappa[..., block])
        np.testing.assert_allclose(whole[..., block], alone, atol=1e-6)


def test_linear_in_the_kernel():
    theta, attention = cases.angles(2, 7, 8), cases.random_attention(2, 2, 7)
    one, other = random_kernel(2, 3, 8, seed=1), random_kernel(2, 3, 8, seed=2)
    both = coupling_update(theta, attention, one + 2 * other)
    apart = coupling_update(theta, attention, one) + 2 * coupling_update(theta, attention, other)
    np.testing.assert_allclose(both, apart, **TOLERANCE)


@pytest.mark.parametrize(
    ("heads", "delays", "said"),
    [
        pytest.param(3, 2, "3 heads do not divide 8 phases", id="heads"),
        pytest.param(2, 3, "kappa has 3 delays; 1 or 2 are supported", id="delays"),
    ],
)
def test_refuses_shapes_that_do_not_fit(heads, delays, said):
    theta, attention = cases.angles(1, 5, 8), cases.random_attention(1, heads, 5)
    with pytest.raises(ValueError, match=f"^{said}"):
        coupling_update(theta, attention, random_kernel(delays, 1, 8))


def test_weights_across_segments_are_not_left_in_silently():
    theta, segment_ids = cases.angles(1, 4, 8), jnp.array([[0, 0, 1, 1]])
    attention, kernel = cases.random_attention(1, 2, 4), random_kernel(2, 1, 8)
    own = attention * (segment_ids[:, None, :, None] == segment_ids[:, None, None])
    apart = own / own.sum(axis=-1, keepdims=True)
    assert np.isfinite(coupling_update(theta, apart, kernel, segment_ids)).all()
    assert np.isnan(coupling_update(theta, attention, kernel, segment_ids)[:, 2:]).any()


def test_a_kernel_of_another_shape_is_refused_in_one_line():
    """In a process of its own: the run-time type checks of the tests would speak first."""
    script = """
import jax, jax.numpy as jnp
from fsn_jax.coupling import coupling_update
for shape in ((2, 1, 2, 8), (2, 1, 1)):
    kappa = jnp.ones(shape, complex)
    try:
        jax.eval_shape(coupling_update, jnp.zeros((1, 5, 8)), jnp.zeros((1, 2, 5, 5)), kappa)
    except ValueError as error:
        print(error)
"""
    command = [sys.executable, "-c", script]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    said = "kappa must be [T, M, N] with N = 8, of FrustratedAttention.kappa() the part [:, :, j]"
    assert printed == f"{said}; got shape (2, 1, 2, 8)\n{said}; got shape (2, 1, 1)\n"


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("blocks", [1, 3], ids=["one_for_all", "of_each_head"])
def test_accelerators_fold_the_same_values(blocks, segments):
    """Number by number as row by row, values and gradients."""
    rng = np.random.default_rng(0)
    shape, kernel = (2, blocks, 5, 4), (2, 2, 3, 4)

    def normal(shape):
        return Complex(*jnp.asarray(rng.normal(size=(2, *shape)), jnp.float32))

    z, kappa = normal(shape), normal(kernel)
    follows = jnp.asarray(rng.integers(2, size=(2, 1, 5, 1)), jnp.float32) if segments else None

    def both(fold):
        def value(z, kappa):
            return fold("float32", z, kappa, follows)

        loss = lambda z, kappa: jnp.sum(jnp.sin(value(z, kappa)))  # noqa: E731
        return jax.tree.leaves((value(z, kappa), jax.grad(loss, (0, 1))(z, kappa)))

    (value, *gradients), parts = both(_fold_rows), both(_fold_parts)
    transposed = jax.tree.leaves(fold_values_transposed(z, kappa, follows, jnp.cos(value)))
    for ours, plain in zip((*parts, *transposed), (value, *2 * gradients), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-5)
