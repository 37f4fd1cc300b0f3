"""Cached generation: the logits of the full forward pass, and draws from the right distribution."""

import functools
import math
import re

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fsn_jax import FSN, ConfigError, FrustratedAttention, KuramotoAttention, Transformer
from fsn_jax import generate as generation
from fsn_jax.generate import NO_TOKEN, generate, likeliest, sample_token, stream

MODELS = {
    **{
        name: lambda name=name: FSN(
            cases.fsn_config(**{"num_layers": 1, **cases.FSN_VARIANTS[name]})
        )
        for name in cases.TOKENS_MEET
    },
    "two_layers": lambda: FSN(cases.fsn_config(num_layers=2)),
    "bfloat16": lambda: FSN(cases.fsn_config(heads_per_phase=3, dtype="bfloat16")),
    "transformer": lambda: Transformer(cases.transformer_config()),
    "transformer_shifted": lambda: Transformer(
        cases.transformer_config(token_shift="queries_and_keys")
    ),
    "transformer_bfloat16": lambda: Transformer(cases.transformer_config(dtype="bfloat16")),
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
    full = jax.jit(model.apply)(variables, tokens)
    extend = jax.jit(functools.partial(model.apply, method="extend"))
    cache = model.apply(variables, 2, 12, method="empty_cache")
    logits, position = [], 0
    for size in (1, 3, 1, 3, 1) if name in MIXED_CUTS else (3, 3, 3):
        chunk = tokens[:, position : position + size]
        piece, cache = extend(variables, chunk, cache)
        logits.append(piece)
        position += size
        assert cache.position == position
    assert position == tokens.shape[1]
    assert full.dtype == jnp.float32
    # bfloat16 products differ by their last of eight bits where sums are taken in another order.
    tolerance = 0.04 if "bfloat16" in name else 1e-5
    np.testing.assert_allclose(np.concatenate(logits, axis=1), full, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["two_layers", "transformer_shifted"])
def test_a_model_with_parameters_of_half_precision_has_a_cache_too(name):
    model, variables = built(name)
    cast = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), variables)
    tokens = cases.tokens(2, 6)
    full = jax.jit(model.apply)(cast, tokens)
    cache = model.apply(cast, 2, 6, method="empty_cache")
    logits, _ = jax.jit(functools.partial(model.apply, method="extend"))(cast, tokens, cache)
    assert logits.dtype == full.dtype == jnp.float32
    np.testing.assert_allclose(logits, full, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", ["full", "transformer"])
def test_what_the_cache_has_no_room_for_is_nan(name):
    model, variables = built(name)
    extend = jax.jit(functools.partial(model.apply, method="extend"))
    cache = model.apply(variables, 1, 4, method="empty_cache")
    for position, token in enumerate(cases.tokens(1, 6).T):
        logits, cache = extend(variables, token[:, None], cache)
        assert bool(jnp.isnan(logits).all()) == (position >= 4)
        assert bool(jnp.isnan(logits).any()) == (position >= 4)
    cache = model.apply(variables, 1, 4, method="empty_cache")
    _, cache = extend(variables, cases.tokens(1, 3), cache)
    logits, _ = extend(variables, cases.tokens(1, 3), cache)  # the first of them would fit
    assert jnp.isnan(logits).all()
    with pytest.raises(ValueError, match="5 tokens do not fit into a cache for 4"):
        extend(variables, cases.tokens(1, 5), cache)
    with pytest.raises(ValueError, match="the cache is for 1 sequences; got 2"):
        extend(variables, cases.tokens(2, 3), cache)


def test_the_base_layer_extends_as_it_is_called():
    """``KuramotoAttention`` is in no model: its own cache, cut after two and five tokens."""
    layer = KuramotoAttention(num_heads=3)
    theta = cases.angles(2, 7, 9)
    variables = cases.random_variables(layer, theta)
    full = jax.jit(layer.apply)(variables, theta)
    extend = jax.jit(functools.partial(layer.apply, method="extend"))
    cache, parts = layer.apply(variables, 2, 8, 9, method="empty_cache"), []
    for start, end in ((0, 2), (2, 5), (5, 7)):
        part, cache = extend(variables, theta[:, start:end], cache, jnp.int32(start))
        parts.append(part)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), full, rtol=1e-5, atol=1e-6)


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

    apply = jax.jit(model.apply)
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


