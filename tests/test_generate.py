"""Cached generation: the logits of the full forward pass, and draws from the right distribution."""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fsn_jax import FSN, ConfigError, Transformer
from fsn_jax.generate import generate, sample_token, stream

MODELS = {
    **{
        name: lambda switches=switches: FSN(cases.fsn_config(**{"num_layers": 1, **switches}))
        for name, switches in cases.FSN_VARIANTS.items()
    },
    "two_layers": lambda: FSN(cases.fsn_config(num_layers=2)),
    "transformer": lambda: Transformer(cases.transformer_config()),
    "transformer_tied": lambda: Transformer(cases.transformer_config(tied_embedding=True)),
}


MIXED_CUTS = ("two_layers", "linear_values", "transformer")


@functools.cache
def built(name):
    """Return (model, variables), one object a model, so that compiled functions are shared."""
    model = MODELS[name]()
    return model, cases.random_variables(model, cases.tokens(1, 3))


@pytest.mark.parametrize("name", MODELS)
def test_cached_logits_are_those_of_the_full_pass(name):
    """Prefill and continue, cut at odd places: three tokens at once, or by turns one and three.

    The cache is longer than the text and starts as zeros, which must not be seen. A chunk's last
    token has no successor yet; the next chunk brings it.
    """
    model, variables = built(name)
    tokens = cases.tokens(2, 9)
    full = cases.quick_jit(model.apply)(variables, tokens)
    extend = cases.quick_jit(functools.partial(model.apply, method="extend"))
    cache = model.apply(variables, 2, 12, method="empty_cache")
    logits, position = [], 0
    for size in (1, 3, 1, 3, 1) if name in MIXED_CUTS else (3, 3, 3):
        chunk = tokens[:, position : position + size]
        piece, cache = extend(variables, chunk, cache)
        logits.append(piece)
        position += size
        assert cache.position == position
    assert position == tokens.shape[1]
    np.testing.assert_allclose(np.concatenate(logits, axis=1), full, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["full", "transformer"])
def test_greedy_text_is_that_of_the_full_pass(name):
    """Token by token against the plain forward pass, through two slides of the window."""
    context, wanted = 8, 11
    model, variables = built(name)
    prompt = cases.tokens(2, 3)
    text = generate(
        model,
        variables,
        prompt,
        num_tokens=wanted,
        key=jax.random.key(0),
        context=context,
        temperature=0.0,
    )
    assert text.shape == (2, wanted)

    apply = cases.quick_jit(model.apply)
    window, expected = np.asarray(prompt), []
    for _ in range(wanted):
        if window.shape[1] == context:
            window = window[:, -context // 2 :]
        # Padded at the end to one shape, which a causal model does not see.
        padded = np.pad(window, ((0, 0), (0, context - window.shape[1])))
        logits = apply(variables, jnp.asarray(padded))[:, window.shape[1] - 1]
        expected.append(np.asarray(logits).argmax(-1))
        window = np.concatenate([window, expected[-1][:, None]], axis=1)
    np.testing.assert_array_equal(text, np.stack(expected, axis=1))


def test_draws_are_reproducible_and_do_not_depend_on_how_many_are_wanted():
    model, variables = built("full")
    prompt = cases.tokens(2, 3)
    draw = functools.partial(generate, model, variables, prompt, context=64)
    key = jax.random.key(0)
    long = np.asarray(draw(num_tokens=40, key=key))
    np.testing.assert_array_equal(draw(num_tokens=5, key=key), long[:, :5])
    assert (np.asarray(draw(num_tokens=40, key=jax.random.key(1))) != long).any()
    assert ((long >= 0) & (long < 11)).all()
    pieces = list(stream(model, variables, prompt, num_tokens=40, key=key, context=64))
    assert len(pieces) > 1
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), long)


def test_a_prompt_longer_than_the_context_keeps_its_end():
    model, variables = built("full")
    prompt = cases.tokens(1, 20)
    draw = functools.partial(
        generate, model, variables, num_tokens=3, key=jax.random.key(0), context=8, temperature=0.0
    )
    np.testing.assert_array_equal(draw(prompt), draw(prompt[:, -4:]))


def frequencies(logits, draws=20_000, **options):
    """Draw many tokens from one distribution and count them."""
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (draws, len(logits)))
    tokens = sample_token(rows, jax.random.key(3), **options)
    return np.bincount(np.asarray(tokens), minlength=len(logits)) / draws


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"temperature": 0.5}, [0, 1, 2, 3, 4]),
        ({"temperature": 2.0}, [0, 1, 2, 3, 4]),
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 5}, [0, 1, 2, 3, 4]),
        ({"top_k": 99}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.35}, [1]),
        ({"top_p": 0.6}, [1, 3]),
        ({"top_p": 0.85}, [1, 3, 0]),
        ({"top_k": 3, "top_p": 0.75}, [1, 3]),
        ({"temperature": 0.0}, [1]),
    ],
)
def test_sampling_distribution(options, kept):
    """Frequencies within five standard deviations of the truncated, renormalised distribution.

    Of 20,000 draws that is at most 5 * sqrt(0.25 / 20000) = 0.018. After top_k = 3 the two
    likeliest hold 0.7 / 0.9 > 0.75 of what is left, so top_p = 0.75 stops there; alone it would
    take three.
    """
    probability = np.array([0.2, 0.4, 0.07, 0.3, 0.03])
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **options}
    actual = frequencies(np.log(probability), **options)
    expected = np.zeros(5)
    power = 1 / options["temperature"] if options["temperature"] else 1.0
    expected[kept] = probability[kept] ** power
    expected /= expected.sum()
    assert set(np.flatnonzero(actual)) == set(kept)
    np.testing.assert_allclose(actual, expected, atol=0.018)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("num_tokens", 0),
        ("context", 1),
        ("temperature", -0.5),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("prompt", jnp.zeros((1, 0), jnp.int32)),
    ],
)
def test_refuses_a_bad_argument_in_one_line_that_names_it(argument, value):
    model, variables = built("full")
    arguments = {
        "prompt": cases.tokens(1, 3),
        "num_tokens": 2,
        "key": jax.random.key(0),
        "context": 8,
        "temperature": 1.0,
        argument: value,
    }
    with pytest.raises(ConfigError, match=argument) as caught:
        generate(model, variables, **arguments)
    assert "\n" not in str(caught.value)
