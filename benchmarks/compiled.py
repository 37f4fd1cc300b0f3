"""Programs compiled for accelerators that are not there: cycles, bytes, kernels, collectives.

    python -m benchmarks.compiled --machines=v5e:2x4,h100 --arms=fsn_1m --dtypes=float32,bfloat16

One case is a machine, an arm of a configuration, a dtype and an implementation of the causal sum;
each adds a row to ``--output``. ``--table`` prints the rows as Markdown. The compilers are those of
benchmarks/requirements-compiled.txt. A TPU's cycles are its compiler's estimates, and those of the
fused kernels come from their static schedules; a GPU's time is bounded below by its bytes.
"""

import argparse
import collections
import dataclasses
import itertools
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import hlo, listings, machines
from fsn_jax import FSNConfig
from fsn_jax.causal import causal_sum
from fsn_jax.coupling_sum import coupled_field
from fsn_jax.kernels.tpu_tiles import block_size
from fsn_jax.torus import Complex
from train.config import ExperimentConfig
from train.errors import UserError
from train.flags import load_config
from train.kernel_choice import sum_widths
from train.mesh import data_mesh
from train.metrics import append_row, check_appendable, read_rows
from train.optimizer import make_optimizer
from train.plan import abstract_inputs, model_for, train_steps_of
from train.program import Arguments, run_program
from train.provenance import git_state, package_versions
from train.step import abstract_state

DEFAULT_OUTPUT = Path("results/compiled.jsonl")


@dataclasses.dataclass(frozen=True)
class Case:
    """What is compiled.

    Attributes:
      machine: a TPU topology such as ``v5e:2x4``, or a card of ``machines.GPUS``.
      config: configuration file.
      arm: of the configuration.
      dtype: of the matrix products.
      implementation: of the causal sum, ``auto`` for what a run would take.
      measure: ``step`` (a train step), or alone with its gradient ``sum`` (the causal sum) or
        ``coupling`` (that of an FSN with folding and unfolding, which is one kernel on a TPU).
      length: context; 0 for that of the configuration.
      layers: blocks of the model; 0 for those of the configuration.
    """

    machine: str
    config: str
    arm: str
    dtype: str
    implementation: str
    measure: str = "step"
    length: int = 0
    layers: int = 0


def experiment_of(case: Case) -> ExperimentConfig:
    """The run whose step is compiled."""
    config = load_config(f"{case.config}:{case.arm}")
    config.model.dtype = case.dtype
    config.model.implementation = case.implementation
    if case.layers:
        config.model.num_layers = case.layers
    if case.length:
        tokens = config.data.context * config.training.batch_size
        config.data.context = case.length
        config.training.batch_size = max(1, tokens // case.length)
    return ExperimentConfig.from_config_dict(config)


def lowered_step(experiment: ExperimentConfig, devices: list[jax.Device]) -> jax.stages.Lowered:
    """The train step of a run with a resident corpus of the size of enwik8's."""
    data = dataclasses.replace(experiment.data, placement="resident")
    experiment = dataclasses.replace(experiment, data=data)
    mesh, layout = data_mesh(devices), experiment.training.layout
    model = model_for(experiment, mesh)
    optimizer = make_optimizer(experiment.optimizer, experiment.training.num_steps, mesh=mesh)
    separator = None if data.segments == "none" else 0  # any token: which one changes no operation
    steps = train_steps_of(experiment, model, optimizer, mesh, separator=separator)
    state = abstract_state(model, optimizer, mesh=mesh, layout=layout)
    inputs = abstract_inputs(
        experiment, mesh, num_tokens=hlo.CORPUS_BYTES, dtype=np.dtype(np.uint8)
    )
    return steps.lower(state, *inputs)


def lowered_sum(experiment: ExperimentConfig, devices: list[jax.Device]) -> jax.stages.Lowered:
    """The causal sum of a run's batch on one device, forward and backward."""
    score, value = sum_widths(experiment.model)
    arrays = [_by_head(experiment, devices, width) for width in (score, score, value)]

    def loss(*arrays: jax.Array) -> jax.Array:
        implementation = experiment.model.implementation
        summed = causal_sum(*arrays, include_self=False, implementation=implementation)
        return jnp.sin(summed.total).sum() + summed.self_weight.sum()

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*arrays)


