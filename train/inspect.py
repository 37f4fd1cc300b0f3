"""``python -m train inspect --config=FILE[:ARM]``: what a run would be, without training it.

Its parameters, FLOPs, memory, sharding and first batch, for the devices at hand or for a TPU slice
that is only described (``--topology=v5e:2x4``; needs the libtpu package, not the hardware).
"""

import contextlib
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from train.config import ExperimentConfig
from train.data.corpus import Corpus
from train.errors import UserError
from train.flags import parse_config
from train.groups import DECAYED, group_of
from train.load import open_experiment_corpus
from train.mesh import data_mesh
from train.optimizer import learning_rate_factors, make_optimizer
from train.plan import (
    abstract_inputs,
    check_experiment,
    cpu_devices,
    model_for,
    train_steps_of,
    window_order,
)
from train.program import Arguments, num_cores, start_jax
from train.provenance import device_description
from train.run import default_folder
from train.step import TrainState, abstract_state
from train.tables import parameter_table, parameters_of, text_table

SHOWN_CHARACTERS = 64


def inspect(
    experiment: ExperimentConfig, corpus: Corpus, mesh: Mesh, *, devices: str, compiled: bool
) -> dict[str, Any]:
    """Describes a run; computes nothing on the devices.

    Args:
      experiment: the settings, with the vocabulary of the corpus.
      corpus: the data.
      mesh: the devices, at hand or of a topology.
      devices: description of the devices.
      compiled: whether to compile the train step and ask XLA for its memory.

    Returns:
      What ``--json`` prints. Sizes are numbers of scalars, memory is in bytes on one device, FLOPs
      are the model's own count (``FSNConfig.flops_per_token``).
    """
    model = model_for(experiment, mesh)
    optimizer = make_optimizer(experiment.optimizer, experiment.training.num_steps, mesh=mesh)
    state = abstract_state(model, optimizer, mesh=mesh, layout=experiment.training.layout)
    inputs = abstract_inputs(
        experiment, mesh, num_tokens=corpus.num_tokens("train"), dtype=corpus.vocabulary.dtype
    )
    memory: dict[str, Any] = {
        "parameters": _bytes_on_a_device(state.params),
        "optimizer": _bytes_on_a_device(state.opt_state),
        "data": _bytes_on_a_device(inputs),
        **dict.fromkeys(("scratch", "code", "total", "compile_seconds")),
    }
    if compiled:
        separator = experiment.data.separator(corpus.vocabulary)
        steps = train_steps_of(experiment, model, optimizer, mesh, separator=separator)
        memory |= _compiled_memory(steps, state, inputs)
    parameters = _parameters(state.params)
    per_token = experiment.model.flops_per_token(experiment.data.context)
    per_step, steps_of_run = experiment.characters_per_step, experiment.training.num_steps
    return {
        "name": experiment.name,
        "run_dir": str(default_folder(experiment)),
        "devices": devices,
        "mesh": dict(mesh.shape),
        "num_params": sum(parameter["size"] for parameter in parameters),
        "parameters": parameters,
        "groups": _groups(experiment, parameters),
        "flops": {
            "character": per_token,
            "step": per_token * per_step,
            "run": per_token * per_step * steps_of_run,
        },
        "memory": memory,
        "batch": _first_batch(experiment, corpus, inputs[-1]),
        "steps": steps_of_run,
        "characters": per_step * steps_of_run,
        "epochs": window_order(experiment, corpus).epoch(steps_of_run),
        "data_sha256": corpus.sha256,
        "config": experiment.to_dict(),
    }


def _parameters(params: Any) -> list[dict[str, Any]]:
    leaves = flatten_dict(params, sep="/").values()
    return [
        {**p, "group": group_of(tuple(p["path"].split("/"))), "sharding": _sharding(leaf)}
        for p, leaf in zip(parameters_of(params), leaves, strict=True)
    ]


def _bytes_on_a_device(tree: Any) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _sharding(leaf: Any) -> str:
    """Returns ``replicated``, or the mesh axis that each divided dimension is split over."""
    split = [f"{axis}: {name}" for axis, name in enumerate(leaf.sharding.spec) if name]
    return f"axis {', '.join(split)}" if split else "replicated"


