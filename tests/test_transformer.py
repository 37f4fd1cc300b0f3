"""The baseline against the oracle, exactly causal, and rotary in nothing but the distance."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from fsn_jax import Transformer
from fsn_jax.transformer import RotaryAttention

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize("variant", cases.TRANSFORMER_VARIANTS)
@pytest.mark.parametrize(
    ("batch", "length", "shape"),
    [(2, 9, {}), (1, 13, {"width": 10, "num_heads": 1}), (3, 1, {"width": 8, "num_heads": 4})],
)
def test_against_oracle(batch, length, shape, variant):
    tokens = cases.tokens(batch, length)
    config = cases.transformer_config(**shape, **cases.TRANSFORMER_VARIANTS[variant])
    model = Transformer(config)
    variables = cases.random_variables(model, tokens)
    expected = oracle.transformer(oracle.as_float64(variables["params"]), tokens, config)
    logits = jax.jit(model.apply)(variables, tokens)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, expected, **TOLERANCE)


@pytest.mark.parametrize("variant", ["shifted", "tied"])
def test_gradients_against_central_differences(variant):
    tokens = cases.tokens(1, 5)
    config = cases.transformer_config(**cases.TRANSFORMER_VARIANTS[variant])
    model = Transformer(config)
    params = cases.random_variables(model, tokens)["params"]
    weights = cases.angles(1, 5, config.vocab_size, seed=5)

    def library(params):
        return (weights * model.apply({"params": params}, tokens)).sum()

    def exact(params):
        logits = oracle.transformer(params, tokens, config)
        return float((oracle.as_float64(weights) * logits).sum())

    gradients = jax.jit(jax.grad(library))(params)
    cases.check_gradients(gradients, exact, oracle.as_float64(params))


@pytest.mark.parametrize("token_shift", ["keys", "queries_and_keys"])
def test_the_token_before_costs_no_matrix_product(token_shift):
    """``flops_per_token`` counts none."""

    def products(config):
        tokens = cases.tokens(1, 5)
        model = Transformer(config)
        variables = cases.random_variables(model, tokens)
        return str(jax.make_jaxpr(model.apply)(variables, tokens)).count("dot_general")

    plain, seen = (cases.transformer_config(token_shift=s) for s in ("none", token_shift))
    assert products(seen) == products(plain) > 0
    assert seen.flops_per_token(8) == plain.flops_per_token(8)


def test_no_logit_depends_on_a_later_token():
    """As for the FSN: exactly zero derivatives with respect to later tokens' embeddings."""
    length = 5
    model = Transformer(cases.transformer_config(vocab_size=length))
    tokens = jnp.array([[3, 0, 4, 1, 2]], jnp.int32)
    params = cases.random_variables(model, tokens)["params"]

    def run(embedding):
        changed = {**params, "embedding": {"embedding": embedding}}
        return model.apply({"params": changed}, tokens)[0]

    jacobian = np.asarray(jax.jit(jax.jacrev(run))(params["embedding"]["embedding"]))
    size = np.abs(jacobian[:, :, tokens[0]]).max(axis=(1, 3))  # [t, u]
    seen = np.tri(length, dtype=bool)
    assert (size[~seen] == 0).all()
    assert (size[seen] > 0).all()


def test_distance_alone_separates_equal_tokens():
    """Keys and queries that are the same at all places give weights that depend on t - u.

    Identity projections, all tokens equal but one marked in a value channel that the scores do
    not see: the update at t reads the weight of the marked source.
    """
    length, base = 6, 5.0
    config = cases.transformer_config(width=4, num_heads=1, rotary_base=base)
    marker = np.zeros((4, 4))
    marker[3, 3] = 1.0
    seen = np.diag([1.0, 1.0, 1.0, 0.0])
    params = {
        name: {"kernel": jnp.asarray(matrix, jnp.float32)}
        for name, matrix in {
            "query": seen,
            "key": seen,
            "value": marker,
            "output": np.eye(4),
        }.items()
    }
    # Pairs (0, 2) and (1, 3): the first has both its channels on, the second one of them.
    distance = np.arange(length)[:, None] - np.arange(length)
    scores = (2 * np.cos(distance) + np.cos(distance * base**-0.5)) / np.sqrt(4)
    weights = np.tril(np.exp(scores))
    weights /= weights.sum(-1, keepdims=True)
    for source in range(length):
        x = jnp.ones((1, length, 4)).at[:, :, 3].set(0.0).at[:, source, 3].set(1.0)
        update = np.asarray(RotaryAttention(config).apply({"params": params}, x))
        np.testing.assert_allclose(update[0, source:, 3], weights[source:, source], atol=1e-6)
