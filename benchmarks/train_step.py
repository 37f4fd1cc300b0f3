"""Time of the train step: FSN by definition, FSN fused, transformer, in turn in one process.

    python -m benchmarks.train_step --config=configs/enwik8.py --context=256 --batch_size=32

Each round times every contender once, so that a machine that slows down slows all of them; the
ratios are medians over rounds of the ratio within a round. Compile time is that of the first call
with the persistent cache off; temporary memory is the compiler's own figure.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from fsn_jax.config import Implementation
from train.config import ExperimentConfig
from train.main import load_config
from train.optimizer import make_optimizer
from train.program import Arguments, run_program
from train.run import device_description
from train.step import build_model, data_mesh, init_state, make_train_steps

CORPUS_BYTES = 1_000_000


@dataclasses.dataclass
class Contender:
    """A compiled train step and its times.

    Attributes:
      name: of the row.
      dispatch: runs ``steps`` steps and waits for them.
      compile_seconds: of the first call.
      temporary_bytes: scratch memory of the compiled program.
      flops: of a step, by the model's own count.
      params: of the model.
      seconds: per step, one a round.
    """

    name: str
    dispatch: Callable[[], None]
    compile_seconds: float
    temporary_bytes: int
    flops: float
    params: int
    seconds: list[float] = dataclasses.field(default_factory=list)


def contender(
    name: str, experiment: ExperimentConfig, *, implementation: Implementation, steps: int
) -> Contender:
    """Compiles the train step of an experiment with random text."""
    model_config = dataclasses.replace(experiment.model, implementation=implementation)
    model, mesh = build_model(model_config), data_mesh()
    optimizer = make_optimizer(experiment.optimizer, experiment.training.num_steps)
    context, batch_size = experiment.data.context, experiment.training.batch_size
    train_steps = make_train_steps(
        model, optimizer, mesh=mesh, context=context, placement="resident", log_every=steps
    )
    rng = np.random.default_rng(0)
    corpus = jnp.asarray(rng.integers(0, model_config.vocab_size, CORPUS_BYTES, np.uint8))
    last = CORPUS_BYTES - context - 1
    starts = jnp.asarray(rng.integers(0, last, (steps, batch_size), np.int32))
    state = init_state(model, optimizer, seed=0, mesh=mesh)
    began = time.perf_counter()
    compiled = train_steps.lower(state, corpus, starts).compile()
    seconds = time.perf_counter() - began

    def dispatch() -> None:
        nonlocal state
        state, tally = compiled(state, corpus, starts)
        jax.block_until_ready(tally)

    dispatch()
    memory = compiled.memory_analysis()
    return Contender(
        name=name,
        dispatch=dispatch,
        compile_seconds=seconds,
        temporary_bytes=memory.temp_size_in_bytes if memory else 0,
        flops=model_config.flops_per_token(context) * context * batch_size,
        params=model_config.num_params(),
    )


def measure(contenders: Sequence[Contender], *, rounds: int, steps: int) -> None:
    """Times each contender once a round."""
    for _ in range(rounds):
        for c in contenders:
            began = time.perf_counter()
            c.dispatch()
            c.seconds.append((time.perf_counter() - began) / steps)


def table(contenders: Sequence[Contender], *, characters: int) -> str:
    """The rows; ratios are to the last contender."""
    base = contenders[-1]
    lines = [
        f"{'':18} {'params':>9} {'ms/step':>16} {'k char/s':>9} {'GFLOP/s':>8} {'time ratio':>10} "
        f"{'FLOP ratio':>10} {'compile s':>9} {'temp MB':>8}"
    ]
    for c in contenders:
        middle = float(np.median(c.seconds))
        low, high = np.quantile(c.seconds, [0.25, 0.75]) * 1e3
        ratio = float(np.median(np.divide(c.seconds, base.seconds)))
        lines.append(
            f"{c.name:18} {c.params:>9,} {middle * 1e3:>6.1f} ({low:.0f}-{high:.0f})".ljust(46)
            + f"{characters / middle / 1e3:>9.1f} {c.flops / middle / 1e9:>8.1f} {ratio:>10.2f} "
            f"{c.flops / base.flops:>10.2f} {c.compile_seconds:>9.1f} "
            f"{c.temporary_bytes / 1e6:>8.0f}"
        )
    return "\n".join(lines)


def program(argv: Sequence[str]) -> None:
    """Parses and calls."""
    p = Arguments(
        prog="python -m benchmarks.train_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--config", default="configs/enwik8.py", help="a file with both arms")
    p.add_argument("--rung", default="pocket", help="pocket or 1m")
    p.add_argument("--context", type=int, default=256)
    p.add_argument("--batch_size", type=int, default=16)
    p.add_argument("--steps", type=int, default=4, help="steps a dispatch")
    p.add_argument("--rounds", type=int, default=9)
    p.add_argument("--no_reference", action="store_true", help="leave out the plain definition")
    options = p.parse_args(argv[1:])

    def experiment(arm: str) -> ExperimentConfig:
        config = load_config(f"{options.config}:{arm}_{options.rung}")
        config.data.context = options.context
        config.training.batch_size = options.batch_size
        return ExperimentConfig.from_config_dict(config)

    kinds: list[tuple[str, str, Implementation]] = [
        ("FSN fused", "fsn", "xla"),
        ("transformer", "transformer", "xla"),
    ]
    if not options.no_reference:
        kinds.insert(0, ("FSN reference", "fsn", "reference"))
    contenders = [
        contender(name, experiment(arm), implementation=implementation, steps=options.steps)
        for name, arm, implementation in kinds
    ]
    measure(contenders, rounds=options.rounds, steps=options.steps)
    print(
        f"{device_description()} · {options.rung} rung · context {options.context} · batch "
        f"{options.batch_size} · {options.rounds} rounds of {options.steps} steps · medians "
        f"(quartiles)"
    )
    print(table(contenders, characters=options.batch_size * options.context))


def main() -> None:
    """The command line."""
    sys.exit(run_program(program, sys.argv))


if __name__ == "__main__":
    main()