def _groups(
    experiment: ExperimentConfig, parameters: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Returns size, peak learning rate and weight decay of each group of the optimizer."""
    optimizer = experiment.optimizer
    found = [
        {
            "name": name,
            "size": sum(p["size"] for p in parameters if p["group"] == name),
            "peak_learning_rate": optimizer.peak_learning_rate * factor,
            "weight_decay": optimizer.weight_decay if name in DECAYED else 0.0,
        }
        for name, factor in learning_rate_factors(optimizer).items()
    ]
    return [group for group in found if group["size"]]


def _compiled_memory(
    steps: jax.stages.Wrapped, state: TrainState, inputs: Sequence[jax.ShapeDtypeStruct]
) -> dict[str, Any]:
    """Returns XLA's analysis: scratch, code, and all that the step needs at once."""
    began = time.perf_counter()
    stats: Any = steps.lower(state, *inputs).compile().memory_analysis()
    seconds = {"compile_seconds": round(time.perf_counter() - began, 1)}
    if stats is None:  # a backend without the analysis
        return seconds
    scratch, code = stats.temp_size_in_bytes, stats.generated_code_size_in_bytes
    arrays = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    return {"scratch": scratch, "code": code, "total": arrays + scratch + code, **seconds}


def _first_batch(
    experiment: ExperimentConfig, corpus: Corpus, rows: jax.ShapeDtypeStruct
) -> dict[str, Any]:
    """Describes the first batch; ``start`` is the offset of its first row in the split."""
    starts = window_order(experiment, corpus).starts(0)
    windows = corpus.tokens("train")[starts[:, None] + np.arange(experiment.data.context + 1)]
    sharding: Any = rows.sharding
    return {
        "shape": windows.shape,
        "dtype": windows.dtype.name,
        "rows_per_device": sharding.shard_shape(rows.shape)[1],
        "sharding": _sharding(rows),
        "sha256": hashlib.sha256(np.ascontiguousarray(windows).tobytes()).hexdigest(),
        "start": int(starts[0]),
        "text": corpus.vocabulary.decode(windows[0, :SHOWN_CHARACTERS]).decode(errors="replace"),
    }


def as_text(seen: Mapping[str, Any]) -> str:
    """Formats the result of ``inspect`` as a page of text."""
    memory, batch, flops = seen["memory"], seen["batch"], seen["flops"]
    mesh = ", ".join(f"{axis} = {size}" for axis, size in seen["mesh"].items())
    groups = [
        (g["name"], f"{g['size']:,}", f"{g['peak_learning_rate']:g}", f"{g['weight_decay']:g}")
        for g in seen["groups"]
    ]
    megabytes = [
        (label, "?" if memory[part] is None else f"{memory[part] / 1e6:.1f}")
        for part, label in (
            ("parameters", "parameters"),
            ("optimizer", "optimizer state"),
            ("data", "data"),
            ("scratch", "scratch of the step"),
            ("code", "code of the step"),
            ("total", "the step in all"),
        )
    ]
    analysis = (
        "the step was not compiled, or its compiler gives no analysis\n"
        if memory["total"] is None
        else "scratch, code and the sum are XLA's analysis of the step compiled for these devices "
        f"({memory['compile_seconds']} s)\n"
    )
    return "\n".join(
        [
            f"{seen['name']} · would be in {seen['run_dir']} · {seen['devices']} · mesh {mesh}\n",
            parameter_table(seen["parameters"], "group", "sharding"),
            text_table([("group", "size", "peak rate", "decay"), *groups]) + "\n",
            "training FLOPs (matrix products, causal pairs only)\n"
            + text_table([(f"a {part}", f"{count:.3g}") for part, count in flops.items()])
            + "\n",
            text_table([("memory of a device", "MB"), *megabytes]) + f"\n{analysis}",
            f"{seen['steps']:,} steps · {seen['characters']:,} characters · "
            f"{seen['epochs']:.4g} epochs of corpus {seen['data_sha256'][:12]}\n",
            f"first batch   {batch['dtype']}{list(batch['shape'])}, rows {batch['sharding']}: "
            f"{batch['rows_per_device']} a device; sha256 {batch['sha256'][:12]}\n"
            f"its first row, from {batch['start']:,}: {batch['text']!r}\n",
        ]
    )


def topology_mesh(name: str) -> Mesh:
    """Returns the mesh of a TPU slice that need not exist, for instance ``v5e:2x4``.

    Raises:
      UserError: there is no such slice, or libtpu is not installed.
    """
    from jax.experimental import topologies

    # Off a TPU VM libtpu would ask a metadata server that is not there.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=name)
    except Exception as error:  # the plugin's own errors have no common class
        first = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"{name} cannot be described ({first}); a TPU slice is written like v5e:2x4 and needs "
            f"the package libtpu (the package's tpu extra)"
        ) from None
    return data_mesh(list(described.devices))


def program(argv: Sequence[str]) -> None:
    """Runs the program with the arguments of its command line."""
    p = Arguments(prog="python -m train inspect", description=__doc__, allow_abbrev=False)
    p.add_argument("--json", action="store_true", help="as JSON")
    p.add_argument("--no_compile", action="store_true", help="quicker; without the step's memory")
    p.add_argument("--topology", default="", help="a TPU slice to compile for, such as v5e:2x4")
    p.epilog = "--config and --config.FIELD=VALUE are those of python -m train."
    options, settings = p.parse_known_args(argv[1:])
    experiment = parse_config([argv[0], *settings])
    with contextlib.redirect_stdout(sys.stderr):  # preparing a corpus prints lines
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
    print(json.dumps(seen, indent=2) if options.json else as_text(seen))