def lowered_coupling(experiment: ExperimentConfig, devices: list[jax.Device]) -> jax.stages.Lowered:
    """The frustrated coupling of a run's batch on one device, forward and backward."""
    model = experiment.model
    if not isinstance(model, FSNConfig) or model.values == "linear":
        raise UserError("only an FSN with circular values has a coupling; take --measure=sum")
    query = _by_head(experiment, devices, sum_widths(model)[0])
    width = model.phases_per_kernel
    part: Any = _by_head(experiment, devices, width, model.phasor_heads)
    shape = (model.num_delays, model.num_harmonics, model.num_heads, width)
    coefficient: Any = jax.ShapeDtypeStruct(shape, "float32", sharding=part.sharding)

    def loss(query: jax.Array, key: jax.Array, z: Complex, kappa: Complex) -> jax.Array:
        field = coupled_field(query, key, z, kappa, implementation=model.implementation)
        return jnp.sin(field.im).sum()

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).lower(
        query, query, Complex(part, part), Complex(coefficient, coefficient)
    )


def _by_head(
    experiment: ExperimentConfig, devices: list[jax.Device], width: int, heads: int = 0
) -> jax.ShapeDtypeStruct:
    """An array ``[B, H, L, width]`` of a run on one device."""
    model, training = experiment.model, experiment.training
    shape = (training.batch_size, heads or model.num_heads, experiment.data.context, width)
    on_one = jax.sharding.SingleDeviceSharding(devices[0])
    return jax.ShapeDtypeStruct(shape, model.dtype, sharding=on_one)


LOWERED = {"step": lowered_step, "sum": lowered_sum, "coupling": lowered_coupling}


def measure(case: Case, dumps: Path) -> dict[str, Any]:
    """Compiles a case and reads what its compiler says."""
    shutil.rmtree(dumps, ignore_errors=True)
    dumps.mkdir(parents=True)
    experiment, devices = experiment_of(case), machines.devices(case.machine)
    gpu = machines.is_gpu(case.machine)
    lower = LOWERED[case.measure]
    began = time.perf_counter()
    lowered = lower(experiment, devices)
    traced = time.perf_counter()
    options: dict[str, Any] = {"xla_dump_to": str(dumps)} if gpu else {}
    compiled = lowered.compile(compiler_options=options)
    seconds = time.perf_counter() - traced
    text = compiled.as_text() or ""
    memory: Any = compiled.memory_analysis()
    step = hlo.step_instructions(text)
    length = experiment.data.context
    row: dict[str, Any] = dataclasses.asdict(case) | {
        "length": length,
        "batch_size": experiment.training.batch_size,
        "devices": len(devices) if case.measure == "step" else 1,
        "sums": experiment.training.batch_size
        * experiment.model.num_heads
        * (experiment.model.num_layers if case.measure == "step" else 1)
        / (len(devices) if case.measure == "step" else 1),
        "params": experiment.model.num_params(),
        "trace_seconds": round(traced - began, 1),
        "compile_seconds": round(seconds, 1),
        "scratch_bytes": memory.temp_size_in_bytes,
        "collectives": hlo.collectives(text),
        "fused_kernels": text.count('custom_call_target="tpu_custom_call"')
        + text.count('custom_call_target="__gpu$xla.gpu.triton"'),
    }
    row |= _gpu_figures(step, dumps) if gpu else _tpu_figures(row, step, dumps)
    return row | {"packages": package_versions(), "git": git_state()}


def _gpu_figures(step: list[hlo.Instruction], dumps: Path) -> dict[str, Any]:
    nvcc = machines.nvcc_folder()
    assert nvcc
    by_part = hlo.bytes_by_part(step)
    return {
        "kernels": len(hlo.kernels_of(step)),
        "kernels_by_part": dict(collections.Counter(k.part for k in hlo.kernels_of(step))),
        "bytes": sum(by_part.values()),
        "bytes_by_part": by_part,
        "fused": listings.gpu_registers(dumps, nvcc / "bin" / "ptxas"),
    }


def _tpu_figures(row: dict[str, Any], step: list[hlo.Instruction], dumps: Path) -> dict[str, Any]:
    by_part = hlo.cycles_by_part(step)
    figures: dict[str, Any] = {"xla_cycles": sum(by_part.values()), "cycles_by_part": by_part}
    if row["measure"] != "step" and row["fused_kernels"]:
        num_blocks = math.ceil(row["length"] / block_size(row["length"]))
        figures["kernel_cycles"] = {
            name: listings.tpu_cycles(dumps, name, num_blocks) for name in listings.KERNELS
        }
    return figures


