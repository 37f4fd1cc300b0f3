"""Cached sampling from either model.

The cache holds, for each layer, keys and values of the tokens seen; for an FSN the values are the
powers of their phasors. Logits are those of the full forward pass.

For a model and a batch one program is compiled that draws ``CHUNK`` tokens, and one for each length
of a prompt, rounded up to a power of two, that reads it. Temperature, top-k and top-p are their
inputs, so that other settings compile nothing.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jaxtyping import Array, Bool, Float, Int

from fsn_jax.cache import Cache
from fsn_jax.documents import document_ids
from fsn_jax.fields import ConfigError
from fsn_jax.fsn import FSN
from fsn_jax.transformer import Transformer

Variables = Mapping[str, Any]
StopTokens = Sequence[int] | Int[np.ndarray, " _"]

CHUNK = 8
"""Tokens drawn in one compiled call: few enough to stream, many enough to be quick."""

SHORTEST_PROMPT = 32
"""Least padded length of a prompt. Lengths are powers of two, so few programs are compiled."""

PIECE = 256
"""Tokens of a long prompt that are read at once."""

NO_TOKEN = -1
"""Fills a row that has ended while other rows of its batch have not."""


def padded_length(length: int) -> int:
    """Returns the least power of two, from ``SHORTEST_PROMPT`` on, that holds so many tokens."""
    return max(SHORTEST_PROMPT, 1 << (length - 1).bit_length())


def likeliest(
    logits: Float[Array, "B V"],
    *,
    top_k: int | Int[Array, ""],
    top_p: float | Float[Array, ""],
) -> Bool[Array, "B V"]:
    """Returns a mask of the tokens that top-k and top-p keep; ties keep the first.

    Args:
      logits: of a row's next token.
      top_k: how many of the likeliest tokens to draw from; 0 means all.
      top_p: of what ``top_k`` leaves, the least probability that the tokens drawn from must hold
        together; the one that carries the sum past it is still in. 1 means all.
    """
    order = jnp.argsort(logits, axis=-1, descending=True, stable=True)
    descending = jnp.take_along_axis(logits, order, axis=-1)
    rank = jnp.arange(logits.shape[-1])[None]
    within = (rank < top_k) | (top_k == 0)
    probability = jax.nn.softmax(jnp.where(within, descending, -jnp.inf), axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    within &= (before < top_p) | (top_p == 1) | (rank == 0)
    # Both conditions hold for the first so many ranks: those of the tokens kept.
    count = within.sum(axis=-1, keepdims=True)
    rows = jnp.arange(logits.shape[0])[:, None]
    return jnp.zeros(logits.shape, bool).at[rows, order].set(rank < count)


def sample_token(
    logits: Float[Array, "B V"],
    key: Array,
    *,
    temperature: float | Float[Array, ""],
    top_k: int | Int[Array, ""],
    top_p: float | Float[Array, ""],
) -> Int[Array, " B"]:
    """Draws one token for each row of logits.

    Args:
      logits: float32.
      key: PRNG key.
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: see ``likeliest``.
      top_p: see ``likeliest``.
    """
    noise = jax.random.gumbel(key, logits.shape)
    return _likeliest_of_noisy(logits, noise, temperature=temperature, top_k=top_k, top_p=top_p)


def _likeliest_of_noisy(
    logits: Array,
    noise: Array,
    *,
    temperature: float | Array,
    top_k: int | Array,
    top_p: float | Array,
) -> Array:
    """Computes ``sample_token`` from given Gumbel noise."""
    greedy = jnp.equal(temperature, 0)
    scaled = logits / jnp.where(greedy, 1.0, temperature)

    def restricted(scaled: Array) -> Array:
        return jnp.where(likeliest(scaled, top_k=top_k, top_p=top_p), scaled, -jnp.inf)

    # ``restricted`` sorts, which costs about half a layer: skip it where nothing is cut.
    all_may_be_drawn = jnp.equal(top_k, 0) & jnp.equal(top_p, 1)
    kept = jax.lax.cond(all_may_be_drawn, lambda scaled: scaled, restricted, scaled)
    return jnp.where(greedy, logits.argmax(axis=-1), (kept + noise).argmax(axis=-1))


class NotFiniteError(ArithmeticError):
    """The logits of a model are infinite or NaN, so nothing can be drawn from them."""


class _Read(NamedTuple):
    """What a model has read: logits ``[B, V]``, cache, and ids ``[B]`` of the last document."""

    logits: Array
    cache: Cache
    document: Array | None


class _Seen(NamedTuple):
    """What of a prompt is read: the state of its last token, ``[B, 1, D]``, and the cache."""

    state: Array | None
    cache: Any


@functools.partial(jax.jit, static_argnames=("model", "capacity", "separator"))
def _prefill(
    model: nn.Module,
    variables: Variables,
    prompt: Array,
    length: Array,
    capacity: int,
    separator: int | None,
) -> _Read:
    """Reads the first ``length`` tokens of a padded prompt.

    What the cache holds of the padding is masked until it is written over. The prompt is read in
    pieces, since the weights of a piece over the whole cache are held at once; pieces of padding
    alone are left out.
    """
    segments = separator is not None
    cache: Any = model.apply(
        variables, prompt.shape[0], capacity, segments=segments, method="empty_cache"
    )
    ids = None if separator is None else document_ids(prompt, separator)

    def read(seen: _Seen, start: Array | int, size: int) -> _Seen:
        """Reads the tokens from ``start`` on; keeps the state of the last, if it is among them."""
        tokens, piece_ids = (
            None if x is None else jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)
            for x in (prompt, ids)
        )
        states, cache = model.apply(
            variables, tokens, seen.cache, segment_ids=piece_ids, method="extend_states"
        )
        index = jnp.clip(length - 1 - start, 0, size - 1)
        return _Seen(jax.lax.dynamic_slice_in_dim(states, index, 1, axis=1), cache)

    whole, size = divmod(prompt.shape[1], PIECE)
    like = jax.eval_shape(lambda cache: read(_Seen(None, cache), 0, 1).state, cache)
    seen = _Seen(jnp.zeros(like.shape, like.dtype), cache)
    if whole:
        needed = jnp.minimum(whole, (length + PIECE - 1) // PIECE)
        seen = jax.lax.fori_loop(0, needed, lambda i, seen: read(seen, i * PIECE, PIECE), seen)
    if size:
        start = whole * PIECE
        seen = jax.lax.cond(length > start, lambda seen: read(seen, start, size), lambda x: x, seen)
    logits: Any = model.apply(variables, seen.state, method="read_out")
    document = None if ids is None else jax.lax.dynamic_index_in_dim(ids, length - 1, 1, False)
    return _Read(logits[:, 0], seen.cache.replace(position=length), document)


@functools.partial(jax.jit, static_argnames=("model", "separator"), donate_argnames=("read",))
def _sample_chunk(
    model: nn.Module,
    variables: Variables,
    read: _Read,
    key: Array,
    drawn: Array,
    settings: dict[str, Array],
    separator: int | None,
) -> tuple[Array, _Read]:
    def body(read: _Read, noise: Array) -> tuple[_Read, Array]:
        token = _likeliest_of_noisy(read.logits, noise, **settings)
        document = None if read.document is None else read.document + (token == separator)
        ids = None if document is None else document[:, None]
        extended: Any = model.apply(
            variables, token[:, None], read.cache, segment_ids=ids, method="extend"
        )
        return _Read(extended[0][:, 0], extended[1], document), token

    # The noise of a whole chunk at once: a call of the generator costs more than its bits.
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(drawn + jnp.arange(CHUNK))
    noise = jax.vmap(lambda key: jax.random.gumbel(key, read.logits.shape))(keys)
    read, tokens = jax.lax.scan(body, read, noise)
    return tokens.T, read


def stream(
    model: FSN | Transformer,
    variables: Variables,
    prompt: npt.ArrayLike,
    *,
    num_tokens: int,
    key: Array,
    context: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop: Sequence[StopTokens] = (),
    separator: int | None = None,
) -> Iterator[Int[Array, "B n"]]:
    """Yields the tokens that follow ``prompt``, a few at a time.

    When ``context`` tokens are reached, or the prompt is longer, the model goes on from the last
    half of a context: neither model was trained to look further back.

    Args:
      model: an ``FSN`` or a ``Transformer``.
      variables: its variables, ``{"params": ...}``.
      prompt: token ids ``[B, S]``, as an array or lists of numbers; at least one a row.
      num_tokens: how many to draw.
      key: PRNG key; token i is drawn with ``fold_in(key, i)``.
      context: how far the model may look back.
      temperature: see ``sample_token``.
      top_k: see ``likeliest``.
      top_p: see ``likeliest``.
      stop: a row ends with the first of these sequences of tokens that it draws, and is filled up
        with ``NO_TOKEN``; nothing more is drawn when all rows have ended.
      separator: the token that begins a document, for a model that was trained to see its own
        document alone (see ``document_ids``); None for others.

    Raises:
      ConfigError: an argument is out of range, before anything is drawn.
      NotFiniteError: the logits are not finite, when the first token is drawn.
    """
    text = _checked_prompt(prompt, model.config.vocab_size)
    _check_whole(context=context)
    if context < 2:
        raise ConfigError(f"context must be at least 2; got {context}")
    check_sampling(num_tokens=num_tokens, temperature=temperature, top_k=top_k, top_p=top_p)
    settings = {
        "temperature": jnp.float32(temperature),
        "top_k": jnp.int32(top_k),
        "top_p": jnp.float32(top_p),
    }
    if separator is not None and not 0 <= separator < model.config.vocab_size:
        raise ConfigError(
            f"separator must be a token from 0 to {model.config.vocab_size - 1}; got {separator}"
        )
    ending = _Ending(stop, text.shape[0]) if len(stop) else None
    return _drawn(model, variables, text, num_tokens, key, context, settings, ending, separator)


def _checked_prompt(prompt: npt.ArrayLike, vocab_size: int) -> npt.NDArray[Any]:
    """Returns the prompt ``[B, S]``; raises ConfigError if it is none."""
    try:
        text = np.asarray(prompt)
    except ValueError:
        raise ConfigError("prompt must be [B, S], rows of one length; got several") from None
    if text.ndim != 2 or not np.issubdtype(text.dtype, np.integer):
        raise ConfigError(
            f"prompt must be whole numbers [B, S], one row a text; got {text.dtype} of shape "
            f"{text.shape}"
        )
    if not text.size:
        raise ConfigError(
            f"prompt must have a row, and hold at least one token a row; got shape {text.shape}"
        )
    if not 0 <= text.min() <= text.max() < vocab_size:
        raise ConfigError(
            f"prompt must hold tokens from 0 to {vocab_size - 1}, the model's vocabulary; got "
            f"{text.min()} to {text.max()}"
        )
    return text.astype(np.int32)


def _drawn(
    model: nn.Module,
    variables: Variables,
    prompt: npt.NDArray[Any],
    num_tokens: int,
    key: Array,
    context: int,
    settings: dict[str, Array],
    ending: "_Ending | None",
    separator: int | None,
) -> Iterator[Array]:
    text: list[Any] = [prompt]
    drawn = 0
    while drawn < num_tokens:
        window = np.concatenate(text, axis=1)
        if window.shape[1] >= context:
            window = window[:, -(context // 2) :]
        text, length = [window], window.shape[1]
        padded = min(context, padded_length(length))
        window = np.pad(window, ((0, 0), (0, padded - length)))
        read = _prefill(model, variables, window, jnp.int32(length), context, separator)
        if not jnp.isfinite(read.logits).all():
            raise NotFiniteError("the logits are not finite: the model has diverged")
        while drawn < num_tokens and length < context:
            tokens, read = _sample_chunk(
                model, variables, read, key, jnp.int32(drawn), settings, separator
            )
            # What a chunk drew past the cache's end or the caller's wish is dropped.
            tokens = tokens[:, : min(CHUNK, num_tokens - drawn, context - length)]
            text.append(tokens)
            length += tokens.shape[1]
            drawn += tokens.shape[1]
            if ending is None:
                yield tokens
                continue
            yield jnp.asarray(ending.cut(np.asarray(tokens)))
            if ending.rows.all():
                return


class _Ending:
    """Finds the ends of rows that are drawn chunk by chunk."""

    def __init__(self, stop: Sequence[Any], batch: int) -> None:
        self._stop = [np.asarray(sequence) for sequence in stop]
        if any(sequence.ndim != 1 or not sequence.size for sequence in self._stop):
            raise ConfigError("stop must hold sequences of one token or more")
        longest = max(map(len, self._stop))
        self._tail = np.full((batch, longest - 1), NO_TOKEN)
        self.rows = np.zeros(batch, bool)

    def cut(self, tokens: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Returns the rows up to their ends, filled up to the longest with NO_TOKEN."""
        width = tokens.shape[1]
        seen = np.concatenate([self._tail, tokens], axis=1)
        ends = np.zeros(tokens.shape, bool)
        for sequence in self._stop:
            runs = np.lib.stride_tricks.sliding_window_view(seen, len(sequence), axis=1)
            ends |= (runs[:, -width:] == sequence).all(axis=-1)
        over = self.rows[:, None] | (np.cumsum(ends, axis=1) - ends > 0)
        self._tail = seen[:, width:]
        self.rows = self.rows | ends.any(axis=1)
        return np.where(over, NO_TOKEN, tokens)[:, : (~over).sum(axis=1).max()]


