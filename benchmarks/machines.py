"""Accelerators that are described to their compilers and need not be there."""

import os
import sys
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from train.errors import UserError
from train.inspect import topology_mesh

_GPU = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared_memory}
  shared_memory_per_block_optin: {shared_memory_optin}
  threads_per_core_limit: 2048
  core_count: {cores}
  fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: {cache}
  clock_rate_ghz: {clock}
  device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} {features} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
runtime_version {{ major: 12 minor: 8 patch: 0 }}
device_description_str: "{name}"
"""

GPUS: dict[str, dict[str, Any]] = {
    "h100": {
        "name": "NVIDIA H100 80GB HBM3",
        "major": 9,
        "features": "feature_extension: ACCELERATED_FEATURES",
        "cores": 132,
        "fpus": 128,
        "clock": 1.98,
        "bandwidth": 3_352_320_000_000,
        "memory": 84_929_347_584,
        "cache": 52_428_800,
        "shared_memory": 233_472,
        "shared_memory_optin": 232_448,
    },
    "a100": {
        "name": "NVIDIA A100-SXM4-40GB",
        "major": 8,
        "features": "",
        "cores": 108,
        "fpus": 64,
        "clock": 1.41,
        "bandwidth": 1_555_200_000_000,
        "memory": 42_505_273_344,
        "cache": 41_943_040,
        "shared_memory": 167_936,
        "shared_memory_optin": 166_912,
    },
}
"""Cards by name, from their data sheets and from what CUDA says of them."""


def is_gpu(machine: str) -> bool:
    """Whether a machine is one of ``GPUS``; otherwise it is a TPU topology."""
    return machine in GPUS


def prepare(listings: Path | None) -> None:
    """Sets both compilers up; call it before JAX starts.

    Args:
      listings: where libtpu leaves the schedule of every kernel, which takes long for a whole step.
    """
    jax.config.update("jax_platforms", "cpu")
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is claimed
    if listings:
        os.environ["LIBTPU_INIT_ARGS"] = (
            f"--xla_mosaic_dump_to={listings} --xla_jf_dump_to={listings} "
            "--xla_jf_dump_llo_text=true"
        )
    flags = [os.environ.get("XLA_FLAGS", ""), "--xla_gpu_autotune_level=0"]
    nvcc = nvcc_folder()
    if nvcc:
        flags.append(f"--xla_gpu_cuda_data_dir={nvcc}")
    os.environ["XLA_FLAGS"] = " ".join(flags)


def nvcc_folder() -> Path | None:
    """The CUDA compiler's folder, in the package ``nvidia-cuda-nvcc-cu12``."""
    folders = (Path(entry) / "nvidia" / "cuda_nvcc" for entry in sys.path)
    return next((folder for folder in folders if (folder / "bin" / "ptxas").exists()), None)


def devices(machine: str) -> list[jax.Device]:
    """The devices of a described machine.

    Args:
      machine: one of ``GPUS``, or a TPU topology such as ``v5e:2x4``.

    Raises:
      UserError: there is no such machine, or its compiler is not installed.
    """
    if not is_gpu(machine):
        try:
            return list(topology_mesh(machine).devices.flat)
        except UserError as error:
            raise UserError(f"{error}; a card is {' or '.join(GPUS)}") from None
    try:
        described = topologies.get_topology_desc(
            platform="cuda", target_config=_GPU.format(**GPUS[machine]), topology="1x1x1"
        )
    except Exception as error:  # the plugin's own errors have no common class
        first = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"{machine} cannot be described ({first}); it needs "
            "benchmarks/requirements-compiled.txt"
        ) from None
    return list(described.devices)
