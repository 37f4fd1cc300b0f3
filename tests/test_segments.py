"""Segments, positions and dropout: packed rows are what each document is alone."""

import collections
import dataclasses
import functools
import subprocess
import sys

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fsn_jax import FSN, FrustratedAttention, KuramotoAttention, Transformer
from fsn_jax.fsn import Block
from fsn_jax.torus import MAX_POSITIONS, rotary_frequencies, rotary_phasor_at
from fsn_jax.transformer import TransformerBlock

MODELS = {
    "full": functools.partial(FSN, cases.fsn_config()),
    **{
        name: functools.partial(FSN, cases.fsn_config(num_layers=1, **cases.FSN_VARIANTS[name]))
        for name in ("gated", "two_heads_per_phase", "linear_values", "field")
    },
    **{
        implementation: functools.partial(
            FSN, cases.fsn_config(num_layers=1, score="gated", implementation=implementation)
        )
        for implementation in ("reference", "pallas")
    },
    "transformer": functools.partial(Transformer, cases.transformer_config()),
    "transformer_shifted": functools.partial(
        Transformer, cases.transformer_config(token_shift="queries_and_keys")
    ),
}
LENGTHS = (3, 4)
SEGMENT_IDS = jnp.array([[5, 5, 5, 2, 2, 2, 2, 0, 0]] * 2)
"""Two documents in a row, then padding."""
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}


@functools.cache
def built(name):
    """Return (model, variables, compiled apply)."""
    model = MODELS[name]()
    apply = jax.jit(model.apply, static_argnames="method")
    return model, cases.random_variables(model, cases.tokens(1, 3)), apply


@pytest.mark.parametrize("name", MODELS)
def test_packed_documents_are_what_each_is_alone(name):
    _, variables, apply = built(name)
    tokens = cases.tokens(2, SEGMENT_IDS.shape[1])
    packed = apply(variables, tokens, segment_ids=SEGMENT_IDS)
    start = 0
    for length in LENGTHS:
        rows = slice(start, start + length)
        alone = apply(variables, tokens[:, rows])
        np.testing.assert_allclose(packed[:, rows], alone, **TOLERANCE)
        start += length
    unsegmented = apply(variables, tokens)
    assert np.abs(packed - unsegmented)[:, LENGTHS[0] :].max() > 0.01


@pytest.mark.parametrize(
    "name", ["full", "gated", "two_heads_per_phase", "transformer", "transformer_shifted"]
)
def test_a_cache_with_segments_gives_the_logits_of_the_full_pass(name):
    """In pieces that end within a document and at its end."""
    model, variables, apply = built(name)
    tokens = cases.tokens(2, SEGMENT_IDS.shape[1])
    full = apply(variables, tokens, segment_ids=SEGMENT_IDS)
    cache = model.apply(variables, 2, 11, segments=True, method="empty_cache")
    pieces = []
    for rows in (slice(0, 2), slice(2, 3), slice(3, 4), slice(4, 9)):
        logits, cache = apply(
            variables, tokens[:, rows], cache, segment_ids=SEGMENT_IDS[:, rows], method="extend"
        )
        pieces.append(logits)
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), full, **TOLERANCE)


def test_segments_and_their_cache_go_together():
    model, variables, _ = built("gated")
    tokens = cases.tokens(2, 3)
    for segments, ids in ((True, None), (False, SEGMENT_IDS[:, :3])):
        cache = model.apply(variables, 2, 5, segments=segments, method="empty_cache")
        with pytest.raises(ValueError, match="segments=True"):
            model.apply(variables, tokens, cache, segment_ids=ids, method="extend")


