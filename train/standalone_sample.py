"""Samples text from an exported model: ``python sample.py --prompt 'The '`` in its folder.

It needs only jax, numpy and flatbuffers: ``sampler.jax_export`` is the model with its parameters as
StableHLO.
"""

import argparse
import json
import sys
from pathlib import Path

import jax.export
import numpy as np


def main() -> None:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--prompt", default="The ")
    p.add_argument("--num_tokens", type=int, default=400)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest")
    p.add_argument("--top_k", type=int, default=0, help="0: all")
    p.add_argument("--top_p", type=float, default=1.0, help="1: all")
    options = p.parse_args()

    here = Path(__file__).resolve().parent
    config = json.loads((here / "config.json").read_text())
    sampler = jax.export.deserialize(bytearray((here / "sampler.jax_export").read_bytes()))
    context, vocabulary = config["context"], config["vocabulary"]
    if vocabulary["unit"] == "bytes":
        values = [bytes([value]) for value in bytes.fromhex(vocabulary["values"])]
        prompt = [bytes([value]) for value in options.prompt.encode()]
    else:
        values = [character.encode() for character in vocabulary["values"]]
        prompt = [character.encode() for character in options.prompt]
    if not prompt or not set(prompt) <= set(values):
        sys.exit("the prompt is empty, or holds what the model has no token for")

    window = [values.index(value) for value in prompt]
    sys.stdout.buffer.write(b"".join(prompt))
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
        sys.stdout.buffer.write(b"".join(values[token] for token in new))
        sys.stdout.buffer.flush()
    sys.stdout.buffer.write(b"\n")


if __name__ == "__main__":
    main()
