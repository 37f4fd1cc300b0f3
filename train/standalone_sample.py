"""Text from an exported model: ``python sample.py --prompt 'The '``, in the model's folder.

Needs jax, numpy and flatbuffers alone: ``sampler.jax_export`` is the model with its parameters, as
StableHLO. ``python -m train sample`` takes its options and their checks from here.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

PROMPT = "The "


def add_options(p: argparse.ArgumentParser) -> None:
    """Adds the options of sampling to a command line."""
    p.add_argument("--prompt", default=PROMPT, help="what the text begins with")
    p.add_argument(
        "--num_tokens",
        type=int,
        default=400,
        help="characters to draw; beyond its context the model sees the last half of it",
    )
    p.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest")
    p.add_argument("--top_k", type=int, default=0, help="draw from the k likeliest; 0: all")
    p.add_argument("--top_p", type=float, default=1.0, help="draw from the likeliest p; 1: all")
    p.add_argument("--seed", type=int, default=0, help="same seed, same text")


def check_options(options: argparse.Namespace, *, may_be_empty: bool = False) -> None:
    """Raises ValueError, in one line, if an option is out of range."""
    if not (options.prompt or may_be_empty):
        raise ValueError("--prompt must not be empty: the first character needs one before it")
    if options.num_tokens < 1:
        raise ValueError(f"--num_tokens must be at least 1; got {options.num_tokens}")
    for name in ("seed", "top_k"):
        value = getattr(options, name)
        if not 0 <= value < 2**31:
            raise ValueError(f"--{name} must be from 0 to 2**31 - 1; got {value}")
    if not 0 <= options.temperature < math.inf:
        raise ValueError(
            f"--temperature must be finite and not negative; got {options.temperature}"
        )
    if not 0 < options.top_p <= 1:
        raise ValueError(f"--top_p must be above 0 and at most 1; got {options.top_p}")


def main() -> None:
    """Runs the command line."""
    p = argparse.ArgumentParser(description="Text from the exported model in this folder.")
    add_options(p)
    options = p.parse_args()
    try:
        check_options(options)
        for text in _texts(options, Path(__file__).resolve().parent):
            sys.stdout.buffer.write(text)
            sys.stdout.buffer.flush()
    except BrokenPipeError:  # the reader has gone; Python would flush the rest at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        sys.stdout = None  # not to be flushed again
        reason: object = error
        if isinstance(error, OSError):
            reason = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        print(f"error: {reason}", file=sys.stderr)
        sys.exit(2)


def _texts(options: argparse.Namespace, folder: Path) -> Iterator[bytes]:
    """Yields the prompt, then what follows it, a window at a time."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    context, vocabulary = config["context"], config["vocabulary"]
    prompt, values = _split(options.prompt, vocabulary)
    if unknown := set(prompt) - set(values):
        first = min(unknown)
        shown = first if vocabulary["unit"] == "bytes" else first.decode()
        raise ValueError(f"--prompt: the model has no token for {shown!r}")
    import jax.export  # the checks above need none of it

    sampler = jax.export.deserialize(bytearray((folder / "sampler.jax_export").read_bytes()))
    window = [values.index(value) for value in prompt]
    yield b"".join(prompt)
    drawn = 0
    while drawn < options.num_tokens:
        if len(window) >= context:
            window = window[-(context // 2) :]
        padded = np.zeros(context, np.int32)
        padded[: len(window)] = window
        out = sampler.call(
            padded,
            np.int32(len(window)),
            np.uint32(options.seed),
            np.int32(drawn),
            np.float32(options.temperature),
            np.int32(options.top_k),
            np.float32(options.top_p),
        )
        new = np.asarray(out)[len(window) :][: options.num_tokens - drawn].tolist()
        window += new
        drawn += len(new)
        yield b"".join(values[token] for token in new)
    yield b"\n"


def _split(prompt: str, vocabulary: dict[str, Any]) -> tuple[list[bytes], list[bytes]]:
    """Returns the bytes or characters of the prompt and of the vocabulary, in UTF-8."""
    data = os.fsencode(prompt)
    if vocabulary["unit"] == "bytes":
        values = bytes.fromhex(vocabulary["values"])
        return [bytes([value]) for value in data], [bytes([value]) for value in values]
    try:
        characters = data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompt: the text is not UTF-8 at byte {error.start}") from None
    return [c.encode() for c in characters], [c.encode() for c in vocabulary["values"]]


if __name__ == "__main__":
    main()
