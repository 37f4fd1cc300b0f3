"""``python -m train inspect --config=FILE[:ARM]``: what a run would be, without training it.

Its parameters, FLOPs, memory, sharding and first batch, for the devices at hand or for a TPU slice
that is only described (``--topology=v5e:2x4``; needs the libtpu package, not the hardware).
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh, NamedSharding

from train.config import ExperimentConfig
from train.data.corpus import Corpus
from train.data.windows import WindowOrder
from train.errors import UserError
from train.flags import parse_config
from train.load import open_experiment_corpus
from train.loop import check_experiment, cpu_devices, train_steps_of
from train.mesh import by_step_and_row, data_mesh, replicated
from train.optimizer import DECAYED, group_of, learning_rate_factors, make_optimizer
from train.program import Arguments, num_cores, start_jax
from train.provenance import device_description
from train.run import default_folder
from train.step import TrainState, abstract_state, build_model

SHOWN_CHARACTERS = 64


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One learned array.

    Attributes:
      path: its place in the parameter tree.
      shape: of the whole array.
      dtype: of its elements.
      size: number of scalars.
      group: which of the optimizer's groups it is in.
      sharding: ``replicated``, or the mesh axes its dimensions are split over.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    size: int
    group: str
    sharding: str


@dataclasses.dataclass(frozen=True)
class Group:
    """Parameters that the optimizer treats alike.

    Attributes:
      name: of the group.
      size: number of scalars.
      peak_learning_rate: after warm-up.
      weight_decay: of the group.
    """

    name: str
    size: int
    peak_learning_rate: float
    weight_decay: float


@dataclasses.dataclass(frozen=True)
class Flops:
    """Floating-point operations by the model's own count; see ``FSNConfig.flops_per_token``.

    Attributes:
      character: training, one character.
      step: training, one step.
      run: training, all steps.
    """

    character: float
    step: float
    run: float


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
      parameters: of the model.
      optimizer: of its state, beside the parameters.
      data: what a dispatch is given: the resident corpus and offsets, or the batches.
      scratch: activations, gradients and other temporaries of the compiled step; None if it was
        not compiled.
      code: of the compiled step.
      total: what the step needs at once: arguments, results that do not take their place,
        scratch and code.
      compile_seconds: how long it took to compile.
    """

    parameters: int
    optimizer: int
    data: int
    scratch: int | None = None
    code: int | None = None
    total: int | None = None
    compile_seconds: float | None = None


@dataclasses.dataclass(frozen=True)
class Batch:
    """The first batch.

    Attributes:
      shape: rows and characters, one more than the context.
      dtype: of its tokens.
      rows_per_device: how the rows are shared.
      sharding: of the rows, and of the resident corpus if there is one.
      sha256: of its bytes, row after row.
      start: where its first row begins in the training split.
      text: how its first row begins.
    """

    shape: tuple[int, int]
    dtype: str
    rows_per_device: int
    sharding: str
    sha256: str
    start: int
    text: str


@dataclasses.dataclass(frozen=True)
class Inspection:
    """All that is known of a run before it starts.

    Attributes:
      name: of the run.
      run_dir: where it would be.
      devices: how many of what kind.
      mesh: size of each axis.
      num_params: learned scalars.
      parameters: one entry an array.
      groups: of the optimizer.
      flops: of training.
      memory: on one device.
      batch: the first one.
      steps: of the run.
      characters: of the run.
      epochs: of the run.
      data_sha256: identity of the corpus.
      config: every setting.
    """

    name: str
    run_dir: str
    devices: str
    mesh: dict[str, int]
    num_params: int
    parameters: list[Parameter]
    groups: list[Group]
    flops: Flops
    memory: Memory
    batch: Batch
    steps: int
    characters: int
    epochs: float
    data_sha256: str
    config: dict[str, Any]


def inspect(
    experiment: ExperimentConfig, corpus: Corpus, mesh: Mesh, *, devices: str, compiled: bool
) -> Inspection:
    """Looks at a run; computes nothing on the devices.

    Args:
      experiment: with the corpus's vocabulary.
      corpus: its data.
      mesh: of devices that are there, or of a topology.
      devices: a description of them.
      compiled: whether to compile the train step and ask XLA how much memory it takes.
    """
    model = build_model(experiment.model)
    optimizer = make_optimizer(experiment.optimizer, experiment.training.num_steps, mesh=mesh)
    state = abstract_state(model, optimizer, mesh=mesh, layout=experiment.training.parameters)
    inputs = _abstract_inputs(experiment, corpus, mesh)
    order = _order(experiment, corpus)
    memory = Memory(
        parameters=_bytes_on_a_device(state.params),
        optimizer=_bytes_on_a_device(state.opt_state),
        data=_bytes_on_a_device(inputs),
    )
    if compiled:
        steps = train_steps_of(experiment, model, optimizer, mesh)
        memory = _compiled_memory(steps, state, inputs, memory)
    parameters = _parameters(state.params)
    flops = experiment.model.flops_per_token(experiment.data.context)
    characters = experiment.training.num_steps * experiment.characters_per_step
    return Inspection(
        name=experiment.name,
        run_dir=str(default_folder(experiment)),
        devices=devices,
        mesh=dict(mesh.shape),
        num_params=sum(parameter.size for parameter in parameters),
        parameters=parameters,
        groups=_groups(experiment, parameters),
        flops=Flops(flops, flops * experiment.characters_per_step, flops * characters),
        memory=memory,
        batch=_first_batch(experiment, corpus, order, inputs[-1]),
        steps=experiment.training.num_steps,
        characters=characters,
        epochs=order.epoch(experiment.training.num_steps),
        data_sha256=corpus.sha256,
        config=experiment.to_dict(),
    )


