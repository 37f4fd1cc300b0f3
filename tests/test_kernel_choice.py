"""What ``auto`` becomes in a run: measured once, remembered, the same for all of its processes."""

import json

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils

from configs import enwik8
from fsn_jax.hub import build_model
from fsn_jax.kernels import choice
from fsn_jax.kernels.choice import Sizes
from train import kernel_choice
from train.kernel_choice import FILE, sizes_of, with_implementation
from train.mesh import data_mesh

MODEL = enwik8.FSN_1M


class Device:
    """A TPU as far as a mesh needs one."""

    platform, device_kind, process_index = "tpu", "TPU v5 lite", 0

    def __init__(self, number):
        self.id = number


class Mesh:
    def __init__(self, devices):
        self.devices = np.array(devices, object)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Two TPUs, a compilation cache, and a measurement that counts its calls."""
    devices, timed = [Device(0), Device(1)], []
    monkeypatch.setattr(jax, "devices", lambda: devices)
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))

    def measured(sizes):
        timed.append(sizes)
        return "pallas"

    monkeypatch.setattr(kernel_choice, "measured", measured)
    yield Mesh(devices), timed
    jax.config.update("jax_compilation_cache_dir", before)


def choose(mesh):
    return with_implementation(MODEL, mesh, rows=8, context=512).implementation


def test_measured_once_and_remembered_beside_the_compilation_cache(machine, tmp_path):
    mesh, timed = machine
    assert [choose(mesh), choose(mesh)] == ["pallas", "pallas"]
    assert (MODEL.num_heads, MODEL.num_harmonics, MODEL.heads_per_phase) == (2, 2, 2)
    assert timed == [Sizes(8, 2, 512, 112, 448, "float32", (2, 2, 1))]
    file = tmp_path / FILE
    file.write_text(
        json.dumps(dict.fromkeys(json.loads(file.read_text(encoding="utf-8")), "xla")),
        encoding="utf-8",
    )
    assert choose(mesh) == "xla"
    (tmp_path / FILE).write_text("{", encoding="utf-8")
    assert choose(mesh) == "pallas"


def test_a_measurement_that_failed_is_made_again(machine, monkeypatch, tmp_path):
    mesh, _ = machine
    found = [None, "pallas"]
    monkeypatch.setattr(kernel_choice, "measured", lambda _: found.pop(0))
    assert choose(mesh) == "xla"
    assert not (tmp_path / FILE).exists()
    assert choose(mesh) == "pallas"


def test_measured_again_for_another_precision(machine):
    mesh, timed = machine
    choose(mesh)
    with jax.default_matmul_precision("highest"):
        choose(mesh)
    assert len(timed) == 2


def test_measured_again_for_segments_and_for_other_kernels(machine, monkeypatch):
    mesh, timed = machine
    choose(mesh)
    with_implementation(MODEL, mesh, rows=8, context=512, segments=True)
    monkeypatch.setattr(kernel_choice, "_kernels_hash", lambda: "of another version")
    choose(mesh)
    assert [sizes.segments for sizes in timed] == [False, True, False]


@pytest.mark.parametrize(
    "config",
    [
        cases.fsn_config(num_layers=1, num_heads=3, num_phases=12, heads_per_phase=2),
        cases.fsn_config(num_layers=1, values="linear"),
        cases.transformer_config(num_layers=1),
    ],
    ids=["fsn", "linear_values", "transformer"],
)
def test_a_model_asks_for_what_is_measured_for_it(monkeypatch, config):
    asked = []
    monkeypatch.setattr(choice, "fastest", lambda sizes: asked.append(sizes) or "xla")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    jax.eval_shape(build_model(config).init, jax.random.key(0), tokens)
    assert asked[-1] == sizes_of(config, rows=2, context=8)


@pytest.mark.parametrize("first_says", [0, 1])
def test_processes_do_what_the_first_found(machine, monkeypatch, first_says):
    """A later process does not measure, and takes the choice that is broadcast."""
    mesh, timed = machine
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(
        multihost_utils, "broadcast_one_to_all", lambda own: np.asarray(first_says, own.dtype)
    )
    assert choose(mesh) == ("pallas" if first_says else "xla")
    assert not timed


def test_a_described_machine_takes_the_kernel_and_a_cpu_stays(machine):
    _, timed = machine
    assert choose(Mesh([Device(7)])) == "pallas"
    assert not timed
    cpu = data_mesh(jax.local_devices(backend="cpu")[:1])
    assert choose(cpu) == "auto"
