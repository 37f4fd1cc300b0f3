"""The FSN as a whole: against the oracle, exactly causal, periodic, and indifferent to how it runs.

What holds for the transformer too (precision, remat, ensembles, sharding) is in test_models.py.
"""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fsn_jax import FSN

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@functools.cache
def compiled(variant, implementation):
    """Build a variant on one batch: its config, params, tokens and apply(params, tokens).

    ``full`` has two layers, the others one: they differ in their layer.
    """
    tokens = cases.tokens(length=7)
    switches = {"num_layers": 2 if variant == "full" else 1, **cases.FSN_VARIANTS[variant]}
    config = cases.fsn_config(implementation=implementation, **switches)
    model = FSN(config)
    params = cases.random_variables(model, tokens)["params"]
    return config, params, tokens, jax.jit(lambda p, t: model.apply({"params": p}, t))


@pytest.mark.parametrize(
    ("variant", "implementation"),
    [(variant, "xla") for variant in cases.FSN_VARIANTS]
    + [(variant, "reference") for variant in ("full", "base_layer", "field", "modes_field")],
)
def test_against_oracle(variant, implementation):
    config, params, tokens, apply = compiled(variant, implementation)
    logits = apply(params, tokens)
    assert logits.shape == (2, 7, 11) and logits.dtype == jnp.float32
    expected = oracle.fsn(oracle.as_float64(params), tokens, config)
    np.testing.assert_allclose(logits, expected, **TOLERANCE)


@pytest.mark.parametrize(
    ("variant", "implementation"),
    [(variant, "xla") for variant in ("full", "linear_values", "field")] + [("full", "reference")],
)
def test_gradients_against_central_differences(variant, implementation):
    """Of a linear functional of the logits, leaf by leaf, against float64."""
    tokens = cases.tokens(1, 5)
    config = cases.fsn_config(implementation=implementation, **cases.FSN_VARIANTS[variant])
    model = FSN(config)
    params = cases.random_variables(model, tokens)["params"]
    weights = cases.angles(1, 5, config.vocab_size, seed=5)

    def library(params):
        return (weights * model.apply({"params": params}, tokens)).sum()

    def exact(params):
        return float((oracle.as_float64(weights) * oracle.fsn(params, tokens, config)).sum())

    gradients = jax.jit(jax.grad(library))(params)
    cases.check_gradients(gradients, exact, oracle.as_float64(params))


@pytest.mark.parametrize(
    ("variant", "implementation", "num_layers"),
    [(variant, "xla", 1) for variant in cases.TOKENS_MEET]
    + [(variant, "reference", 1) for variant in ("full", "five_harmonics", "base_layer")]
    + [("full", "xla", 2)],
)
def test_no_logit_depends_on_a_later_token(variant, implementation, num_layers):
    """The derivative of any logit at t with respect to any later token's angles is exactly zero.

    Every place of the window holds a different token, so that a row of the embedding is the state
    of one place only. Then again by value: other tokens after t leave the logits up to t bit for
    bit as they are.
    """
    tokens = jnp.array([[3, 0, 4, 1, 2]], jnp.int32)
    length = tokens.shape[1]
    switches = {**cases.FSN_VARIANTS[variant], "num_layers": num_layers}
    model = FSN(cases.fsn_config(vocab_size=length, implementation=implementation, **switches))
    params = cases.random_variables(model, tokens)["params"]

    def run(angles, tokens):
        logits = model.apply({"params": {**params, "embedding": {"angles": angles}}}, tokens)[0]
        return logits, logits

    derivative = jax.jit(jax.jacrev(run, has_aux=True))
    angles = params["embedding"]["angles"]
    jacobian, logits = derivative(angles, tokens)  # [L, V, V, N], [L, V]
    size = np.abs(jacobian[:, :, tokens[0]]).max(axis=(1, 3))  # [t, u]
    seen = np.tri(length, dtype=bool)
    assert (size[~seen] == 0).all()
    assert (size[seen] > 0).all()

    for t in range(length - 1):
        changed = tokens.at[0, t + 1 :].set((tokens[0, t + 1 :] + 1) % length)
        again = derivative(angles, changed)[1]
        np.testing.assert_array_equal(again[: t + 1], logits[: t + 1])
        assert (again[t + 1] != logits[t + 1]).any()


@pytest.mark.parametrize("variant", cases.FSN_VARIANTS)
def test_whole_turns_of_any_angle_change_nothing(variant):
    """2 pi-periodic in every single embedding angle.

    The tolerance is the rounding of the wound angle: up to 20 radians, float32 resolves 1e-6, and
    two layers with couplings of order one, harmonics up to five and sharp scores multiply it.
    """
    _, params, tokens, apply = compiled(variant, "xla")

    def with_angles(angles):
        return apply({**params, "embedding": {"angles": angles}}, tokens)

    angles = params["embedding"]["angles"]
    turns = np.random.default_rng(4).integers(-2, 3, size=angles.shape)
    wound = jnp.asarray(oracle.as_float64(angles) + 2 * np.pi * turns, jnp.float32)
    logits = with_angles(angles)
    np.testing.assert_allclose(with_angles(wound), logits, atol=1e-4)
    # Half a turn is no symmetry, so the agreement above is no accident.
    half = jnp.asarray(oracle.as_float64(angles) + np.pi * turns, jnp.float32)
    assert np.abs(with_angles(half) - logits).max() > 0.01


