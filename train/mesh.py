"""The devices of a run as one mesh, and how arrays lie on it."""

import functools
from typing import Any, Literal

import jax
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

DATA_AXIS = "data"

Layout = Literal["replicated", "sharded"]


def data_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh with one axis, ``data``, over all devices, those of a process side by side."""
    devices = devices or jax.devices()
    # By process, which jax.make_mesh does not promise: so each one's rows of a batch are one slice.
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    return Mesh(np.asarray(ordered), (DATA_AXIS,), axis_types=(AxisType.Auto,))


def by_step_and_row(mesh: Mesh) -> NamedSharding:
    """``[K, B, ...]``: every device has its rows of each of K batches."""
    return NamedSharding(mesh, P(None, DATA_AXIS))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds all of it."""
    return NamedSharding(mesh, P())


def divided_axis(shape: tuple[int, ...], num_devices: int, layout: Layout) -> int | None:
    """Along which axis an array of the state is divided: its longest that divides evenly, or none.

    A function of the shape, so that the moments of Adam lie where their parameters do.
    """
    if layout == "replicated" or num_devices == 1:
        return None
    even = [axis for axis, size in enumerate(shape) if size and size % num_devices == 0]
    return max(even, key=lambda axis: shape[axis], default=None)


def spec(leaf: Any, mesh: Mesh, layout: Layout) -> P:
    """Which axis of an array the mesh divides; see ``divided_axis``."""
    axis = divided_axis(leaf.shape, mesh.size, layout)
    return P() if axis is None else P(*[None] * axis, DATA_AXIS)


def shardings(tree: Any, mesh: Mesh, layout: Layout) -> Any:
    """How each array of a state lies on the mesh."""
    return jax.tree.map(lambda leaf: NamedSharding(mesh, spec(leaf, mesh, layout)), tree)


def placed(values: np.ndarray, sharding: NamedSharding) -> Array:
    """An array that every process has whole, of which each device takes its part."""
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


def on_host(tree: Any) -> Any:
    """Whole copies of arrays that may be divided among devices of several processes.

    Every process must call it.
    """

    def copy(leaf: Array) -> np.ndarray:
        if not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(copy, tree)


YNN_FOR_PRODUCTS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT"}
"""XLA's default (jaxlib 0.10.2) hands sums to YNN as well, where the sum over a batch that is the
gradient of a gain takes as long as a product of matrices (docs/performance.md)."""


def compiler_options(mesh: Mesh) -> dict[str, str]:
    """Options for ``jax.jit`` of a program on these devices."""
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return YNN_FOR_PRODUCTS if on_cpu and _known(**YNN_FOR_PRODUCTS) else {}


@functools.cache
def _known(**options: str) -> bool:
    """Whether this version of XLA takes the options."""
    try:
        jax.jit(lambda x: x, compiler_options=options).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