@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas"])
def test_no_gradient_crosses_a_segment(implementation):
    """Nor does one that segments interleave: there a successor may be in another segment."""
    segment_ids = np.array([[0, 1, 0, 0, 1, 1]])
    theta = cases.angles(1, 6, 6)
    config = cases.fsn_config(
        num_phases=6, num_heads=2, score="gated", implementation=implementation
    )
    layer = cases.layer(FrustratedAttention, config)
    variables = cases.random_variables(layer, theta)

    @functools.partial(jax.jacrev, has_aux=True)
    def jacobian_and_update(theta):
        update = layer.apply(variables, theta, segment_ids=jnp.asarray(segment_ids))
        return update, update

    jacobian, update = jax.jit(jacobian_and_update)(theta)
    size = np.abs(jacobian)[0, :, :, 0].max(axis=(1, 3))
    same = segment_ids == segment_ids.T
    seen = np.tri(6, dtype=bool) & same
    assert (size[~seen] == 0).all()
    assert (size[seen & ~np.eye(6, dtype=bool)] > 0).all()
    reference = cases.layer(
        FrustratedAttention,
        cases.fsn_config(num_phases=6, num_heads=2, score="gated", implementation="reference"),
    )
    expected = reference.apply(variables, theta, segment_ids=jnp.asarray(segment_ids))
    np.testing.assert_allclose(update, expected, **TOLERANCE)


@pytest.mark.parametrize("kind", [FrustratedAttention, KuramotoAttention])
def test_explicit_positions_are_those_of_the_drift(kind):
    """Without the tokens of another segment in between, and counted from anywhere."""
    theta = cases.angles(1, 8, 9)
    layer = cases.layer(kind, cases.fsn_config(score="gated", delay=False, rotary_base=30.0))
    variables = cases.random_variables(layer, theta)
    kept = np.array([0, 1, 2, 5, 6, 7])
    between = jnp.isin(jnp.arange(8), kept)[None].astype(jnp.int32)
    apply = jax.jit(layer.apply)
    expected = apply(variables, theta, segment_ids=between)[:, kept]
    for positions in (kept, kept + 5_000, kept[None] + MAX_POSITIONS - 8):
        actual = apply(variables, theta[:, kept], positions=jnp.asarray(positions))
        np.testing.assert_allclose(actual, expected, atol=2e-5)
    assert np.abs(apply(variables, theta[:, kept]) - expected).max() > 0.01


def test_a_position_out_of_range_gives_nan():
    theta = cases.angles(1, 2, 9)
    layer = cases.layer(KuramotoAttention, cases.fsn_config(score="gated"))
    variables = cases.random_variables(layer, theta)
    apply = jax.jit(layer.apply)
    for position in (-1, MAX_POSITIONS):
        update = apply(variables, theta, positions=jnp.array([position, 3]))
        assert np.isnan(update).any()


@pytest.mark.parametrize("name", ["gated", "transformer", "transformer_shifted"])
def test_positions_of_a_model_shift_nothing(name):
    model, variables, apply = built(name)
    tokens = cases.tokens(2, 6)
    positions = jnp.arange(6)[None] + jnp.array([[7], [900]])
    shifted = apply(variables, tokens, positions=positions)
    np.testing.assert_allclose(shifted, apply(variables, tokens), **TOLERANCE)
    cache = model.apply(variables, 2, 9, method="empty_cache")
    cached, _ = apply(variables, tokens, cache, positions=positions, method="extend")
    np.testing.assert_allclose(cached, shifted, **TOLERANCE)


def primitives(jaxpr):
    """Count the primitives of a jaxpr and of those inside it."""
    found = collections.Counter()
    for equation in jaxpr.eqns:
        found[equation.primitive.name] += 1
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            found += primitives(inner)
    return found


@pytest.mark.parametrize("name", ["gated", "linear_values", "transformer"])
def test_what_is_not_used_is_not_in_the_program(name):
    """No comparison of segments, no draw, no gather of positions; dropout that is off is absent."""
    model, variables, _ = built(name)
    tokens = cases.tokens(2, 9)

    def program(model, **arguments):
        apply = functools.partial(model.apply, **arguments)
        return jax.make_jaxpr(apply)(variables, tokens)

    plain = program(model)
    found = primitives(plain.jaxpr)
    assert found["gather"] == 1 and not found["eq"] and not found["random_bits"], found
    assert primitives(program(model, segment_ids=SEGMENT_IDS).jaxpr)["eq"] > 0
    off = type(model)(dataclasses.replace(model.config, dropout=0.5))
    assert str(program(off)) == str(plain)
    on = program(off, deterministic=False, rngs={"dropout": jax.random.key(0)})
    assert primitives(on.jaxpr)["random_bits"] > 0