@pytest.mark.parametrize("separator", [None, 3])
@pytest.mark.parametrize("name", ["full", "transformer"])
def test_a_long_prompt_is_read_in_pieces(name, separator, monkeypatch):
    """Of twelve tokens, as pieces of five, five and two, or at once.

    The cache holds the tokens of the prompt; what it holds of the padding is of no account.
    """
    model, variables = built(name)
    prompt = cases.tokens(2, 12)

    def prefill(piece):
        monkeypatch.setattr(generation, "PIECE", piece)
        whole = functools.partial(generation._prefill.__wrapped__, model, variables)
        return jax.jit(lambda length: whole(prompt, length, 16, separator))

    in_pieces, at_once = prefill(5), prefill(100)
    for length in (11, 10, 5, 3):
        pieces, whole = in_pieces(length), at_once(length)
        assert int(pieces.cache.position) == int(whole.cache.position) == length
        for one, other in zip(*map(jax.tree.leaves, (pieces[::2], whole[::2])), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
        for one, other in zip(pieces.cache.layers, whole.cache.layers, strict=True):
            rows = (one.key[..., :length], one.value[:, :length])
            for part, same in zip(
                rows, (other.key[..., :length], other.value[:, :length]), strict=True
            ):
                np.testing.assert_allclose(part, same, rtol=1e-5, atol=1e-5)


def test_a_model_whose_logits_are_not_finite_draws_nothing():
    model, variables = built("full")
    diverged = jax.tree.map(lambda leaf: leaf * np.nan, variables)
    settings = {"num_tokens": 3, "key": jax.random.key(0), "context": 8}
    with pytest.raises(generation.NotFiniteError, match="the model has diverged"):
        generate(model, diverged, cases.tokens(1, 3), **settings)
    with pytest.raises(ConfigError, match="separator must be a token from 0 to 10; got 11"):
        generate(model, variables, cases.tokens(1, 3), separator=11, **settings)


def test_a_cache_needs_no_parameters_and_a_number_of_phases_that_fits():
    shifted = Transformer(cases.transformer_config(token_shift="keys"))
    cache = shifted.apply({}, 2, 5, method="empty_cache")
    assert all(layer.state is not None for layer in cache.layers)
    with pytest.raises(ConfigError, match="num_heads must divide the number of phases"):
        FrustratedAttention(num_heads=2).empty_cache(2, 5, 9)


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


def test_token_i_is_drawn_with_the_key_folded_with_i():
    model, variables = built("transformer")
    prompt, key, settings = cases.tokens(2, 3), jax.random.key(5), {"top_k": 4, "top_p": 0.9}
    text = generate(model, variables, prompt, num_tokens=11, key=key, context=32, **settings)
    extend = jax.jit(functools.partial(model.apply, method="extend"))
    cache = model.apply(variables, 2, 32, method="empty_cache")
    logits, cache = extend(variables, prompt, cache)
    for i in range(11):
        one = jax.random.fold_in(key, i)
        token = sample_token(logits[:, -1], one, temperature=1.0, **settings)
        np.testing.assert_array_equal(text[:, i], token)
        logits, cache = extend(variables, token[:, None], cache)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of XLA's program for a CPU")
@pytest.mark.parametrize("name", ["two_layers", "transformer"])
def test_drawing_a_token_copies_no_cache(name):
    """A copy, a slice or another layout of it for each token would be most of the time."""
    model, variables = built(name)
    capacity = 517
    cache = model.apply(variables, 1, capacity, method="empty_cache")
    settings = {"temperature": jnp.float32(1), "top_k": jnp.int32(0), "top_p": jnp.float32(1)}
    parts, tree = jax.tree.flatten((jnp.zeros((1, model.config.vocab_size)), cache))

    def draw(parts):
        logits, cache = tree.unflatten(parts)
        key, drawn = jax.random.key(0), jnp.int32(0)
        read = generation._Read(logits, cache, None)
        return generation._sample_chunk(model, variables, read, key, drawn, settings, None)

    program = jax.jit(draw, donate_argnums=0).lower(parts)
    of_a_head = min(part.size // part.shape[0] for part in jax.tree.leaves(cache.layers))
    large = [
        made[0]
        for made in re.finditer(
            r"%(\S+) = \w+\[([\d,]+)\]\S* ([\w-]+)\(", program.compile().as_text()
        )
        if math.prod(map(int, made[2].split(","))) > of_a_head
        and made[3] not in ("parameter", "get-tuple-element", "bitcast")
    ]
    assert large and all("dynamic-update-slice" in made for made in large), large


@pytest.mark.parametrize("name", ["full", "transformer_shifted"])
def test_a_model_of_documents_sees_its_own_document_alone(name):
    """The document before changes nothing, and what is drawn is drawn from its own document."""
    model, variables = built(name)
    separator, prompt = 3, np.array([[3, 5, 6], [3, 0, 9]])
    before = np.array([[1, 2, 7, 4], [8, 3, 2, 2]])
    draw = functools.partial(
        generate, model, variables, key=jax.random.key(2), context=64, separator=separator
    )
    alone = np.asarray(draw(prompt, num_tokens=40))
    assert (alone == separator).any(axis=1).all()
    np.testing.assert_array_equal(
        draw(np.concatenate([before, prompt], axis=1), num_tokens=40), alone
    )
    greedy = np.asarray(draw(prompt, num_tokens=40, temperature=0.0))
    whole = np.concatenate([prompt, greedy], axis=1)
    ids = jnp.asarray(np.cumsum(whole == separator, axis=1))
    logits = model.apply(variables, jnp.asarray(whole), segment_ids=ids)
    np.testing.assert_array_equal(logits[:, 2:-1].argmax(axis=-1), greedy)


def test_a_prompt_longer_than_the_context_keeps_its_end():
    model, variables = built("full")
    prompt = cases.tokens(2, 20)
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


def kept_by_numpy(logits, top_k, top_p):
    """Return the tokens kept and how far the sums of probability stay from ``top_p``."""
    logits = np.asarray(logits, np.float64)
    order = np.lexsort((np.arange(logits.size), -logits))[: top_k or logits.size]
    probability = np.exp(logits[order] - logits.max())
    mass = np.cumsum(probability / probability.sum())
    count = order.size if top_p == 1 else 1 + np.flatnonzero(np.append(mass[:-1], 2) >= top_p)[0]
    return set(order[:count].tolist()), np.abs(mass - top_p).min()


WIDTH = 7
masks = jax.jit(lambda logits, k, p: likeliest(logits, top_k=k, top_p=p))


@settings(max_examples=300)
@given(
    rows=st.lists(
        st.lists(
            st.one_of(st.integers(-2, 2), st.integers(-2000, 2000).map(lambda n: n / 100)),
            min_size=WIDTH,
            max_size=WIDTH,
        ),
        min_size=2,
        max_size=2,
    ),
    top_k=st.integers(0, WIDTH + 2),
    top_p=st.integers(1, 100).map(lambda n: n / 100),
)
def test_the_tokens_kept_are_those_of_numpy(rows, top_k, top_p):
    """Ties by the lower number; sums that float32 cannot tell from top_p are left out."""
    expected = [kept_by_numpy(row, top_k, top_p) for row in rows]
    assume(top_p == 1 or min(margin for _, margin in expected) > 1e-5)
    kept = np.asarray(masks(jnp.array(rows, jnp.float32), jnp.int32(top_k), jnp.float32(top_p)))
    assert [set(np.flatnonzero(row).tolist()) for row in kept] == [e for e, _ in expected]


def test_other_settings_compile_nothing():
    model, variables = built("full")
    draw = functools.partial(
        generate, model, variables, cases.tokens(2, 3), num_tokens=9, context=64
    )
    draw(key=jax.random.key(0))
    compiled = generation._sample_chunk._cache_size(), generation._prefill._cache_size()
    for options in ({"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.5, "temperature": 2.0}):
        draw(key=jax.random.key(1), **options)
    assert (generation._sample_chunk._cache_size(), generation._prefill._cache_size()) == compiled


def test_texts_of_any_length_share_a_few_programs():
    model, variables = built("full")
    draw = functools.partial(
        generate, model, variables, num_tokens=9, key=jax.random.key(0), context=64
    )
    draw(cases.tokens(2, 3))
    compiled = generation._prefill._cache_size()
    for length in (1, 7, 31, 32):
        draw(cases.tokens(2, length))
    assert generation._prefill._cache_size() == compiled
    for length in (33, 50, 64):
        draw(cases.tokens(2, length))
    assert generation._prefill._cache_size() == compiled + 1


@pytest.mark.parametrize("length", [1, 2, 9])
def test_rows_end_with_a_stop_sequence(length):
    """Against the whole text, searched by hand: ends in different chunks, one across two of them.

    Nine tokens span the border of two chunks whatever their place.
    """
    model, variables = built("full")
    draw = functools.partial(
        generate, model, variables, cases.tokens(2, 3), key=jax.random.key(5), context=64
    )
    whole = np.asarray(draw(num_tokens=40))
    stop = [whole[0, 11 : 11 + length].tolist(), whole[1, 20 : 20 + length].tolist()]
    stopped = np.asarray(draw(num_tokens=40, stop=stop))
    ends = []
    for row, cut in zip(whole, stopped, strict=True):
        found = [end for end in range(length, 41) if row[end - length : end].tolist() in stop]
        ends.append(min(found, default=40))
        np.testing.assert_array_equal(cut[: ends[-1]], row[: ends[-1]])
        assert (cut[ends[-1] :] == NO_TOKEN).all()
    assert stopped.shape == (2, max(ends)) and max(ends) < 40


def test_a_stop_sequence_in_the_prompt_does_not_end_the_text():
    model, variables = built("full")
    prompt = cases.tokens(2, 3)
    draw = functools.partial(generate, model, variables, key=jax.random.key(5), context=64)
    text = np.asarray(draw(prompt, num_tokens=4))
    across = [int(prompt[0, -1]), int(text[0, 0])]
    assert across not in [row[i : i + 2].tolist() for row in text for i in range(3)]
    np.testing.assert_array_equal(draw(prompt, num_tokens=4, stop=[across]), text)


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
        ("prompt", jnp.full((1, 2), 11)),
        ("prompt", jnp.full((1, 2), -1)),
        ("prompt", jnp.zeros((0, 2), jnp.int32)),
        ("prompt", [1, 2]),
        ("prompt", [[0.5, 1.0]]),
        ("prompt", [[1, 2], [3]]),
        ("stop", [[1], []]),
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
        stream(model, variables, **arguments)  # before anything is asked of it
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["hot", None, True, [1.0]])
def test_refuses_what_is_no_number(value):
    """Past the run-time type checks of the tests, which a user has not."""
    with pytest.raises(ConfigError, match="^temperature must be a number; got ") as caught:
        generation._check_real(top_p=np.float32(0.5), temperature=value)
    assert repr(value) in str(caught.value)
    generation._check_real(temperature=1, top_p=jnp.float32(0.9))


@pytest.mark.parametrize("dtype", ["uint8", "uint64"])
def test_a_prompt_of_any_integers_gives_the_same_text(dtype):
    """Also when it is read again because the context is full."""
    model, variables = built("two_layers")
    texts = [
        generate(model, variables, prompt, num_tokens=12, key=jax.random.key(0), context=4, stop=())
        for prompt in (np.array([[1, 2]], "int32"), np.array([[1, 2]], dtype))
    ]
    np.testing.assert_array_equal(*texts)


@pytest.mark.parametrize("stop", [[3], [[[1, 2]]]])
def test_refuses_stops_that_are_no_sequences_of_tokens(stop):
    """Past the run-time type checks too."""
    with pytest.raises(ConfigError, match="stop must hold sequences of one token or more"):
        generation._Ending(stop, 1)