def _order(experiment: ExperimentConfig, corpus: Corpus) -> WindowOrder:
    return WindowOrder(
        corpus.num_tokens("train"),
        experiment.data.context,
        experiment.training.batch_size,
        experiment.seed,
    )


def _abstract_inputs(
    experiment: ExperimentConfig, corpus: Corpus, mesh: Mesh
) -> tuple[jax.ShapeDtypeStruct, ...]:
    """What the train step takes after the state, see ``make_train_steps``."""
    training, context = experiment.training, experiment.data.context
    by_rows = by_step_and_row(mesh)
    rows = (training.steps_per_dispatch, training.batch_size)
    if experiment.data.placement == "host":
        windows = (*rows, context + 1)
        return (jax.ShapeDtypeStruct(windows, corpus.codec.dtype, sharding=by_rows),)
    tokens = (corpus.num_tokens("train"),)
    return (
        jax.ShapeDtypeStruct(tokens, corpus.codec.dtype, sharding=replicated(mesh)),
        jax.ShapeDtypeStruct(rows, jnp.int32, sharding=by_rows),
    )


def _bytes_on_a_device(tree: Any) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _sharding(leaf: jax.ShapeDtypeStruct) -> str:
    assert isinstance(leaf.sharding, NamedSharding)
    split = [f"{axis}: {name}" for axis, name in enumerate(leaf.sharding.spec) if name]
    return f"axis {', '.join(split)}" if split else "replicated"


def _parameters(params: Any) -> list[Parameter]:
    return [
        Parameter(
            path=name,
            shape=leaf.shape,
            dtype=leaf.dtype.name,
            size=math.prod(leaf.shape),
            group=group_of(name.split("/")),
            sharding=_sharding(leaf),
        )
        for name, leaf in flatten_dict(params, sep="/").items()
    ]


def _groups(experiment: ExperimentConfig, parameters: Sequence[Parameter]) -> list[Group]:
    optimizer = experiment.optimizer
    sizes = {
        name: sum(p.size for p in parameters if p.group == name)
        for name in learning_rate_factors(optimizer)
    }
    return [
        Group(
            name=name,
            size=sizes[name],
            peak_learning_rate=optimizer.peak_learning_rate * factor,
            weight_decay=optimizer.weight_decay if name in DECAYED else 0.0,
        )
        for name, factor in learning_rate_factors(optimizer).items()
        if sizes[name]
    ]


def _compiled_memory(
    steps: jax.stages.Wrapped,
    state: TrainState,
    inputs: Sequence[jax.ShapeDtypeStruct],
    memory: Memory,
) -> Memory:
    began = time.perf_counter()
    stats: Any = steps.lower(state, *inputs).compile().memory_analysis()
    seconds = time.perf_counter() - began
    if stats is None:  # a backend without the analysis
        return dataclasses.replace(memory, compile_seconds=round(seconds, 1))
    return dataclasses.replace(
        memory,
        scratch=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
        total=stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes
        + stats.generated_code_size_in_bytes,
        compile_seconds=round(seconds, 1),
    )


def _first_batch(
    experiment: ExperimentConfig,
    corpus: Corpus,
    order: WindowOrder,
    rows: jax.ShapeDtypeStruct,
) -> Batch:
    starts = order.starts(0)
    context = experiment.data.context
    windows = corpus.tokens("train")[starts[:, None] + np.arange(context + 1)]
    sharding = rows.sharding
    assert isinstance(sharding, NamedSharding)
    return Batch(
        shape=(len(starts), context + 1),
        dtype=windows.dtype.name,
        rows_per_device=sharding.shard_shape(rows.shape)[1],
        sharding=_sharding(rows),
        sha256=hashlib.sha256(np.ascontiguousarray(windows).tobytes()).hexdigest(),
        start=int(starts[0]),
        text=corpus.decode(windows[0, :SHOWN_CHARACTERS]).decode(errors="replace"),
    )


