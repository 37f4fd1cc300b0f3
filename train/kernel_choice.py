"""Which implementation of the causal sum a run takes for ``auto``.

Measured once on the machine, remembered beside the compilation cache, and agreed between the
processes of a run: two that took different ones would wait for each other for ever.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from fsn_jax import FSNConfig, kernels
from fsn_jax.fields import Implementation
from fsn_jax.kernels.choice import Sizes, fastest, measured
from train.config import ModelConfig
from train.files import write_atomically

FILE = "causal_sum_choices.json"


def sum_widths(model: ModelConfig) -> tuple[int, int]:
    """Widths E of a model's queries and keys and G of its values, of each head."""
    if not isinstance(model, FSNConfig):
        return model.width // model.num_heads, model.width // model.num_heads
    if model.values == "linear":
        return 2 * model.score_pairs, model.phases_per_head
    return 2 * model.score_pairs, 2 * model.num_harmonics * model.phases_per_kernel


def sizes_of(model: ModelConfig, *, rows: int, context: int, segments: bool = False) -> Sizes:
    """Everything that the speed of a model's causal sum, or coupling, depends on."""
    coupling = None
    if isinstance(model, FSNConfig) and model.values == "circular":
        coupling = (model.num_delays, model.num_harmonics, model.phasor_heads)
    widths = sum_widths(model)
    return Sizes(rows, model.num_heads, context, *widths, model.dtype, coupling, segments)


def with_implementation(
    model: ModelConfig, mesh: Mesh, *, rows: int, context: int, segments: bool = False
) -> ModelConfig:
    """Returns a model's settings with ``auto`` replaced by the faster path on a mesh.

    Every process of a run must call it. A CPU has one path, and keeps ``auto``. Devices that are
    only described cannot be timed: they take the fused kernel.

    Args:
      model: settings.
      mesh: devices of the run.
      rows: sequences that a device works on at a time.
      context: tokens of a sequence.
      segments: whether tokens have segments.
    """
    devices = list(mesh.devices.flat)
    if model.implementation != "auto" or devices[0].platform == "cpu":
        return model
    if not {*devices} <= {*jax.devices()}:
        return dataclasses.replace(model, implementation="pallas")
    sizes = sizes_of(model, rows=rows, context=context, segments=segments)
    fused = jax.process_index() == 0 and _remembered(sizes) == "pallas"
    if jax.process_count() > 1:
        fused = bool(multihost_utils.broadcast_one_to_all(np.int32(fused)))
    return dataclasses.replace(model, implementation="pallas" if fused else "xla")


def _remembered(sizes: Sizes) -> Implementation:
    """Returns ``fastest(sizes)``, from the file beside the compilation cache if it is there.

    A measurement that failed is not kept: the next start may have the memory that this one lacked.
    """
    folder = jax.config.values["jax_compilation_cache_dir"]
    if not folder or "://" in folder:
        return fastest(sizes)
    path = Path(folder) / FILE
    precision = jax.config.values["jax_default_matmul_precision"]
    machine = jax.devices()[0].device_kind, version("jaxlib"), _kernels_hash(), precision
    key = " ".join(map(str, (*machine, *sizes)))
    choices: dict[str, Implementation] = {}
    with contextlib.suppress(OSError, ValueError):  # nothing yet, or nothing that can be read
        choices = json.loads(path.read_text(encoding="utf-8"))
    if choices.get(key) not in ("pallas", "xla"):
        if (found := measured(sizes)) is None:
            return "xla"
        choices[key] = found
        with contextlib.suppress(OSError):  # a folder that cannot be written remembers nothing
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(choices, indent=2))
    return choices[key]


@functools.cache
def _kernels_hash() -> str:
    """Identifies the source of the kernels: what was measured is also what was checked."""
    folder = Path(kernels.__file__).parent
    sources = b"".join(file.read_bytes() for file in sorted(folder.glob("*.py")))
    return hashlib.sha256(sources).hexdigest()[:12]
