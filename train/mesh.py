"""The mesh over the devices of a run, and the shardings of arrays on it."""

import functools
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from train.settings import Layout

DATA_AXIS = "data"


def data_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """Returns a mesh with one axis, ``data``, over all devices, ordered by process."""
    devices = devices or jax.devices()
    # By process, which jax.make_mesh does not promise: so each one's rows of a batch are one slice.
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    return Mesh(np.asarray(ordered), (DATA_AXIS,), axis_types=(AxisType.Auto,))


def by_step_and_row(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of ``[K, B, ...]``: each device holds its rows of each of K batches."""
    return NamedSharding(mesh, P(None, DATA_AXIS))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding with a full copy on every device."""
    return NamedSharding(mesh, P())


def divided_axis(shape: tuple[int, ...], num_devices: int, layout: Layout) -> int | None:
    """Returns the axis to shard: the longest that divides evenly, or None.

    It depends on the shape alone, so that the optimizer's moments are sharded as their parameters
    are.
    """
    if layout == "replicated" or num_devices == 1:
        return None
    even = [axis for axis, size in enumerate(shape) if size and size % num_devices == 0]
    return max(even, key=lambda axis: shape[axis], default=None)


def spec(leaf: Any, mesh: Mesh, layout: Layout) -> P:
    """Returns the PartitionSpec of an array; see ``divided_axis``."""
    axis = divided_axis(leaf.shape, mesh.size, layout)
    return P() if axis is None else P(*[None] * axis, DATA_AXIS)


def shardings(tree: Any, mesh: Mesh, layout: Layout) -> Any:
    """Returns the sharding of each array of a state."""
    return jax.tree.map(lambda leaf: NamedSharding(mesh, spec(leaf, mesh, layout)), tree)


def gathered(params: Any, axes: list[int | None]) -> Any:
    """Gathers sharded parameters; inside ``shard_map``."""
    leaves, structure = jax.tree.flatten(params)
    whole = [
        leaf if axis is None else jax.lax.all_gather(leaf, DATA_AXIS, axis=axis, tiled=True)
        for leaf, axis in zip(leaves, axes, strict=True)
    ]
    return jax.tree.unflatten(structure, whole)


def averaged(mean: Any, axes: list[int | None]) -> Any:
    """Averages gradients over the devices and shards them; inside ``shard_map``."""
    leaves, structure = jax.tree.flatten(mean)
    # One all-reduce takes all the undivided arrays.
    undivided = iter(
        jax.lax.pmean([x for x, a in zip(leaves, axes, strict=True) if a is None], DATA_AXIS)
    )
    devices = jax.lax.axis_size(DATA_AXIS)
    means = [
        next(undivided)
        if axis is None
        else jax.lax.psum_scatter(leaf, DATA_AXIS, scatter_dimension=axis, tiled=True) / devices
        for leaf, axis in zip(leaves, axes, strict=True)
    ]
    return jax.tree.unflatten(structure, means)


def placed(values: np.ndarray, sharding: NamedSharding) -> Array:
    """Puts an array, which every process holds completely, on the devices with a sharding."""
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


def on_host(tree: Any) -> Any:
    """Returns full copies of arrays that may be sharded over several processes.

    Every process must call this.
    """

    def copy(leaf: Array) -> np.ndarray:
        if not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(copy, tree)


YNN_FOR_PRODUCTS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT"}
"""Keeps sums in XLA. By default (jaxlib 0.10.2) the library YNN computes them; there the sum over a
batch that is the gradient of a gain takes as long as a matrix product (docs/performance.md)."""


def compiler_options(mesh: Mesh) -> dict[str, str]:
    """Returns the compiler options for ``jax.jit`` on these devices."""
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return YNN_FOR_PRODUCTS if on_cpu and _known(**YNN_FOR_PRODUCTS) else {}


@functools.cache
def _known(**options: str) -> bool:
    """Whether this version of XLA accepts the options."""
    try:
        jax.jit(lambda x: x, compiler_options=options).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
