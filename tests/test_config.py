"""Configurations: they refuse what cannot work, and they know their own size."""

import dataclasses
import itertools
import random
import re

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fsn_jax import (
    FSN,
    ConfigError,
    FrustratedAttention,
    FSNConfig,
    KuramotoAttention,
    Transformer,
    TransformerConfig,
)
from fsn_jax.config import match_parameters
from train.settings import OptimizerConfig

BAD_FSN = [
    ("vocab_size", 0),
    ("vocab_size", 2.5),
    ("num_layers", 0),
    ("num_layers", "4"),
    ("num_phases", -8),
    ("num_heads", 0),
    ("num_heads", 5),
    ("num_heads", True),
    ("heads_per_phase", 0),
    ("heads_per_phase", 5),
    ("num_harmonics", 0),
    ("delay", 1),
    ("static_angles", "yes"),
    ("signed_harmonics", None),
    ("score", "cosine"),
    ("score_scope", "head"),
    ("dropout", 1.0),
    ("dropout", -0.1),
    ("kernel_angle", -1.0),
    ("kernel_angle", 1.5),
    ("score_phases", -1),
    ("similarity_heads", -1),
    ("similarity_heads", 5),
    ("values", "dense"),
    ("feedforward", "mlp"),
    ("feedforward_width", 0),
    ("num_modes", 0),
    ("rotary_base", 1.0),
    ("rotary_base", float("nan")),
    ("embedding_scale", -1.0),
    ("score_sharpness", 0.0),
    ("kernel_scale", float("inf")),
    ("dtype", "float16"),
    ("remat", "no"),
    ("implementation", "triton"),
]
BAD_TRANSFORMER = [
    ("vocab_size", -1),
    ("num_layers", 1.0),
    ("width", 0),
    ("width", 63),
    ("num_heads", 0),
    ("num_heads", 3),
    ("feedforward_width", 0),
    ("tied_embedding", "both"),
    ("rotary_base", 0.5),
    ("dtype", "int8"),
    ("remat", 2),
    ("implementation", "pallas?"),
]
CASES = [(FSNConfig, *bad) for bad in BAD_FSN]
CASES += [(TransformerConfig, *bad) for bad in BAD_TRANSFORMER]


@pytest.mark.parametrize(("config_class", "field", "value"), CASES)
def test_refuses_a_bad_field_in_one_line_that_names_it(config_class, field, value):
    with pytest.raises(ConfigError) as caught:
        config_class(**{field: value})
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(config_class.__name__) and re.search(rf"\b{field}\b", message)
    assert str(value) in message


@pytest.mark.parametrize(
    ("score", "field", "value"),
    [
        ("gated", "score_phases", 3),
        ("content_gated", "score_phases", 3),
        ("none", "score_phases", 3),
        ("none", "similarity_heads", 2),
    ],
)
@pytest.mark.parametrize("kind", [FSNConfig, FrustratedAttention, KuramotoAttention])
def test_refuses_what_does_not_belong_to_a_score(kind, score, field, value):
    with pytest.raises(ConfigError, match=rf"^{kind.__name__}\.{field} must be .* got {value}"):
        kind(**{"score": score, field: value})


def test_a_config_of_another_kind_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"^FrustratedAttention takes settings by their names"):
        FrustratedAttention(FSNConfig())


def test_one_head_is_told_of_both_settings_that_it_needs():
    """With ``heads_per_phase=1`` alone the one head would be one without positions."""
    said = r"heads_per_phase must be from 1 to num_heads \(1\), and similarity_heads 0 .*; got 2$"
    with pytest.raises(ConfigError, match=said):
        FrustratedAttention(num_heads=1)
    FrustratedAttention(num_heads=1, heads_per_phase=1, similarity_heads=0)
    with pytest.raises(ConfigError, match=r"from 1 to num_heads \(2\); got 3$"):
        FrustratedAttention(num_heads=2, heads_per_phase=3)