def total_cycles(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> int | None:
    """A TPU row's cycles: of XLA's program, and of the fused kernels in it for a core's heads.

    Those of a step's kernels are in the row of the coupling alone or else of the sum; None if
    neither is among ``rows``.
    """
    if "xla_cycles" not in row or not row["fused_kernels"]:
        return row.get("xla_cycles")
    kernels = row.get("kernel_cycles")
    same = ("machine", "arm", "dtype", "length", "config")
    for measure in ("sum", "coupling"):
        for other in rows:
            alike = all(other[key] == row[key] for key in same)
            if row["measure"] == "step" and other["measure"] == measure and alike:
                kernels = other.get("kernel_cycles", kernels)
    return int(row["xla_cycles"] + row["sums"] * sum(kernels.values())) if kernels else None


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown, steps first."""
    head = (
        "machine", "arm", "dtype", "sum", "length", "cycles", "a head's sum", "GB", "kernels",
        "collectives", "spills", "compile s",
    )  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in sorted(rows, key=lambda row: row["measure"] != "step"):
        fused, cycles = row.get("fused", []), total_cycles(row, rows)
        cells = (
            row["machine"],
            row["arm"] if row["measure"] == "step" else f"{row['arm']}, {row['measure']} alone",
            row["dtype"],
            row["implementation"],
            row["length"],
            "" if cycles is None else f"{cycles:,}",
            f"{sum(row['kernel_cycles'].values()):,}" if "kernel_cycles" in row else "",
            f"{row['bytes'] / 1e9:.2f}" if "bytes" in row else "",
            row.get("kernels", ""),
            ", ".join(f"{n} {kind}" for kind, n in row["collectives"].items()),
            sum(kernel["spill_stores"] + kernel["spill_loads"] for kernel in fused)
            if fused
            else "",
            row["compile_seconds"],
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    p = Arguments(prog="python -m benchmarks.compiled", description=__doc__)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.add_argument("--machines", default="v5e:2x4,h100", help="topologies and cards")
    p.add_argument("--config", default="configs/enwik8.py", help="configuration file")
    p.add_argument("--arms", default="fsn_1m,transformer_1m", help="arms of the configuration")
    p.add_argument("--dtypes", default="float32,bfloat16")
    p.add_argument("--implementations", default="xla,pallas", help="of the causal sum")
    p.add_argument("--measure", default="step", choices=tuple(LOWERED))
    p.add_argument("--lengths", default="0", help="contexts; 0 is the configuration's")
    p.add_argument("--layers", default=0, type=int, help="fewer blocks, for a quick look")
    p.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="rows are added to it")
    p.add_argument("--table", action="store_true", help="only print the rows of --output")
    return p.parse_args(argv)


def cases_of(options: argparse.Namespace) -> list[Case]:
    """All requested combinations.

    Raises:
      UserError: a length is no whole number.
    """
    if not all(length.isdigit() for length in options.lengths.split(",")):
        raise UserError(f"--lengths takes whole numbers, as in 0,1024; got {options.lengths!r}")
    named = (options.machines, options.arms, options.dtypes, options.implementations)
    combinations = itertools.product(*(text.split(",") for text in (*named, options.lengths)))
    return [
        Case(
            machine,
            options.config,
            arm,
            dtype,
            implementation,
            options.measure,
            int(length),
            options.layers,
        )
        for machine, arm, dtype, implementation, length in combinations
    ]


def program(argv: Sequence[str]) -> None:
    """Parses and calls."""
    options = parse(argv[1:])
    if options.table:
        rows = read_rows(options.output)
        if not rows:
            raise UserError(f"--output={options.output} has no rows; measure some first")
        print(as_table(rows))
        return
    cases = cases_of(options)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    check_appendable(options.output)
    with tempfile.TemporaryDirectory() as folder:
        dumps = Path(folder) / "dumps"
        machines.prepare(None if options.measure == "step" else dumps)
        rows = []
        for case in cases:
            rows.append(measure(case, dumps))
            append_row(options.output, rows[-1])
    print(as_table(rows))


def main() -> None:
    """The command line."""
    sys.exit(run_program(program, sys.argv))


if __name__ == "__main__":
    main()