@pytest.mark.parametrize("score", ["gated", "none"])
def test_rotates_as_one_where_nothing_reads_the_absolute_phase(score):
    """Without content in the score and without a feed-forward, the state follows a rotation.

    The readout sees cosines and sines; turned back by the same angle it gives the same logits.
    """
    rotation = 0.9
    tokens = cases.tokens(length=7)
    config = cases.fsn_config(score=score, feedforward="none")
    model = FSN(config)
    params = cases.random_variables(model, tokens)["params"]
    apply = jax.jit(model.apply)
    logits = apply({"params": params}, tokens)

    rotated = {**params, "embedding": {"angles": params["embedding"]["angles"] + rotation}}
    moved = apply({"params": rotated}, tokens)
    assert np.abs(moved - logits).max() > 0.1

    # logits = cos(theta) W_c + sin(theta) W_s, read at theta = (theta + rotation) - rotation.
    on_cos, on_sin = np.split(np.asarray(params["readout"]["kernel"]), 2)
    c, s = np.cos(rotation), np.sin(rotation)
    turned_back = jnp.asarray(
        np.concatenate([c * on_cos - s * on_sin, s * on_cos + c * on_sin]), jnp.float32
    )
    rotated["readout"] = {**params["readout"], "kernel": turned_back}
    np.testing.assert_allclose(apply({"params": rotated}, tokens), logits, atol=3e-5)


def test_diagnostics_are_off_by_default():
    tokens = cases.tokens(length=5)
    model = FSN(cases.fsn_config(num_layers=1))
    variables = cases.random_variables(model, tokens)

    @functools.partial(jax.jit, static_argnames="collection")
    def run(collection):
        return model.apply(variables, tokens, mutable=[collection])

    logits, quiet = run(collection="other")
    assert not jax.tree.leaves(quiet)
    same, sown = run(collection="diagnostics")
    np.testing.assert_allclose(same, logits, atol=1e-6)
    block = sown["diagnostics"]["block_0"]
    (order,) = np.asarray(block["order_parameter"])
    (entropy,) = np.asarray(block["attention"]["attention_entropy"])
    assert ((order >= 0) & (order <= 1 + 1e-6)).all()
    # A row of t + 1 weights has an entropy between zero and log(t + 1); the first has none.
    assert (entropy <= np.log(np.arange(1, 6)) + 1e-5).all()
    np.testing.assert_allclose(entropy[..., 0], 0.0, atol=1e-6)
    assert (entropy[..., 1:] > 0).all()


@st.composite
def small_configs(draw):
    heads = draw(st.integers(1, 3))
    score = draw(st.sampled_from(["projected", "gated", "content_gated", "none"]))
    values = draw(st.sampled_from(["circular", "linear"]))
    return cases.fsn_config(
        vocab_size=draw(st.integers(1, 5)),
        num_layers=draw(st.integers(1, 2)),
        num_heads=heads,
        num_phases=heads * draw(st.integers(1, 4)),
        num_harmonics=draw(st.integers(1, 4)),
        delay=draw(st.booleans()),
        static_angles=draw(st.booleans()),
        signed_harmonics=draw(st.booleans()),
        score=score,
        score_scope=draw(st.sampled_from(["all", "block"])) if "gated" in score else "all",
        score_phases=draw(st.integers(0, 3)) if score == "projected" else 0,
        values=values,
        features=draw(st.sampled_from(["phasor", "quadrature"])),
        field_features=draw(st.booleans()) if values == "circular" else False,
        feedforward=draw(st.sampled_from(["swiglu", "collective_modes", "none"])),
        feedforward_width=draw(st.integers(1, 4)),
        num_modes=draw(st.integers(1, 4)),
        dtype=draw(st.sampled_from(["float32", "bfloat16"])),
        remat=draw(st.booleans()),
        implementation=draw(st.sampled_from(["auto", *cases.IMPLEMENTATIONS])),
    )


@settings(max_examples=8)
@given(config=small_configs(), length=st.integers(2, 6), seed=st.integers(0, 99))
def test_any_valid_configuration_runs_and_is_causal(config, length, seed):
    """Finite logits of the right shape, causal bit for bit, and as many parameters as promised."""
    tokens = cases.tokens(2, length, config.vocab_size, seed)
    model = FSN(config)
    variables = cases.random_variables(model, tokens, seed=seed)
    assert sum(x.size for x in jax.tree.leaves(variables)) == config.num_params()
    apply = jax.jit(model.apply)
    logits = apply(variables, tokens)
    assert logits.shape == (2, length, config.vocab_size) and logits.dtype == jnp.float32
    assert np.isfinite(logits).all()
    changed = tokens.at[:, -1].set((tokens[:, -1] + 1) % config.vocab_size)
    np.testing.assert_array_equal(apply(variables, changed)[:, :-1], logits[:, :-1])
