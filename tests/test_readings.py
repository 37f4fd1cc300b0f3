"""Readings of kernels and states, against the coupling they claim to describe."""

import json

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fsn_jax import FSN
from fsn_jax.base_layer import attention_entropy
from fsn_jax.coupling import coupling_update
from fsn_jax.readings import (
    attention_targets,
    coefficients,
    data_frustration,
    repulsiveness,
    resultant,
    trace_layers,
)
from train.analysis import readings
from train.errors import UserError

frustration_of = jax.jit(data_frustration, static_argnames="heads_per_phase")
share_of = jax.jit(repulsiveness)
resultant_of = jax.jit(resultant)


def some_kernel(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) + 1j * rng.normal(size=shape)).astype(np.complex64)


def test_a_coefficient_is_the_push_it_names():
    """rho sin(m phi - alpha) with |alpha| at most a quarter turn, whatever the kernel entry."""
    kappa = some_kernel(2, 3, 5)
    kappa[0, 0, :4] = [1, -1, 1j, -1j]
    strength, angle = map(np.asarray, jax.jit(coefficients)(jnp.asarray(kappa)))
    assert (np.abs(angle) <= np.pi / 2 + 1e-6).all()
    assert (np.sign(strength) == np.where(kappa.real < 0, -1, 1)).all()
    for phi in np.linspace(-3, 3, 7):
        for m in (1, 2, 3):
            push = np.imag(kappa[:, m - 1] * np.exp(1j * m * phi))
            named = strength[:, m - 1] * np.sin(m * phi - angle[:, m - 1])
            np.testing.assert_allclose(named, push, atol=2e-6)


def test_repulsiveness_is_the_share_of_strength_that_repels():
    values = [[[1.0, -3.0], [2.0, 2.0]], [[-1.0, -1.0], [0.0, 0.0]]]
    strength = np.array(values, np.float32)
    np.testing.assert_allclose(share_of(jnp.asarray(strength)), [[0.75, 0], [1, 0]])
    by_head = np.stack([strength, strength], axis=2)
    np.testing.assert_allclose(share_of(jnp.asarray(by_head)), [[0.75, 0], [1, 0]])


@pytest.fixture(scope="module")
def traced():
    """A model whose phases hear two heads each, its logits, and the trace of its layers."""
    model = FSN(cases.fsn_config(heads_per_phase=2))
    tokens = cases.tokens(length=6)
    variables = cases.random_variables(model, tokens)

    @jax.jit
    def run(variables, tokens):
        return model.apply(variables, tokens), trace_layers(model, variables, tokens)

    return (model, variables, *run(variables, tokens))