@pytest.mark.parametrize("name", ["fsn", "transformer"])
def test_dropout_is_drawn_from_its_key(name):
    kind, config = {
        "fsn": (FSN, cases.fsn_config),
        "transformer": (Transformer, cases.transformer_config),
    }[name]
    tokens = cases.tokens(2, 7)
    model = kind(config(dropout=0.3))
    variables = cases.random_variables(model, tokens)

    @functools.partial(jax.jit, static_argnums=0)
    def logits(model, seed):
        rngs = {"dropout": jax.random.key(seed)}
        return model.apply(variables, tokens, deterministic=False, rngs=rngs)

    first = logits(model, 0)
    np.testing.assert_array_equal(first, logits(model, 0))
    assert np.abs(first - logits(model, 1)).max() > 0.01
    whole, off = (jax.jit(m.apply)(variables, tokens) for m in (kind(config()), model))
    np.testing.assert_array_equal(off, whole)
    remat = kind(config(dropout=0.3, remat=True))
    np.testing.assert_allclose(logits(remat, 0), first, atol=1e-5)
    for rate in (0.0, 1e-6):  # as good as none
        barely = kind(config(dropout=rate))
        np.testing.assert_allclose(logits(barely, 0), whole, atol=1e-4)


@pytest.mark.parametrize("branch", ["attention", "feedforward"])
@pytest.mark.parametrize(
    ("kind", "config"),
    [
        pytest.param(Block, cases.fsn_config(num_phases=12, dropout=0.25), id="fsn"),
        pytest.param(TransformerBlock, cases.transformer_config(dropout=0.25), id="transformer"),
    ],
)
def test_a_quarter_of_the_update_of_each_branch_is_dropped(kind, config, branch):
    """Where the other branch, without parameters, adds nothing; the rest makes up for it."""
    x, block = cases.angles(4, 16, 12), kind(config)
    params = {
        part: tree if part.startswith(branch) else jax.tree.map(jnp.zeros_like, tree)
        for part, tree in cases.random_variables(block, x)["params"].items()
    }
    rngs = {"dropout": jax.random.key(0)}

    @jax.jit
    def updates(params):
        apply = functools.partial(block.apply, {"params": params}, x)
        return apply() - x, apply(deterministic=False, rngs=rngs) - x

    update, dropped = updates(params)
    kept = np.asarray(dropped != 0)
    assert abs(kept.mean() - 0.75) < 0.1  # of 768 draws: 0.016 on average
    np.testing.assert_allclose(dropped, np.where(kept, update / 0.75, 0), atol=1e-5)


def test_a_dropped_phase_is_drawn_anew_from_the_circle():
    tokens = jnp.zeros((8, 64), jnp.int32)
    model = FSN(cases.fsn_config(dropout=0.25))
    variables = cases.random_variables(model, tokens)
    rngs = {"dropout": jax.random.key(0)}
    theta = model.apply(
        variables, tokens, rngs=rngs, method=lambda model, t: model.embedding(t, False)
    )
    whole = model.apply(variables, tokens, method=lambda model, t: model.embedding(t))
    drawn = np.asarray(theta)[np.asarray(theta != whole)]
    assert abs(drawn.size / theta.size - 0.25) < 0.02
    assert np.abs(np.exp(1j * drawn).mean()) < 0.1  # of some 1,150 draws: 0.03 on average


