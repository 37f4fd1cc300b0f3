"""Each ablation switch changes exactly what it names: which parameters exist, and what they do."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from fsn_jax import FSN, FrustratedAttention
from fsn_jax.fsn import Block
from fsn_jax.score import drift_frequencies

TOKENS = cases.tokens(length=7)
N, H, M, F, K = 9, 3, 2, 7, 5
BLOCK = "block_0"
FULL = {
    f"{BLOCK}/attention/score/query/kernel": (2 * N, 2 * N),
    f"{BLOCK}/attention/score/key/kernel": (2 * N, 2 * N),
    f"{BLOCK}/attention/score/log_beta": (H,),
    f"{BLOCK}/attention/kernel_real": (2, M, N),
    f"{BLOCK}/attention/kernel_imag": (2, M, N),
    f"{BLOCK}/feedforward/gate/kernel": (2 * N, F),
    f"{BLOCK}/feedforward/up/kernel": (2 * N, F),
    f"{BLOCK}/feedforward/down/kernel": (F, N),
    "embedding/angles": (11, N),
    "readout/kernel": (2 * N, 11),
    "readout/bias": (11,),
}
KERNEL = ("attention/kernel_real", "attention/kernel_imag")
DENSE_SCORE = ("attention/score/query/kernel", "attention/score/key/kernel")
SWIGLU = ("feedforward/gate/kernel", "feedforward/up/kernel", "feedforward/down/kernel")
# Switch: what leaves the tree of a block, and what enters it or changes its shape.
SWITCHES = {
    ("num_harmonics", 3): ((), {name: (2, 3, N) for name in KERNEL}),
    ("heads_per_phase", 2): ((), {name: (2, M, 2, N) for name in KERNEL}),
    ("delay", False): ((), {name: (1, M, N) for name in KERNEL}),
    ("static_angles", False): (("attention/kernel_imag",), {}),
    ("signed_harmonics", False): ((), {}),
    ("score_phases", 5): ((), {name: (2 * N, 2 * H * 5) for name in DENSE_SCORE}),
    ("similarity_heads", 1): ((), {DENSE_SCORE[1]: (2 * N, 2 * N * 2 // H)}),
    ("similarity_heads", H): (DENSE_SCORE[1:], {}),
    ("score", "gated"): (
        DENSE_SCORE,
        {f"attention/score/{name}": (H, N) for name in ("gate", "gate_angle")},
    ),
    ("score", "content_gated"): (
        DENSE_SCORE,
        {
            f"attention/score/{side}_gate/{part}": shape
            for side in ("query", "key")
            for part, shape in (("kernel", (2 * N, H * N)), ("bias", (H * N,)))
        },
    ),
    ("score", "none"): ((*DENSE_SCORE, "attention/score/log_beta"), {}),
    ("values", "linear"): (
        KERNEL,
        {"attention/value/kernel": (2 * N, N), "attention/output/kernel": (N, N)},
    ),
    ("feedforward", "collective_modes"): (
        SWIGLU,
        {
            "feedforward/bias": (K,),
            **{
                f"feedforward/{name}_{part}": shape
                for name, shape in (("gate", (N, K)), ("up", (N, K)), ("down", (K, N)))
                for part in ("real", "imag")
            },
        },
    ),
    ("feedforward", "none"): (SWIGLU, {}),
    ("field_features", True): (
        (),
        {name.replace("kernel", "field_gain"): (2, N) for name in SWIGLU[:2]},
    ),
    ("features", "quadrature"): (
        (),
        {
            **{name: (N, 2 * N) for name in DENSE_SCORE},
            **{name.replace("kernel", "quadrature"): (2, H, N) for name in DENSE_SCORE},
            **{name: (N, F) for name in SWIGLU[:2]},
            **{name.replace("kernel", "quadrature"): (2, 1, N) for name in SWIGLU[:2]},
        },
    ),
}


def build(**changes):
    model = FSN(cases.fsn_config(num_layers=1, **changes))
    return model, cases.random_variables(model, TOKENS)["params"]


def shapes(**changes):
    tree = jax.eval_shape(
        FSN(cases.fsn_config(num_layers=1, **changes)).init, jax.random.key(0), TOKENS
    )
    return {name: leaf.shape for name, leaf in flatten_dict(tree["params"], sep="/").items()}


def with_block(params, **parts):
    """Replace modules of the block: attention=..., feedforward=...; None leaves a module out."""
    block = {**params[BLOCK], **parts}
    return {**params, BLOCK: {name: part for name, part in block.items() if part is not None}}


def logits(model, params):
    return jax.jit(model.apply)({"params": params}, TOKENS)


def assert_same(one, other):
    np.testing.assert_allclose(logits(*one), logits(*other), rtol=1e-5, atol=1e-5)


def test_parameters_of_the_full_model():
    assert shapes() == FULL


@pytest.mark.parametrize("switch", SWITCHES, ids=lambda switch: "=".join(map(str, switch)))
def test_parameters_that_a_switch_changes(switch):
    removed, entered = SWITCHES[switch]
    expected = {k: v for k, v in FULL.items() if k not in {f"{BLOCK}/{name}" for name in removed}}
    expected |= {f"{BLOCK}/{name}": shape for name, shape in entered.items()}
    assert shapes(**dict([switch])) == expected


def test_a_harmonic_of_zero_strength_is_no_harmonic():
    more, params = build(num_harmonics=3)
    attention = params[BLOCK]["attention"]
    silent = {name.split("/")[1]: attention[name.split("/")[1]].at[:, 2].set(0) for name in KERNEL}
    fewer = {name: kernel[:, :2] for name, kernel in silent.items()}
    assert_same(
        (more, with_block(params, attention={**attention, **silent})),
        (build()[0], with_block(params, attention={**attention, **fewer})),
    )


def test_a_delay_of_zero_strength_is_no_delay():
    delayed, params = build()
    attention = params[BLOCK]["attention"]
    kernels = {name: attention[name] for name in ("kernel_real", "kernel_imag")}
    silent = {name: kernel.at[1].set(0) for name, kernel in kernels.items()}
    without = {name: kernel[:1] for name, kernel in kernels.items()}
    assert_same(
        (delayed, with_block(params, attention={**attention, **silent})),
        (build(delay=False)[0], with_block(params, attention={**attention, **without})),
    )


def test_angles_of_zero_are_no_angles():
    """A real kernel has the angles 0 and pi only."""
    complex_kernel, params = build()
    attention = params[BLOCK]["attention"]
    zero = {**attention, "kernel_imag": jnp.zeros_like(attention["kernel_imag"])}
    real = {name: leaf for name, leaf in attention.items() if name != "kernel_imag"}
    assert_same(
        (complex_kernel, with_block(params, attention=zero)),
        (build(static_angles=False)[0], with_block(params, attention=real)),
    )


def test_unsigned_harmonics_are_softplus_of_the_parameter():
    """Whatever the parameter, the in-phase coefficient is positive; the other one is free."""
    signed, params = build()
    attention = params[BLOCK]["attention"]
    assert (attention["kernel_real"] < 0).any()
    positive = {**attention, "kernel_real": jnp.logaddexp(0.0, attention["kernel_real"])}
    assert_same(
        (signed, with_block(params, attention=positive)),
        (build(signed_harmonics=False)[0], params),
    )


@pytest.mark.parametrize("score", ["projected", "gated", "content_gated"])
def test_a_score_of_zero_is_no_score(score):
    """The uniform mean field: every score equal because every query is zero."""
    model, params = build(score=score)
    attention = params[BLOCK]["attention"]
    zero = jax.tree.map(jnp.zeros_like, attention["score"])
    if score == "content_gated":
        zero["query_gate"]["bias"] -= 1.0  # the gate is one plus its dense layer
    unscored = {name: part for name, part in attention.items() if name != "score"}
    assert_same(
        (model, with_block(params, attention={**attention, "score": zero})),
        (build(score="none")[0], with_block(params, attention=unscored)),
    )


def test_a_similarity_head_is_one_whose_keys_are_its_queries():
    """But for the drift: with this rotary base only the first pair of a head turns; it is mute."""
    still = {"rotary_base": 1e30, "score_phases": 3}
    tied, params = build(similarity_heads=1, **still)
    attention = params[BLOCK]["attention"]
    query, key = (attention["score"][side]["kernel"] for side in ("query", "key"))
    by_head = query.reshape(2 * N, H, 2, 3).at[..., 0].set(0)
    mute = by_head.reshape(2 * N, -1)
    other = key.reshape(2 * N, H - 1, 2, 3).at[..., 0].set(0).reshape(2 * N, -1)
    score = {**attention["score"], "query": {"kernel": mute}}

    def with_key(kernel):
        return with_block(params, attention={**attention, "score": {**score, "key": kernel}})

    both = jnp.concatenate([mute[:, :6], other], axis=1)
    assert_same(
        (tied, with_key({"kernel": other})), (build(**still)[0], with_key({"kernel": both}))
    )


@pytest.mark.parametrize(("scope", "shape"), [("all", (H, N)), ("block", (N,))])
def test_gates_without_content_are_learned_gates(scope, shape):
    scope = {"score_scope": scope}
    content, params = build(score="content_gated", **scope)
    attention = params[BLOCK]["attention"]
    gate = cases.angles(*shape, seed=3)
    blind = jax.tree.map(jnp.zeros_like, attention["score"])
    blind["query_gate"]["bias"] = gate.reshape(-1) - 1.0
    blind["log_beta"] = attention["score"]["log_beta"]
    learned = {"gate": gate, "log_beta": attention["score"]["log_beta"]}
    assert_same(
        (content, with_block(params, attention={**attention, "score": blind})),
        (
            build(score="gated", score_angles=False, **scope)[0],
            with_block(params, attention={**attention, "score": learned}),
        ),
    )


def test_gates_of_a_block_are_gates_of_zero_elsewhere():
    block, params = build(score="gated", score_scope="block", score_angles=False)
    attention = params[BLOCK]["attention"]
    gate = attention["score"]["gate"].reshape(H, 1, N // H)
    everywhere = (gate * jnp.eye(H)[:, :, None]).reshape(H, N)
    assert_same(
        (block, params),
        (
            build(score="gated", score_angles=False)[0],
            with_block(
                params,
                attention={**attention, "score": {**attention["score"], "gate": everywhere}},
            ),
        ),
    )


def test_score_angles_of_zero_are_no_score_angles():
    with_angles, params = build(score="gated")
    attention = params[BLOCK]["attention"]
    score = dict(attention["score"])
    score["gate_angle"] = jnp.zeros_like(score["gate_angle"])
    without = {name: score[name] for name in ("gate", "log_beta")}
    assert_same(
        (with_angles, with_block(params, attention={**attention, "score": score})),
        (
            build(score="gated", score_angles=False)[0],
            with_block(params, attention={**attention, "score": without}),
        ),
    )


def breaks_global_rotation(config):
    """Whether a block of this config has a dense layer, whose features are not differences."""
    dense_modes = config.feedforward == "collective_modes" and config.mode_weights == "dense"
    return (
        config.score in ("projected", "content_gated")
        or config.values == "linear"
        or config.feedforward == "swiglu"
        or dense_modes
    )


@pytest.mark.parametrize("variant", cases.FSN_VARIANTS)
def test_a_block_commutes_with_a_rotation_unless_a_switch_names_a_direction(variant):
    """Each switch alone, beside gates without a feed-forward; rounding is 1e-7 rad in many sums."""
    switches = cases.FSN_VARIANTS[variant]
    score = "projected" if "score_phases" in switches else "gated"  # which alone has them
    config = cases.fsn_config(**{"score": score, "feedforward": "none", **switches})
    block, theta, turn = Block(config), cases.angles(1, 6, N), 1.3
    variables = cases.random_variables(block, theta)
    after, turned = block.apply(variables, jnp.concatenate([theta, theta + turn]))
    error = np.abs(turned - turn - after).max()
    assert error > 1e-3 if breaks_global_rotation(config) else error < 1e-4, error


@pytest.mark.parametrize("angles", [True, False], ids=["score_angles", "no_score_angles"])
def test_only_the_readout_of_the_invariant_model_breaks_global_rotation(angles):
    """Embedding angles plus one angle turn every state; a readout turned alike undoes it."""
    model, params = build(
        score="gated", score_angles=angles, feedforward="collective_modes", num_harmonics=5
    )
    turn = 1.3
    embedding = {"angles": params["embedding"]["angles"] + turn}
    turned = {**params, "embedding": embedding}
    states, moved = (model.apply({"params": p}, TOKENS, method="states") for p in (params, turned))
    np.testing.assert_allclose(moved, states + turn, atol=2e-4)
    logits, seen = (model.apply({"params": p}, TOKENS) for p in (params, turned))
    assert np.abs(seen - logits).max() > 0.1
    cosines, sines = jnp.split(params["readout"]["kernel"], 2)
    kernel = jnp.concatenate(
        [
            np.cos(turn) * cosines - np.sin(turn) * sines,
            np.sin(turn) * cosines + np.cos(turn) * sines,
        ]
    )
    undone = {**turned, "readout": {**params["readout"], "kernel": kernel}}
    np.testing.assert_allclose(model.apply({"params": undone}, TOKENS), logits, atol=1e-3)


def test_score_angles_of_k_drifts_look_k_tokens_back():
    """Distance alone separates tokens alike in all phases: the score peaks at k."""
    layer = cases.layer(FrustratedAttention, cases.fsn_config(score="gated", rotary_base=20.0))
    theta, steps_back = jnp.zeros((1, 12, N)), 3
    params = cases.random_variables(layer, theta)["params"]
    omega = drift_frequencies(layer, N)
    score = {
        "gate": jnp.ones((H, N)),
        "gate_angle": jnp.tile(steps_back * omega, (H, 1)),
        "log_beta": jnp.zeros(H),
    }
    weights = layer.apply({"params": {**params, "score": score}}, theta, method="weights")
    np.testing.assert_array_equal(
        weights[0].argmax(-1), np.maximum(np.arange(12) - steps_back, 0)[None].repeat(H, 0)
    )


def test_quadratures_are_dense_layers_whose_two_halves_share_a_matrix():
    tied, params = build(features="quadrature")

    def untie(part):
        cosine, sine = part["quadrature"]
        by_group = part["kernel"].reshape(N, len(cosine), -1)
        halves = [jnp.einsum("gn,ngo->ngo", x, by_group).reshape(N, -1) for x in (cosine, sine)]
        return {"kernel": jnp.concatenate(halves)}

    attention, feedforward = params[BLOCK]["attention"], params[BLOCK]["feedforward"]
    score = {**attention["score"], **{x: untie(attention["score"][x]) for x in ("query", "key")}}
    free = with_block(
        params,
        attention={**attention, "score": score},
        feedforward={**feedforward, **{x: untie(feedforward[x]) for x in ("gate", "up")}},
    )
    assert_same((tied, params), (build()[0], free))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"feedforward": "collective_modes"},
        {"feedforward": "collective_modes", "mode_weights": "dense"},
    ],
)
def test_a_field_that_counts_for_nothing_is_no_field(changes):
    sighted, params = build(field_features=True, **changes)
    parts = flatten_dict(params[BLOCK]["feedforward"])
    gains = {path for path in parts if path[-1] == "field_gain"}
    assert gains
    blind = unflatten_dict({k: jnp.zeros_like(v) if k in gains else v for k, v in parts.items()})
    without = unflatten_dict({k: v for k, v in parts.items() if k not in gains})
    unsighted = build(**changes)[0]
    silent = with_block(params, feedforward=blind)
    assert_same((sighted, silent), (unsighted, with_block(params, feedforward=without)))
    assert np.abs(logits(sighted, params) - logits(sighted, silent)).max() > 0.01


@pytest.mark.parametrize(
    ("kind", "silenced"), [("swiglu", ["down"]), ("collective_modes", ["down_real", "down_imag"])]
)
def test_a_feedforward_of_zero_is_no_feedforward(kind, silenced):
    model, params = build(feedforward=kind)
    silent = dict(params[BLOCK]["feedforward"])
    for name in silenced:
        silent[name] = jax.tree.map(jnp.zeros_like, silent[name])
    assert_same(
        (model, with_block(params, feedforward=silent)),
        (build(feedforward="none")[0], with_block(params, feedforward=None)),
    )


def test_linear_values_mix_features_without_looking_at_the_receiver():
    """Zero values give a zero update; circular values push a token by its own phase, too."""
    linear, params = build(values="linear", score="none", feedforward="none")
    attention = dict(params[BLOCK]["attention"])
    attention["value"] = jax.tree.map(jnp.zeros_like, attention["value"])
    f = np.asarray(params["embedding"]["angles"])[np.asarray(TOKENS)]
    f = np.concatenate([np.cos(f), np.sin(f)], -1)
    unmoved = f @ np.asarray(params["readout"]["kernel"]) + np.asarray(params["readout"]["bias"])
    actual = logits(linear, with_block(params, attention=attention))
    np.testing.assert_allclose(actual, unmoved, rtol=1e-5, atol=1e-5)
