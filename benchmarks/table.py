"""Speed and memory side by side, one command: FSN in four forms, the transformer, peers.

    python -m benchmarks.table --rungs=pocket,1m --lengths=256,1024 --measures=train

The contenders of a row are timed in turn, each once a round, so that a machine that slows down
slows all of them; a ratio is the median over the rounds of the ratio within a round. A batch holds
``--tokens`` tokens whatever the length. Every row is added to ``--output`` when it is done and is
not measured again by the same code on the same machine: an interrupted table is completed.

Contenders: ``fsn``, ``fsn-remat`` (its blocks recomputed in the backward pass), ``fsn-reference``
(the plain definition), ``projected`` (the FSN with projected scores), ``transformer`` (ours),
``flax`` (ours with Flax's attention module), ``torch`` (x-transformers in PyTorch, with
``--torch_python=PYTHON``). Measures: ``train`` (a whole step), ``forward`` (logits of a batch),
``sample`` (a character of cached sampling at position L; no peers).
"""

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.contender import MEASURES, Contender
from fsn_jax import TransformerConfig
from train.config import ExperimentConfig
from train.errors import UserError
from train.flags import load_config
from train.metrics import append_row, check_appendable, read_rows
from train.program import Arguments, num_cores, run_program, start_jax
from train.provenance import device_description, git_state, package_versions

BASE = "transformer"
"""The contender that the others are compared with."""

DEFAULT_OUTPUT = Path("results/benchmarks.jsonl")
FSNS = ("fsn", "projected")
CONTENDERS = ("fsn", "fsn-remat", "fsn-reference", "projected", BASE, "flax", "torch")