def as_text(seen: Inspection) -> str:
    """The inspection as a page of text."""
    memory, batch = seen.memory, seen.batch
    mesh = ", ".join(f"{axis} = {size}" for axis, size in seen.mesh.items())
    tables = [
        _table(
            ("parameter", "shape", "size", "group", "sharding"),
            [(p.path, str(p.shape), f"{p.size:,}", p.group, p.sharding) for p in seen.parameters]
            + [("total", "", f"{seen.num_params:,}", "", "")],
        ),
        _table(
            ("group", "size", "peak rate", "decay"),
            [
                (g.name, f"{g.size:,}", f"{g.peak_learning_rate:g}", f"{g.weight_decay:g}")
                for g in seen.groups
            ],
        ),
        _table(
            ("training FLOPs", "(matrix products, causal pairs only)"),
            [
                ("a character", f"{seen.flops.character:.3g}"),
                ("a step", f"{seen.flops.step:.3g}"),
                ("the run", f"{seen.flops.run:.3g}"),
            ],
        ),
        _table(
            ("memory of a device", "MB"),
            [
                ("parameters", _megabytes(memory.parameters)),
                ("optimizer state", _megabytes(memory.optimizer)),
                ("data", _megabytes(memory.data)),
                ("scratch of the step", _megabytes(memory.scratch)),
                ("code of the step", _megabytes(memory.code)),
                ("the step in all", _megabytes(memory.total)),
            ],
        )
        + (
            "scratch, code and the sum are XLA's analysis of the step compiled for these devices "
            f"({memory.compile_seconds} s)\n"
            if memory.total is not None
            else "the step was not compiled, or its compiler gives no analysis\n"
        ),
    ]
    return "\n".join(
        [
            f"{seen.name} · would be in {seen.run_dir} · {seen.devices} · mesh {mesh}\n",
            *tables,
            f"{seen.steps:,} steps · {seen.characters:,} characters · {seen.epochs:.4g} epochs of "
            f"corpus {seen.data_sha256[:12]}\n",
            f"first batch   {batch.dtype}{list(batch.shape)}, rows {batch.sharding}: "
            f"{batch.rows_per_device} a device; sha256 {batch.sha256[:12]}\n"
            f"its first row, from {batch.start:,}: {batch.text!r}\n",
        ]
    )


def _megabytes(count: int | None) -> str:
    return "?" if count is None else f"{count / 1e6:.1f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of text; those whose cells are all numbers stand on the right."""
    columns = list(zip(head, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    numeric = [
        all(c.lstrip("-").replace(",", "")[:1].isdigit() or c in "?" for c in column[1:])
        for column in columns
    ]
    return "".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        + "\n"
        for row in (head, *rows)
    )


def topology_mesh(name: str) -> Mesh:
    """The mesh of a TPU slice that need not be there, for instance ``v5e:2x4``.

    Raises:
      UserError: there is no such slice, or libtpu is not installed.
    """
    from jax.experimental import topologies

    # Off a TPU VM libtpu would ask a metadata server that is not there.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except Exception as error:  # the plugin's own errors have no common class
        raise UserError(
            f"--topology={name} cannot be described ({error}); it is written like v5e:2x4 and "
            f"needs the package libtpu (the package's tpu extra)"
        ) from None
    return data_mesh(list(described.devices))


def program(argv: Sequence[str]) -> None:
    """Parses and calls."""
    p = Arguments(prog="python -m train inspect", description=__doc__, allow_abbrev=False)
    p.add_argument("--json", action="store_true", help="as JSON")
    p.add_argument("--no_compile", action="store_true", help="quicker; without the step's memory")
    p.add_argument("--topology", default="", help="a TPU slice to compile for, such as v5e:2x4")
    p.epilog = "--config and --config.FIELD=VALUE are those of python -m train."
    options, settings = p.parse_known_args(argv[1:])
    experiment = parse_config([argv[0], *settings])
    with contextlib.redirect_stdout(sys.stderr):  # to prepare a corpus is told on the way
        corpus = open_experiment_corpus(experiment)
    experiment = experiment.with_vocabulary(len(corpus.vocabulary))
    start_jax(cpu_devices=cpu_devices(experiment, num_cores()))
    mesh = topology_mesh(options.topology) if options.topology else data_mesh()
    check_experiment(experiment, corpus, mesh.size)
    device = mesh.devices.flat[0]
    seen = inspect(
        experiment,
        corpus,
        mesh,
        devices=f"{mesh.size} x {device.device_kind}, described"
        if options.topology
        else device_description(),
        compiled=not options.no_compile,
    )
    print(json.dumps(dataclasses.asdict(seen), indent=2) if options.json else as_text(seen))