@pytest.mark.parametrize(
    ("kind", "name"),
    [(FSNConfig, "dropout"), (FrustratedAttention, "score_angle"), (OptimizerConfig, "beta1")],
)
def test_a_whole_number_for_a_float_is_one(kind, name):
    """Or a flag of its type would take whole numbers alone."""
    assert isinstance(getattr(kind(**{name: 0}), name), float)


@pytest.mark.parametrize("kind", [FSNConfig, TransformerConfig, FrustratedAttention])
def test_a_dtype_may_be_named_by_the_type_itself(kind):
    for dtype in (jnp.bfloat16, jnp.dtype("bfloat16")):
        assert kind(dtype=dtype) == kind(dtype="bfloat16")
    for other in (None, jnp.int32, np.dtype("float16")):
        with pytest.raises(ConfigError, match=rf"^{kind.__name__}\.dtype must be one of"):
            kind(dtype=other)


@pytest.mark.parametrize("config", [FSNConfig(), TransformerConfig()])
def test_refuses_a_context_without_tokens(config):
    with pytest.raises(ConfigError, match="context"):
        config.flops_per_token(0)


@pytest.mark.parametrize("config", [FSNConfig(), TransformerConfig()])
def test_frozen_hashable_and_checked_again_when_replaced(config):
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_layers = 3
    assert hash(config) == hash(type(config)())
    assert dataclasses.replace(config, num_layers=3).num_layers == 3
    with pytest.raises(ConfigError, match="num_layers"):
        dataclasses.replace(config, num_layers=0)


def fsn_grid():
    """Every score with every value pathway and feed-forward; the rest is drawn, each by itself."""
    kinds = itertools.product(
        ("projected", "gated", "content_gated", "none"),
        ("circular", "linear"),
        ("swiglu", "collective_modes", "none"),
    )
    for i, (score, values, feedforward) in enumerate(kinds):
        draw = random.Random(i).choice
        heads, heard = draw([(1, 1), (3, 1), (3, 2), (3, 3), (9, 2), (9, 3)])
        yield cases.fsn_config(
            score=score,
            values=values,
            feedforward=feedforward,
            num_heads=heads,
            heads_per_phase=heard,
            features=draw(["phasor", "quadrature"]),
            delay=draw([True, False]),
            static_angles=draw([True, False]),
            num_harmonics=draw([1, 2, 3]),
            num_layers=draw([1, 2]),
            vocab_size=draw([5, 6, 7]),
            score_scope=draw(["all", "block"]),
            score_angles=draw([True, False]),
            score_phases=draw([0, 1, 2]) if score == "projected" else 0,
            similarity_heads=draw([0, 1]),
        )


def count(model):
    tokens = cases.tokens(1, 3, 5)
    tree = jax.eval_shape(model.init, jax.random.key(0), tokens)
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_num_params_of_every_kind_of_fsn():
    for config in fsn_grid():
        assert count(FSN(config)) == config.num_params(), config


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layers", [1, 3])
def test_num_params_of_the_transformer(layers, tied):
    config = cases.transformer_config(num_layers=layers, tied_embedding=tied, vocab_size=205)
    assert count(Transformer(config)) == config.num_params()


CONTEXT = 10
PAIRS = sum(range(1, CONTEXT + 1))  # of a query and a visible source, in one window: 55


def training_flops(products):
    """Three passes (forward, and two products for each of them backward) over one window.

    products: (rows, inner, columns) of every matrix product of a forward pass over the window;
    each of its multiply-adds is two operations.
    """
    return sum(3 * 2 * rows * inner * columns for rows, inner, columns in products) / CONTEXT