def experiment_for(options: argparse.Namespace, name: str, rung: str, length: int) -> Any:
    """Returns the settings of a contender at a rung and length."""
    kind = name.partition("-")[0]
    arm = kind if kind in FSNS else BASE
    config = load_config(f"{options.config}:{arm}_{rung}")
    config.data.context = length
    config.training.batch_size = max(1, options.tokens // length)
    config.model.dtype = options.dtype
    config.optimizer.matrices = options.optimizer
    config.data.placement = "resident"
    dispatch = options.steps
    config.training.update(
        num_steps=1000 * dispatch, steps_per_dispatch=dispatch, log_every=dispatch
    )
    config.evaluation.every = config.checkpoints.every = dispatch
    return ExperimentConfig.from_config_dict(config)


def torch_contender(
    python: str, measure: str, experiment: ExperimentConfig
) -> tuple[Contender, dict[str, str]]:
    """Starts the PyTorch process in its environment; returns it with its packages."""
    model = experiment.model
    assert isinstance(model, TransformerConfig)
    sizes = dataclasses.asdict(model) | {
        "context": experiment.data.context,
        "batch_size": experiment.training.batch_size,
        "measure": measure,
        "optimizer": experiment.optimizer.matrices,
        "threads": num_cores(),
    }
    try:
        process = subprocess.Popen(
            [python, str(Path(__file__).with_name("torch_peer.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
    except OSError as error:
        raise UserError(f"--torch_python={python} does not start ({error.strerror})") from None
    assert process.stdin
    assert process.stdout

    def ask(line: str) -> str:
        answer = ""
        with contextlib.suppress(BrokenPipeError):  # it has ended
            print(line, file=process.stdin, flush=True)
            answer = process.stdout.readline() if process.stdout else ""
        if not answer:
            raise UserError(
                f"--torch_python={python} stopped; it needs benchmarks/requirements-torch.txt"
            )
        return answer

    about = json.loads(ask(json.dumps(sizes)))
    contender = Contender("torch", lambda: float(ask("again")), about["params"])
    return contender, about["versions"]


def measure_row(options: argparse.Namespace, key: dict[str, Any]) -> dict[str, Any]:
    """Measures one row: times all contenders in turn."""
    contenders, packages = [], package_versions()
    for name in key["contenders"]:
        experiment = experiment_for(options, name, key["rung"], key["length"])
        if name == "torch":
            peer, versions = torch_contender(options.torch_python, key["measure"], experiment)
            packages |= versions
            contenders.append(peer)
        else:
            contenders.append(MEASURES[key["measure"]](name, experiment, options.steps))
    for c in contenders:
        c.seconds()  # nothing is timed cold
    rounds = [[c.seconds() for c in contenders] for _ in range(options.rounds)]
    times = np.array(rounds).reshape(options.rounds, len(contenders))
    batch = max(1, options.tokens // key["length"]) if key["measure"] != "sample" else 1
    base = [c.name for c in contenders].index(BASE) if BASE in key["contenders"] else None
    results = []
    for i, c in enumerate(contenders):
        low, middle, high = np.quantile(times[:, i], [0.25, 0.5, 0.75])
        ratio = float(np.median(times[:, i] / times[:, base])) if base is not None else None
        flops_base = contenders[base].flops if base is not None else 0.0
        results.append(
            {
                "name": c.name,
                "params": c.params,
                "seconds": float(middle),
                "quartiles": [float(low), float(high)],
                "time_ratio": ratio,
                "flops": c.flops,
                "flop_ratio": c.flops / flops_base if c.flops and flops_base else None,
                "compile_seconds": c.compile_seconds,
                "memory_bytes": c.memory_bytes,
            }
        )
    return {
        **key,
        "batch_size": batch,
        "results": results,
        "cores": num_cores(),
        "load_average": os.getloadavg()[0],
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": ["python", *sys.orig_argv[1:]],
        "packages": packages,
    }


def row_text(row: dict[str, Any]) -> str:
    """Formats a row of the table, one line a contender."""
    lines = [
        f"{row['rung']} rung · {row['measure']} · L {row['length']} · batch {row['batch_size']} · "
        f"{row['dtype']} · {row.get('optimizer', 'muon')} · {row['rounds']} rounds",
        f"  {'':14} {'params':>10} {'ms':>9} {'quartiles':>17} {'GFLOP/s':>8} {'time':>6} "
        f"{'FLOP':>6} {'compile s':>9} {'MB':>7}",
    ]
    for r in row["results"]:
        low, high = (f"{1e3 * q:.4g}" for q in r["quartiles"])
        speed = f"{r['flops'] / r['seconds'] / 1e9:.1f}" if r["flops"] else ""
        time_ratio, flop_ratio = (
            f"{r[k]:.2f}" if r[k] else "" for k in ("time_ratio", "flop_ratio")
        )
        compiled = f"{r['compile_seconds']:.1f}" if r["compile_seconds"] else ""
        memory = f"{r['memory_bytes'] / 1e6:.0f}" if r["memory_bytes"] else ""
        lines.append(
            f"  {r['name']:14} {r['params']:>10,} {1e3 * r['seconds']:>9.4g} "
            f"{low + '-' + high:>17} {speed:>8} {time_ratio:>6} {flop_ratio:>6} {compiled:>9} "
            f"{memory:>7}"
        )
    return "\n".join(lines)


def program(argv: Sequence[str]) -> None:
    """Parses and calls."""
    p = Arguments(
        prog="python -m benchmarks.table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--config", default="configs/ladder.py", help="a file with arms fsn_RUNG")
    p.add_argument("--rungs", default="1m,4m,8m")
    p.add_argument("--lengths", default="128,256,512,1024,2048,4096")
    p.add_argument("--measures", default="train,forward,sample")
    p.add_argument("--contenders", default=",".join(CONTENDERS[:-1]))
    p.add_argument("--tokens", type=int, default=4096, help="in a batch, whatever the length")
    p.add_argument("--dtype", default="float32", help="float32 or bfloat16")
    p.add_argument("--optimizer", default="muon", help="of the blocks' matrices: muon or adam")
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--steps", type=int, default=2, help="train steps, or chunks, timed together")
    p.add_argument("--torch_python", default="", help="Python with requirements-torch.txt")
    p.add_argument("--output", type=Path, default=DEFAULT_OUTPUT)
    p.add_argument("--again", action="store_true", help="measure rows that are there already")
    options = p.parse_args(argv[1:])
    names = options.contenders.split(",")
    if options.torch_python and "torch" not in names:
        names.append("torch")
    check_options(options, names)
    start_jax(cpu_devices=num_cores())
    about: dict[str, Any] = {"device": device_description(), "git": git_state()}
    print(f"{about['device']} · commit {(about['git']['commit'] or 'none')[:9]}", flush=True)
    done = read_rows(options.output)
    for rung in options.rungs.split(","):
        for length in map(int, options.lengths.split(",")):
            for measure in options.measures.split(","):
                kept = [n for n in names if measure != "sample" or n in (*FSNS, BASE)]
                if not kept:
                    continue
                key = {
                    "config": options.config,
                    "rung": rung,
                    "length": length,
                    "measure": measure,
                    "tokens": options.tokens,
                    "dtype": options.dtype,
                    "optimizer": options.optimizer,
                    "contenders": kept,
                    "rounds": options.rounds,
                    "steps": options.steps,
                    **about,
                }
                found = [
                    row
                    for row in done
                    if all(row.get(k) == v for k, v in key.items())
                    and package_versions().items() <= row["packages"].items()
                ]
                if found and not options.again:
                    print(row_text(found[-1]), flush=True)
                    continue
                row = measure_row(options, key)
                append_row(options.output, row)
                print(row_text(row), flush=True)


def check_options(options: argparse.Namespace, names: Sequence[str]) -> None:
    """Raises UserError if an option is out of range."""
    choices: tuple[tuple[str, Sequence[str], tuple[str, ...]], ...] = (
        ("contenders", names, CONTENDERS),
        ("measures", options.measures.split(","), tuple(MEASURES)),
        ("dtype", [options.dtype], ("float32", "bfloat16")),
        ("optimizer", [options.optimizer], ("muon", "adam")),
    )
    for option, given, allowed in choices:
        for value in given:
            if value not in allowed:
                raise UserError(f"--{option} takes {', '.join(allowed)}; got {value!r}")
    if not all(length.isdigit() and int(length) for length in options.lengths.split(",")):
        raise UserError(f"--lengths takes whole numbers, as in 256,1024; got {options.lengths!r}")
    if "torch" in names and not options.torch_python:
        raise UserError("the torch contender needs --torch_python=PYTHON of its environment")
    if "torch" in names and options.dtype != "float32":
        raise UserError("the torch contender computes in float32: leave it out of --contenders")
    if min(options.rounds, options.steps, options.tokens) < 1:
        raise UserError("--rounds, --steps and --tokens must be at least 1")
    if options.measures == "sample" and not {*FSNS, BASE} & {*names}:
        raise UserError(f"--measures=sample takes {', '.join((*FSNS, BASE))}; got {names}")
    if not options.output.parent.is_dir():
        raise UserError(f"--output={options.output}: there is no folder {options.output.parent}")
    check_appendable(options.output)


def main() -> None:
    """The command line."""
    # Every compile time is that of a first compilation.
    jax.config.update("jax_enable_compilation_cache", False)
    sys.exit(run_program(program, sys.argv))


if __name__ == "__main__":
    main()
