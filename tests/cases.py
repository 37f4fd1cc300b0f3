"""Tiny models that the tests share: configurations for every switch, parameters, tokens.

The parameters are drawn by NumPy over the shapes of the real tree. Unlike a fresh initialisation
they leave nothing at a special value (no zero bias, no unit scale, no equal temperature), so that
a term the library forgot cannot hide.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
from flax.traverse_util import flatten_dict

from fsn_jax import FSNConfig, TransformerConfig
from fsn_jax.fields import shared_settings

TINY_FSN: dict[str, Any] = {
    "vocab_size": 11,
    "num_layers": 2,
    "num_phases": 9,
    "num_heads": 3,
    "heads_per_phase": 1,
    "score": "projected",
    "score_scope": "all",
    "similarity_heads": 0,
    "feedforward_width": 7,
    "num_modes": 5,
}
TINY_TRANSFORMER: dict[str, Any] = {
    "vocab_size": 11,
    "num_layers": 2,
    "width": 12,
    "num_heads": 3,
    "feedforward_width": 7,
}
BASE_LAYER: dict[str, Any] = {
    "num_harmonics": 1,
    "delay": False,
    "static_angles": False,
    "signed_harmonics": False,
}

FSN_VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "two_heads_per_phase": {"heads_per_phase": 2, "num_harmonics": 1},
    "wide_score": {"score_phases": 5},
    "similarity_head": {"similarity_heads": 1},
    "similarity_heads": {"similarity_heads": 3, "features": "quadrature", "score_phases": 2},
    "gated": {"score": "gated"},
    "gated_no_angles": {"score": "gated", "score_angles": False},
    "unscaled": {"feature_scale": 1.0, "score": "gated"},
    "gated_block": {"score": "gated", "score_scope": "block"},
    "gated_similarity": {"score": "gated", "similarity_heads": 1},
    "content_gated": {"score": "content_gated", "score_scope": "block"},
    "content_gated_all": {"score": "content_gated"},
    "content_gated_similarity": {"score": "content_gated", "similarity_heads": 1},
    "no_score": {"score": "none"},
    "one_quadrature": {"features": "quadrature"},
    "content_gated_one_quadrature": {
        "features": "quadrature",
        "score": "content_gated",
        "score_scope": "block",
        "values": "linear",
    },
    "modes_one_quadrature": {
        "features": "quadrature",
        "feedforward": "collective_modes",
        "mode_weights": "dense",
    },
    "linear_values": {"values": "linear"},
    "content_gated_linear_values": {
        "score": "content_gated",
        "score_scope": "block",
        "values": "linear",
    },
    "collective_modes": {"feedforward": "collective_modes"},
    "dense_modes": {"feedforward": "collective_modes", "mode_weights": "dense"},
    "native": {"feedforward": "collective_modes", "score": "gated", "field_features": True},
    "field": {"field_features": True, "heads_per_phase": 3, "num_harmonics": 1},
    "modes_field": {
        "field_features": True,
        "features": "quadrature",
        "feedforward": "collective_modes",
        "mode_weights": "dense",
    },
    "no_feedforward": {"feedforward": "none"},
    "no_delay": {"delay": False},
    "no_angles": {"static_angles": False},
    "positive": {"signed_harmonics": False},
    "five_harmonics": {"num_harmonics": 5},
    "base_layer": BASE_LAYER,
}
WITHIN_A_TOKEN = {
    "unscaled", "one_quadrature", "content_gated_one_quadrature", "modes_one_quadrature",
    "collective_modes", "dense_modes", "modes_field", "no_feedforward", "positive",
    "gated_no_angles", "content_gated_all", "content_gated_similarity",
    "content_gated_linear_values", "wide_score", "similarity_head", "gated_block", "no_angles",
}  # fmt: skip
"""Variants that change what happens within a token, or combine two that are tested alone."""
TOKENS_MEET = tuple(name for name in FSN_VARIANTS if name not in WITHIN_A_TOKEN)
"""For tests of causality and of the cache."""
TRANSFORMER_VARIANTS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tied_embedding": True},
    "shifted_keys": {"token_shift": "keys"},
    "shifted": {"token_shift": "queries_and_keys"},
}
IMPLEMENTATIONS = ("reference", "xla")


def fsn_config(**changes: Any) -> FSNConfig:
    """Build the tiny FSN configuration with some fields changed."""
    return FSNConfig(**{**TINY_FSN, **changes})


def layer(kind: Any, config: FSNConfig) -> Any:
    """Build a layer with the settings of a model."""
    return kind(**shared_settings(config, kind))


def transformer_config(**changes: Any) -> TransformerConfig:
    """Build the tiny transformer configuration with some fields changed."""
    return TransformerConfig(**{**TINY_TRANSFORMER, **changes})


def tokens(batch: int = 2, length: int = 7, vocab_size: int = 11, seed: int = 0) -> jax.Array:
    """Draw tokens int32 [batch, length]."""
    shape = (batch, length)
    return jnp.asarray(np.random.default_rng(seed).integers(vocab_size, size=shape), jnp.int32)


def angles(*shape: int, seed: int = 0, turns: float = 1.0) -> jax.Array:
    """Draw angles float32 of the shape given, uniform over so many turns around zero."""
    draw = np.random.default_rng(seed).uniform(-np.pi, np.pi, size=shape)
    return jnp.asarray(turns * draw, jnp.float32)


@functools.cache
def _shapes(module: nn.Module, *inputs: jax.ShapeDtypeStruct) -> Any:
    return jax.eval_shape(module.init, jax.random.key(0), *inputs)


def random_variables(module: nn.Module, *inputs: jax.Array, seed: int = 0) -> dict[str, Any]:
    """Draw {"params": tree} with the shapes of the module's own initialisation.

    Matrices called `kernel` keep their outputs of order one; angles span the circle; norm scales
    are around one; everything else (gates, biases, temperatures, couplings) is of order 0.5.
    """
    rng = np.random.default_rng(seed)
    shapes = _shapes(module, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs))

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = path[-1].key
        value = rng.normal(size=leaf.shape)
        if name == "kernel":
            value /= np.sqrt(leaf.shape[0])
        elif name == "scale":
            value = 1 + 0.3 * value
        elif name == "angles":
            value *= 1.5
        else:
            value *= 0.5
        return jnp.asarray(value, leaf.dtype)

    # A module without parameters (no score, no feed-forward) has no "params" at all.
    return {"params": {}, **jax.tree_util.tree_map_with_path(draw, shapes)}


def random_attention(batch: int, heads: int, length: int, seed: int = 0) -> jax.Array:
    """Draw causal attention weights float32 [batch, heads, length, length] whose rows sum to 1."""
    scores = np.random.default_rng(seed).normal(size=(batch, heads, length, length))
    weights = np.tril(np.exp(scores))
    return jnp.asarray(weights / weights.sum(-1, keepdims=True), jnp.float32)


def leaf_paths(tree: Any) -> set[str]:
    """Name every leaf of a tree of dicts by its path, as in `block_0/attention/kernel_real`."""
    return set(flatten_dict(tree, sep="/"))


def check_gradients(gradients: Any, exact: Any, at: Any, seed: int = 11) -> None:
    """Compare gradients with central differences of a float64 function, leaf by leaf.

    Each leaf is moved along its own random direction of unit length; the derivative may be off by
    1e-5 of the length of that leaf's gradient, about what float32 leaves of the sums behind it.

    Args:
      gradients: tree of float32 arrays, what the library says.
      exact: function of a float64 tree, the oracle's loss.
      at: float64 tree, where the gradients were taken.
    """
    rng = np.random.default_rng(seed)
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        gradient = np.asarray(gradient, np.float64)
        direction = rng.normal(size=gradient.shape)
        direction /= np.linalg.norm(direction)
        branch: Any = direction
        for step in reversed(path):
            branch = {step.key: branch}
        expected = oracle.directional_derivative(exact, at, branch)
        name = "/".join(str(step.key) for step in path)
        length = np.linalg.norm(gradient)
        assert length > 0, f"{name} has no gradient"
        error = abs((gradient * direction).sum() - expected) / length
        assert error <= 1e-5, f"{name}: the derivative is off by {error:.1e} of the gradient"
