"""``python -m train.sample RUN``: text from a trained model, printed as it is drawn."""

import itertools
import os
import sys
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp

from fsn_jax.config import ConfigError
from fsn_jax.generate import check_sampling, stream
from train.errors import UserError
from train.load import TrainedModel, load
from train.program import Arguments, run_program, start_jax


def sample_bytes(
    trained: TrainedModel,
    *,
    prompt: bytes,
    num_tokens: int,
    seed: int,
    temperature: float,
    top_k: int,
    top_p: float,
) -> Iterator[bytes]:
    """Yields the bytes that follow ``prompt``, a few at a time.

    Raises:
      UserError: the prompt is empty or has a byte that the corpus has not.
    """
    if not prompt:
        raise UserError("--prompt must not be empty: the first character needs one before it")
    tokens = jnp.asarray(trained.corpus.encode(prompt))[None]
    for chunk in stream(
        trained.model,
        {"params": trained.params},
        tokens,
        num_tokens=num_tokens,
        key=jax.random.key(seed),
        context=trained.experiment.data.context,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    ):
        yield trained.corpus.decode(jax.device_get(chunk[0]))


def parser() -> Arguments:
    """The command line."""
    p = Arguments(prog="python -m train.sample", description=__doc__)
    p.add_argument("run", help="a run's folder, for instance runs/quickstart")
    p.add_argument("--prompt", default="The ", help="what the text begins with")
    p.add_argument("--num_tokens", type=int, default=400, help="characters to draw")
    p.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest")
    p.add_argument("--top_k", type=int, default=0, help="draw from the k likeliest; 0: all")
    p.add_argument("--top_p", type=float, default=1.0, help="draw from the likeliest p; 1: all")
    p.add_argument("--seed", type=int, default=0, help="same seed, same text")
    p.add_argument("--checkpoint", default="best", help="best, latest or a step")
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
    start_jax()
    trained = load(options.run, which=options.checkpoint)
    prompt = os.fsencode(options.prompt)
    try:
        trained.corpus.encode(prompt)
    except UserError as error:
        raise UserError(f"--prompt: {error}") from None
    context = trained.experiment.data.context
    if len(prompt) >= context:
        print(
            f"note: the prompt has {len(prompt)} characters; the model sees the last "
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
    )
    out = sys.stdout.buffer
    first = next(chunks)  # a prompt that cannot be read is refused before anything is printed
    for part in itertools.chain((prompt, first), chunks):
        out.write(part)
        out.flush()
    out.write(b"\n")


def main() -> None:
    """The command line."""
    sys.exit(run_program(program, sys.argv))


if __name__ == "__main__":
    main()
