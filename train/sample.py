"""``python -m train sample RUN``: writes text from a trained model as it is sampled."""

import argparse
import codecs
import itertools
import os
import sys
from collections.abc import Iterable, Sequence
from typing import TextIO

from fsn_jax import hub
from fsn_jax.generate import NotFiniteError
from fsn_jax.vocabulary import SEPARATOR, TextError
from train.bucket import is_remote
from train.errors import UserError
from train.files import user_path
from train.interruption import interruptions
from train.load import load_without_data
from train.program import Arguments, start_jax
from train.standalone_sample import PROMPT, add_options, check_options

# What would move a terminal's cursor or change its colours becomes the mark of an unknown
# character; line ends and tabs stay, and of the two bytes of a line end the second is enough.
_CONTROLS: dict[int, str | None] = dict.fromkeys((*range(32), *range(127, 160)), "\ufffd")
_CONTROLS |= {ord("\n"): "\n", ord("\t"): "\t", ord("\r"): None}


def write_as_it_comes(chunks: Iterable[bytes], out: TextIO) -> None:
    """Writes each chunk at once: bytes to a file or a pipe, text to a terminal.

    On a terminal, a character whose bytes are in two chunks waits for the second, and invalid UTF-8
    becomes the replacement character. Ctrl-C ends the text, and so does a reader that closes the
    output (``| head``).
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
        # Otherwise the interpreter flushes the rest at its end and reports the error again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())


def parser() -> Arguments:
    """Returns the parser of the command line."""
    p = Arguments(prog="python -m train sample", description=__doc__)
    p.add_argument("run", help="the folder of a run, or of an exported model")
    add_options(p)
    p.set_defaults(prompt=None)  # with --document it is another
    p.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end after this text; may be given again; $'\\n' is the end of a line",
    )
    p.add_argument(
        "--document",
        action="store_true",
        help="write one document, from the prompt (empty if it is not given) to its end or "
        "--num_tokens; for a model trained with data.segments=documents",
    )
    p.add_checkpoint_options("best")
    return p


def program(argv: Sequence[str]) -> None:
    """Runs the program with the arguments of its command line."""
    options = parser().parse_args(argv[1:])
    if options.prompt is None:
        options.prompt = "" if options.document else PROMPT
    try:
        check_options(options, may_be_empty=options.document)
    except ValueError as error:
        raise UserError(str(error)) from None
    if "" in options.stop:
        raise UserError("--stop must not be empty: name the text that ends the sample")
    start_jax()
    trained = _load(options)
    if options.document and trained.separator is None:
        raise UserError(
            f"--document is for a model trained with config.data.segments=documents, and "
            f"{options.run} was not; leave it out"
        )
    prompt, *stop = map(os.fsencode, (options.prompt, *options.stop))
    for option, text in (("--prompt", prompt), *(("--stop", text) for text in stop)):
        try:
            trained.encode(text)
        except TextError as error:
            raise UserError(f"{option}: {error}") from None
    if options.document:
        prompt, stop = SEPARATOR + prompt, [*stop, SEPARATOR]
    context = trained.context
    length = len(trained.encode(prompt))
    if length >= context:
        print(
            f"note: the prompt has {length} {trained.vocabulary.unit}; the model sees the last "
            f"{context // 2} (context {context})",
            file=sys.stderr,
        )
    chunks = trained.stream(
        prompt,
        num_tokens=options.num_tokens,
        seed=options.seed,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        stop=stop,
    )
    written: Iterable[bytes] = itertools.chain((prompt,), chunks)
    if options.document:
        written = (chunk.replace(SEPARATOR, b"") for chunk in written)
    try:
        write_as_it_comes(written, sys.stdout)
    except NotFiniteError as error:
        raise UserError(f"{options.run}: {error}; sample another checkpoint") from error
    if interruptions.came:  # the text is ended, and the status tells by what
        raise KeyboardInterrupt


def _load(options: argparse.Namespace) -> hub.Pretrained:
    """Loads the model of a run, or an exported one."""
    if is_remote(options.run) or not hub.is_exported(user_path("the run", options.run)):
        return load_without_data(
            options.run, which=options.checkpoint, data_path=options.data_path
        ).language_model
    if options.checkpoint != "best" or options.data_path:
        option = "--data_path" if options.checkpoint == "best" else "--checkpoint"
        raise UserError(
            f"{option} is for a run, and {options.run} is an exported model, which is one "
            f"checkpoint without data; leave it out"
        )
    try:
        return hub.load(options.run)
    except ValueError as error:
        raise UserError(str(error)) from error