@pytest.mark.parametrize(
    ("switches", "products_of_a_layer"),
    [
        (
            # N = 6, H = 2, R = 4, M = 3, F = 7.
            {"score_phases": 4, "num_harmonics": 3},
            [
                (CONTEXT, 12, 16),  # queries
                (CONTEXT, 12, 16),  # keys
                (2 * PAIRS, 8, 1),  # scores: two heads, four pairs of reals
                (2 * PAIRS, 1, 18),  # values: a head has 3 phases, 3 harmonics, two reals each
                (CONTEXT, 12, 7),
                (CONTEXT, 12, 7),
                (CONTEXT, 7, 6),
            ],
        ),
        (
            # Both gates; modes K = 5, real and imaginary.
            {
                "score": "content_gated",
                "score_scope": "block",
                "feedforward": "collective_modes",
                "mode_weights": "dense",
            },
            [
                (CONTEXT, 12, 6),
                (CONTEXT, 12, 6),
                (2 * PAIRS, 6, 1),
                (2 * PAIRS, 1, 12),
                (CONTEXT, 12, 5),
                (CONTEXT, 5, 6),
                (CONTEXT, 5, 6),
            ],
        ),
        (
            # A quadrature a phase for each head: its queries are computed from both.
            {"features": "quadrature"},
            [
                (CONTEXT, 12, 12),
                (CONTEXT, 12, 12),
                (2 * PAIRS, 6, 1),
                (2 * PAIRS, 1, 12),
                (CONTEXT, 6, 7),
                (CONTEXT, 6, 7),
                (CONTEXT, 7, 6),
            ],
        ),
        (
            # The keys of one head are its queries; the other's read one quadrature a phase.
            {"features": "quadrature", "similarity_heads": 1},
            [
                (CONTEXT, 12, 12),
                (CONTEXT, 6, 6),
                (2 * PAIRS, 6, 1),
                (2 * PAIRS, 1, 12),
                (CONTEXT, 6, 7),
                (CONTEXT, 6, 7),
                (CONTEXT, 7, 6),
            ],
        ),
        (
            {"score": "gated", "values": "linear", "feedforward": "collective_modes"},
            [
                (2 * PAIRS, 12, 1),
                (CONTEXT, 12, 6),
                (2 * PAIRS, 1, 3),
                (CONTEXT, 6, 6),
                *[(CONTEXT, 12, 10)] * 2,  # two order parameters of each of K = 5 modes
                (CONTEXT, 10, 12),
            ],
        ),
        (
            {"score": "gated", "values": "linear", "feedforward": "none"},
            [(2 * PAIRS, 12, 1), (CONTEXT, 12, 6), (2 * PAIRS, 1, 3), (CONTEXT, 6, 6)],
        ),
    ],
)
def test_flops_of_the_fsn_counted_by_hand(switches, products_of_a_layer):
    config = cases.fsn_config(num_phases=6, num_heads=2, **switches)
    products = config.num_layers * products_of_a_layer + [(CONTEXT, 12, 11)]
    assert config.flops_per_token(CONTEXT) == pytest.approx(training_flops(products), rel=1e-12)


def test_flops_of_the_transformer_counted_by_hand():
    config = cases.transformer_config()  # D = 12, H = 3, F = 7, V = 11
    layer = [
        *[(CONTEXT, 12, 12)] * 4,  # query, key, value, output
        (3 * PAIRS, 4, 1),
        (3 * PAIRS, 1, 4),
        *[(CONTEXT, 12, 7)] * 2,
        (CONTEXT, 7, 12),
    ]
    products = 2 * layer + [(CONTEXT, 12, 11)]
    assert config.flops_per_token(CONTEXT) == pytest.approx(training_flops(products), rel=1e-12)


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (FSNConfig(), "feedforward_width"),
        (FSNConfig(feedforward="collective_modes"), "num_modes"),
        (TransformerConfig(tied_embedding=True), "feedforward_width"),
    ],
)
def test_matching_finds_the_nearest_size_and_changes_the_width_alone(config, field):
    for target in (200_000, 654_321):
        matched = match_parameters(config, target)
        width = getattr(matched, field)
        assert dataclasses.replace(matched, **{field: getattr(config, field)}) == config
        beside = [dataclasses.replace(config, **{field: w}) for w in (width - 1, width + 1)]
        off = abs(matched.num_params() - target)
        assert all(abs(other.num_params() - target) >= off for other in beside)


def test_matching_refuses_what_has_no_width_or_is_too_large():
    with pytest.raises(ConfigError, match="feedforward is 'none'"):
        match_parameters(FSNConfig(feedforward="none"), 10**6)
    with pytest.raises(ConfigError, match="fewer than the"):
        match_parameters(TransformerConfig(), 1000)