def generate(
    model: FSN | Transformer, variables: Variables, prompt: npt.ArrayLike, **settings: Any
) -> Int[Array, "B n"]:
    """Returns the tokens that follow ``prompt``; settings and errors as for ``stream``.

    Returns:
      ``num_tokens`` a row; with ``stop`` as many as the longest row has.
    """
    return jnp.concatenate(list(stream(model, variables, prompt, **settings)), axis=1)


def check_sampling(*, num_tokens: int, temperature: float, top_k: int, top_p: float) -> None:
    """Raises ConfigError if an argument of ``stream`` is of the wrong type or out of range."""
    _check_whole(num_tokens=num_tokens, top_k=top_k)
    _check_real(temperature=temperature, top_p=top_p)
    if top_k >= 2**31:
        raise ConfigError(f"top_k must be below 2**31; got {top_k}")
    if num_tokens < 1:
        raise ConfigError(f"num_tokens must be at least 1; got {num_tokens}")
    if not 0 <= temperature < float("inf"):
        raise ConfigError(f"temperature must be finite and not negative; got {temperature}")
    if top_k < 0:
        raise ConfigError(f"top_k must not be negative; got {top_k}")
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p must be above 0 and at most 1; got {top_p}")


def _check_whole(**numbers: object) -> None:
    for name, value in numbers.items():
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
            raise ConfigError(f"{name} must be a whole number; got {value!r}")


def _check_real(**numbers: Any) -> None:
    for name, value in numbers.items():
        number = np.asarray(value)
        if number.ndim or number.dtype.kind not in "fiu":
            raise ConfigError(f"{name} must be a number; got {value!r}")
