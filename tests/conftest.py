"""Strict surroundings for every test: eight CPU devices, no silent broadcasting.

Warnings are errors and shapes are checked at run time, both set in pyproject.toml.
"""

import os

import jax
import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Settles JAX's platform before any test module is imported."""
    marks = config.getoption("markexpr", default="")
    if "gpu" not in marks or "not gpu" in marks:
        # In the environment too, so that the programs a test starts stay on the CPU; the number
        # of devices is not, so that they see one device, as a user's would.
        os.environ["JAX_PLATFORMS"] = "cpu"
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_numpy_rank_promotion", "raise")