def test_the_trace_ends_in_the_models_own_logits(traced):
    _, variables, logits, states = traced
    theta = np.asarray(states[-1].after)
    readout = jax.tree.map(np.asarray, variables["params"]["readout"])
    features = np.concatenate([np.cos(theta), np.sin(theta)], -1)
    actual = features @ readout["kernel"] + readout["bias"]
    np.testing.assert_allclose(actual, logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(states[0].after, states[1].before)


def test_a_trace_of_documents_sees_its_own_alone(traced):
    model, variables, *_ = traced
    tokens, ids = cases.tokens(length=6), jnp.array([[0, 0, 0, 1, 1, 1]] * 2)
    both = jax.jit(lambda v: trace_layers(model, v, tokens, ids))(variables)
    second = jax.jit(lambda v: trace_layers(model, v, tokens[:, 3:]))(variables)
    for packed, alone in zip(both, second, strict=True):
        np.testing.assert_allclose(packed.coupled[:, 3:], alone.coupled, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(packed.after[:, 3:], alone.after, rtol=1e-4, atol=1e-5)
        assert not packed.attention[:, :, 3:, :3].any()
        np.testing.assert_allclose(packed.attention[:, :, 3:, 3:], alone.attention, atol=1e-5)


def test_the_traced_kernel_and_attention_are_what_moved_the_phases(traced):
    """The definition of the coupling, on what was read, gives the update that was made."""
    for state in traced[3]:
        np.testing.assert_allclose(state.attention.sum(-1), 1, rtol=1e-5)
        update = sum(
            coupling_update(
                state.before, jnp.roll(state.attention, -j, axis=1), state.kappa[:, :, j]
            )
            for j in range(2)
        )
        np.testing.assert_allclose(state.coupled - state.before, update, rtol=1e-4, atol=2e-5)


def test_a_kernel_of_one_head_a_phase_has_a_head_axis_too():
    model = FSN(cases.fsn_config(num_layers=1))
    tokens = cases.tokens(length=3)
    variables = cases.random_variables(model, tokens)
    (state,) = jax.jit(lambda v: trace_layers(model, v, tokens))(variables)
    attention = variables["params"]["block_0"]["attention"]
    assert state.kappa.shape == (2, 2, 1, 9)
    np.testing.assert_array_equal(state.kappa[:, :, 0].real, attention["kernel_real"])
    np.testing.assert_array_equal(state.kappa[:, :, 0].imag, attention["kernel_imag"])


def test_linear_values_have_no_kernel():
    model = FSN(cases.fsn_config(values="linear"))
    with pytest.raises(ValueError, match="no coupling kernel"):
        trace_layers(model, {}, cases.tokens())


def test_the_texts_transition_is_a_frustration_angle():
    """The delay identity, with angles of many turns; and weights summed as they are defined."""
    theta = cases.angles(2, 5, 6, turns=3.0)
    attention = cases.random_attention(2, 3, 5)
    angle, weight = frustration_of(theta, attention, heads_per_phase=2)
    assert (np.abs(angle) <= np.pi + 1e-6).all()
    receiver = 0.7
    there = np.asarray(theta)
    np.testing.assert_allclose(
        np.sin(there[:, 1:] - receiver),
        np.sin(there[:, :-1] - receiver - np.asarray(angle)),
        atol=1e-5,
    )
    for n in range(6):
        heads = [n // 2, (n // 2 + 1) % 3]
        for u in range(4):
            later = np.asarray(attention)[..., u][:, heads, u + 1 :]
            np.testing.assert_allclose(weight[:, u, n], later.sum(-1).mean(1), rtol=1e-5)


def test_a_constant_frustration_has_a_resultant_of_one():
    steps = np.arange(6)[None, :, None] * np.array([0.5, -1.0])
    theta = jnp.asarray(np.broadcast_to(steps, (3, 6, 2)), jnp.float32)
    angles = frustration_of(theta, cases.random_attention(3, 2, 6), heads_per_phase=1)
    mean = resultant_of(angles)
    np.testing.assert_allclose(np.abs(mean), 1, rtol=1e-5)
    np.testing.assert_allclose(np.angle(mean), [-0.5, 1.0], rtol=1e-5)
    other = np.zeros(angles.angle.shape, np.float32)
    other[0] = np.pi
    opposed = angles._replace(angle=jnp.asarray(other))
    weight = np.asarray(angles.weight).sum(1)
    expected = (weight[1:].sum(0) - weight[0]) / weight.sum(0)
    np.testing.assert_allclose(resultant_of(opposed).real, expected, rtol=1e-4)


def test_entropy_of_even_and_of_single_weights():
    rows = jnp.asarray(np.stack([np.full(8, 1 / 8), np.eye(8)[3]]), jnp.float32)
    entropy = jax.jit(attention_entropy)(rows)
    np.testing.assert_allclose(entropy, [np.log(8), 0], atol=1e-6)


def test_attention_to_repeats_is_over_the_tokens_that_have_one():
    """Worked out by hand: of ``abcab``, only the last b ends a pair that was there before."""
    tokens = jnp.array([[0, 1, 2, 0, 1]])
    attention = np.zeros((1, 2, 5, 5), np.float32)
    attention[0, 0] = np.eye(5)
    attention[0, 0, 4] = [0.1, 0.6, 0.1, 0.2, 0.0]
    attention[0, 1] = np.tril(np.ones((5, 5))) / np.arange(1, 6)[:, None]
    found = jax.jit(attention_targets)(jnp.asarray(attention), tokens)
    np.testing.assert_allclose(found.repeat, [0.6, 0.2], rtol=1e-6)
    np.testing.assert_allclose(found.after_repeat, [0.1, 0.2], rtol=1e-6)
    np.testing.assert_allclose(found.itself, [4 / 5, np.mean(1 / np.arange(1, 6))], rtol=1e-6)
    np.testing.assert_allclose(found.previous, [0.2 / 4, np.mean(1 / np.arange(2, 6))], rtol=1e-6)
    nothing = jax.jit(attention_targets)(jnp.asarray(attention), jnp.arange(5)[None])
    np.testing.assert_array_equal(nothing.repeat, 0)


def test_a_token_is_not_what_follows_its_own_repeat():
    """Worked out by hand: of ``aaaa`` the last two a have repeats, the last a successor of one."""
    attention = np.zeros((1, 1, 4, 4), np.float32)
    attention[0, 0] = np.eye(4)
    attention[0, 0, 3] = [0.0, 0.25, 0.5, 0.25]
    found = jax.jit(attention_targets)(jnp.asarray(attention), jnp.zeros((1, 4), jnp.int32))
    np.testing.assert_allclose(found.after_repeat, [0.5], rtol=1e-6)
    np.testing.assert_allclose(found.repeat, [0.75 / 2], rtol=1e-6)


def test_a_repeat_lies_in_one_segment():
    """Worked out by hand: of ``abcab`` the first pair begins in another segment."""
    tokens, ids = jnp.array([[0, 1, 2, 0, 1]]), jnp.array([[0, 1, 1, 1, 1]])
    attention = jnp.tril(jnp.ones((1, 1, 5, 5)))
    assert jax.jit(attention_targets)(attention, tokens, jnp.zeros_like(ids)).repeat == 1
    assert jax.jit(attention_targets)(attention, tokens, ids).repeat == 0


def test_a_histogram_over_the_circle_shares_the_weight():
    share = readings.circle_histogram(np.array([0.01, 0.02, 3.1]), np.array([1.0, 2.0, 1.0]))
    assert share.sum() == pytest.approx(1)
    assert share[readings.BINS // 2] == pytest.approx(0.75) and share[-1] == pytest.approx(0.25)


def test_the_program_reads_every_coefficient_of_a_run(finished_arms, tmp_path, capsys):
    target = tmp_path / "reading.json"
    readings.program(["readings", str(finished_arms["fsn"]), f"--output={target}", "--windows=3"])
    page = json.loads(target.read_text(encoding="utf-8"))
    (layer,) = page["layers"]
    named = [(c["delay"], c["harmonic"], c["head"]) for c in layer["coefficients"]]
    assert named == [(0, 1, 0), (0, 2, 0), (1, 1, 0), (1, 2, 0)]
    assert sum(len(c["strength"]) for c in layer["coefficients"]) == page["kernel_coefficients"]
    # A curve's middle is the push at equal phases, Im sum_m kappa; its ends agree.
    for curve in layer["coupling"]:
        assert len(curve["p50"]) == readings.POINTS
        assert curve["p50"][0] == pytest.approx(curve["p50"][-1], abs=1e-4)
        mine = [c for c in layer["coefficients"] if c["delay"] == curve["delay"]]
        middle = sum(-np.array(c["strength"]) * np.sin(c["angle"]) for c in mine)
        half = readings.POINTS // 2
        assert curve["p50"][half] == pytest.approx(np.median(middle), abs=1e-4)
    assert len(layer["attention_entropy"]) == len(page["heads"]) == 2
    assert all(0 <= share <= 1 for share in layer["relative_entropy"])
    for weights in layer["attention_to"].values():
        assert len(weights) == 2 and all(0 <= weight <= 1 for weight in weights)
    for order in layer["order"].values():
        assert 0 <= order["token"] <= 1 and len(order["coordinates"]) == 8
    assert sum(layer["data_frustration"]["histogram"]) == pytest.approx(1, abs=1e-3)
    for part in ("kernels", "depth"):
        assert (tmp_path / f"reading_{part}.png").stat().st_size > 1000
    assert "repulsive" in capsys.readouterr().out


def test_a_transformer_has_nothing_to_read(finished_arms):
    with pytest.raises(UserError, match="is of a transformer"):
        readings.program(["readings", str(finished_arms["transformer"])])