MISSHAPEN = """
import jax, jax.numpy as jnp
from fsn_jax import FSN, FSNConfig, FrustratedAttention, Transformer, TransformerConfig

def refused(module, x, **arguments):
    try:
        jax.eval_shape(lambda *x: module.apply(*x, **arguments), *x)
    except ValueError as error:
        print(error)

tokens, line = jnp.zeros((3, 4), jnp.int32), jnp.arange(4)
fsn = FSN(FSNConfig(vocab_size=11, num_layers=1, num_phases=8))
for model in (fsn, Transformer(TransformerConfig(vocab_size=11, num_layers=1, width=8))):
    variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
    refused(model, (variables, line))
    refused(model, (variables, tokens), segment_ids=line)
    refused(model, (variables, tokens), positions=tokens[:2])
    cache = model.apply({}, 3, 4, method="empty_cache")
    refused(model, (variables, tokens[:, :1], cache), positions=line[:3], method="extend")
    for wrong in (tokens.astype(float), tokens.astype(bool)):
        refused(model, (variables, wrong))
    refused(model, (variables, tokens), positions=line.astype(float))
    refused(model, (variables, tokens), segment_ids=[[0] * 4] * 3)
layer, theta = FrustratedAttention(num_heads=2), jnp.zeros((3, 4, 8))
variables = jax.eval_shape(layer.init, jax.random.key(0), theta)
refused(layer, (variables, theta[0, 0]))
refused(FSN(TransformerConfig()), ({}, tokens))
refused(Transformer(FSNConfig()), ({}, tokens))
for method in ("__call__", "weights"):
    refused(layer, (variables, theta), segment_ids=tokens[:, :1], method=method)
    refused(layer, (variables, theta), positions=line[:1], method=method)
cache = layer.apply({}, 3, 4, 8, method="empty_cache")
refused(layer, (variables, theta, cache, 0), positions=line[:3], method="extend")

from fsn_jax.causal import attention_weights, causal_sum
from fsn_jax.coupling_sum import coupled_field
from fsn_jax.coupling import coupling_update
from fsn_jax.torus import Complex

query, kernel, ids = jnp.zeros((3, 2, 4, 6)), jnp.zeros((2, 1, 8)), tokens[:, :1]
values = Complex(query, query)
by_head = Complex(*(jnp.zeros((2, 1, 2, 6)),) * 2)
for call in (
    lambda: attention_weights(query, query, ids),
    lambda: causal_sum(query, query, query, ids, include_self=True),
    lambda: coupled_field(query, query, values, by_head, ids),
    lambda: coupling_update(theta, jnp.zeros((3, 2, 4, 4)), kernel.astype(jnp.complex64), ids),
):
    try:
        jax.eval_shape(call)
    except ValueError as error:
        print(error)
"""


def test_what_comes_with_tokens_has_their_shape():
    """In a process of its own: the run-time type checks of the tests would speak first.

    Positions [B] of a token each would broadcast to B rows of every sequence, without an error.
    """
    command = [sys.executable, "-c", MISSHAPEN]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    segments = "segment_ids must be [B, L], here (3, 4); got shape"
    positions = "positions must be [L] or [B, L], here (4,) or (3, 4); got shape"
    of_a_model = [
        "tokens must be [B, L]; got shape (4,)",
        f"{segments} (4,)",
        f"{positions} (2, 4)",
        "positions must be [L] or [B, L], here (1,) or (3, 1); got shape (3,)",
        "tokens must be an array of whole numbers; got float32",
        "tokens must be an array of whole numbers; got bool",
        "positions must be an array of whole numbers; got float32",
        "segment_ids must be an array of whole numbers; got list",
    ]
    of_a_layer = [f"{segments} (3, 1)", f"{positions} (1,)"]
    assert printed.splitlines() == [
        *2 * of_a_model,
        "theta must be [B, L, N]; got (8,)",
        "FSN.config must be of class FSNConfig; got TransformerConfig",
        "Transformer.config must be of class TransformerConfig; got FSNConfig",
        *2 * of_a_layer,
        f"{positions} (3,)",
        *4 * [f"{segments} (3, 1)"],
    ]


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "uint32"])
def test_positions_may_be_whole_numbers_of_any_size(dtype):
    frequencies = rotary_frequencies(4, 10_000.0)
    expected = rotary_phasor_at(jnp.arange(100), frequencies)
    given = rotary_phasor_at(jnp.arange(100, dtype=dtype), frequencies)
    for part, other in zip(given, expected, strict=True):
        np.testing.assert_array_equal(part, other)
