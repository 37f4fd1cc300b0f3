"""``python -m train sample RUN``: text from a trained model, printed as it is drawn."""

import codecs
import itertools
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TextIO

import jax
import jax.numpy as jnp

from fsn_jax.config import ConfigError
from fsn_jax.generate import check_sampling, stream
from train.errors import UserError
from train.hub import is_exported, read_model
from train.load import LanguageModel, load
from train.program import Arguments, start_jax


def sample_bytes(
    trained: LanguageModel,
    *,
    prompt: bytes,
    num_tokens: int,
    seed: int,
    temperature: float,
    top_k: int,
    top_p: float,
    stop: Sequence[bytes] = (),
) -> Iterator[bytes]:
    """Yields the bytes that follow ``prompt``, a few at a time, up to the first of ``stop``.

    Raises:
      UserError: the prompt or ``stop`` has a byte that the corpus has not.
    """
    tokens = jnp.asarray(trained.encode(prompt))[None]
    for chunk in stream(
        trained.model,
        {"params": trained.params},
        tokens,
        num_tokens=num_tokens,
        key=jax.random.key(seed),
        context=trained.context,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop=[trained.encode(text).tolist() for text in stop],
    ):
        yield trained.vocabulary.decode(jax.device_get(chunk[0]))


# What would move a terminal's cursor or change its colours becomes the mark of an unknown
# character; line ends and tabs stay, and of the two bytes of a line end the second is enough.
_CONTROLS: dict[int, str | None] = dict.fromkeys((*range(32), *range(127, 160)), "\ufffd")
_CONTROLS |= {ord("\n"): "\n", ord("\t"): "\t", ord("\r"): None}


def write_as_it_comes(chunks: Iterable[bytes], out: TextIO) -> None:
    """Writes each chunk at once: the very bytes to a file or a pipe, readable text to a terminal.

    There a character whose bytes are in two chunks waits for the second, and bytes that are no
    UTF-8 become the mark of an unknown character. An interruption ends the text; so does a reader
    that goes away (``| head``).
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def shown(chunk: bytes, *, final: bool = False) -> bytes:
        if not out.isatty():
            return chunk
        text = decoder.decode(chunk, final).translate(_CONTROLS)
        return text.encode(out.encoding, "replace")

    try:
        try:
            for chunk in chunks:
                out.buffer.write(shown(chunk))
                out.buffer.flush()
        except KeyboardInterrupt:
            pass
        out.buffer.write(shown(b"", final=True) + b"\n")
        out.buffer.flush()
    except BrokenPipeError:
        # Or the interpreter would try to write what is left, and complain, when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())


def parser() -> Arguments:
    """The command line."""
    p = Arguments(prog="python -m train sample", description=__doc__)
    p.add_argument("run", help="the folder of a run, or of an exported model")
    p.add_argument("--prompt", default="The ", help="what the text begins with")
    p.add_argument(
        "--num_tokens",
        type=int,
        default=400,
        help="characters to draw; beyond its context the model sees the last half of it",
    )
    p.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest")
    p.add_argument("--top_k", type=int, default=0, help="draw from the k likeliest; 0: all")
    p.add_argument("--top_p", type=float, default=1.0, help="draw from the likeliest p; 1: all")
    p.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end after this text; may be given again; $'\\n' is the end of a line",
    )
    p.add_argument("--seed", type=int, default=0, help="same seed, same text")
    p.add_argument("--checkpoint", default="best", help="of a run: best, latest or a step")
    return p


def program(argv: Sequence[str]) -> None:
    """Parses and calls."""
    options = parser().parse_args(argv[1:])
    if not 0 <= options.seed < 2**31:
        raise UserError(f"--seed must be from 0 to 2**31 - 1; got {options.seed}")
    try:
        check_sampling(
            num_tokens=options.num_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
        )
    except ConfigError as error:
        raise UserError(f"--{error}") from None
    if not options.prompt:
        raise UserError("--prompt must not be empty: the first character needs one before it")
    if "" in options.stop:
        raise UserError("--stop must not be empty: name the text that ends the sample")
    start_jax()
    if is_exported(options.run):
        trained = read_model(options.run)
    else:
        trained = load(options.run, which=options.checkpoint).language_model
    prompt, *stop = map(os.fsencode, (options.prompt, *options.stop))
    for option, text in (("--prompt", prompt), *(("--stop", text) for text in stop)):
        try:
            trained.encode(text)
        except UserError as error:
            raise UserError(f"{option}: {error}") from None
    context = trained.context
    length = len(trained.encode(prompt))
    if length >= context:
        print(
            f"note: the prompt has {length} {trained.vocabulary.unit}; the model sees the last "
            f"{context // 2} (context {context})",
            file=sys.stderr,
        )
    chunks = sample_bytes(
        trained,
        prompt=prompt,
        num_tokens=options.num_tokens,
        seed=options.seed,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        stop=stop,
    )
    write_as_it_comes(itertools.chain((prompt,), chunks), sys.stdout)
