"""Adam, or Muon for the matrices of the blocks, with decay, warm-up, cosine, clipping, and groups.

Muon (K. Jordan and others, 2024; Optax' implementation) replaces a matrix's momentum by the nearest
orthogonal matrix. Scaled to the root mean square of a typical Adam update (J. Liu and others, arXiv
2502.16982) it works with the learning rate and decay of Adam.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array
from optax import contrib

from train.config import OptimizerConfig
from train.groups import (
    ANGLES,
    DECAYED,
    GATES,
    KERNELS,
    MATRICES,
    TABLES,
    VECTORS,
    group_of,
    groups,
)
from train.packing import pack, unpack

MUON_RMS = 0.2
"""Root mean square of Muon's direction; Adam's is 0.2 to 0.4."""

LARGEST_JOINT_STACK = 2**22
"""Numbers up to which an accelerator takes all matrices in one stack, padded with zeros."""


def learning_rate_factors(config: OptimizerConfig) -> dict[str, float]:
    """Returns each group's learning rate relative to that of the matrices."""
    return {
        ANGLES: config.angle_factor,
        KERNELS: config.kernel_factor,
        GATES: config.gate_factor,
        MATRICES: 1.0,
        TABLES: 1.0,
        VECTORS: 1.0,
    }


def learning_rate(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Returns a schedule: linear warm-up, then a cosine to ``final_fraction`` of the peak."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.peak_learning_rate,
        warmup_steps=min(config.warmup_steps, num_steps - 1),
        decay_steps=num_steps,
        end_value=config.peak_learning_rate * config.final_fraction,
    )


def make_optimizer(
    config: OptimizerConfig, num_steps: int, *, mesh: Mesh | None = None
) -> optax.GradientTransformation:
    """Builds the optimizer of a run: clip, Adam or Muon, decay, group factors, schedule.

    Args:
      config: settings of the optimizer.
      num_steps: number of steps in the run, for the schedule.
      mesh: the devices of the run. CPUs share Muon's work. On accelerators each device does all of
        it, which takes less time than the messages would. The state is the same either way.
    """
    factors = learning_rate_factors(config)
    decayed: Callable[[Any], Any] = lambda params: jax.tree.map(  # noqa: E731
        lambda group: group in DECAYED, groups(params)
    )
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        _direction(config, mesh),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
        optax.stateless(
            lambda updates, _: jax.tree_util.tree_map_with_path(
                lambda path, update: update * factors[group_of(path)], updates
            )
        ),
        optax.scale_by_learning_rate(learning_rate(config, num_steps)),
    )


def _direction(config: OptimizerConfig, mesh: Mesh | None) -> optax.GradientTransformation:
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)
    if config.matrices == "adam":
        return adam
    muon = contrib.scale_by_muon(
        beta=config.muon_beta,
        weight_dimension_numbers=lambda stacks: jax.tree.map(
            lambda _: contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2), stacks
        ),
    )
    to_rms = optax.stateless(
        lambda stacks, _: jax.tree.map(
            lambda stack: stack * MUON_RMS * max(stack.shape[1:]) ** 0.5, stacks
        )
    )
    if mesh is not None and mesh.devices.flat[0].platform != "cpu":
        mesh, muon = None, _in_one_stack(muon)
    in_stacks = _in_stacks(optax.chain(muon, to_rms), mesh)

    def labels(params: Any) -> Any:
        return jax.tree.map(lambda group: "muon" if group == MATRICES else "adam", groups(params))

    return optax.partition({"muon": in_stacks, "adam": adam}, labels)


def _in_stacks(
    muon: optax.GradientTransformation, mesh: Mesh | None
) -> optax.GradientTransformation:
    """Muon on one stack of matrices for each shape, wide and tall ones together.

    A few large products replace many small ones. The devices of a mesh divide the matrices of a
    stack among them. The state is packed as the updates are, or not.
    """
    shares = P(mesh.axis_names) if mesh else P()

    def placed(stacks: Any, spec: P) -> Any:
        if mesh is None:
            return stacks
        return jax.lax.with_sharding_constraint(stacks, NamedSharding(mesh, spec))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        of_muon, scale = state
        mean = placed(pack(of_muon.mu), shares)
        turned, (of_muon, scale) = muon.update(
            placed(pack(updates), shares), (of_muon._replace(mu=mean), scale)
        )
        mean = unpack(placed(of_muon.mu, P()), updates)
        return unpack(placed(turned, P()), updates), (of_muon._replace(mu=mean), scale)

    return optax.GradientTransformation(muon.init, update)


def _in_one_stack(muon: optax.GradientTransformation) -> optax.GradientTransformation:
    """Muon on all stacks at once, the smaller matrices padded with zeros.

    Small matrices take an accelerator no longer than launching their kernels. Rows and columns of
    zeros stay zero, for each product of the iteration is one of the matrix with its own transpose.
    """

    def joined(stacks: Any) -> Array:
        rows, columns = _largest_sides(stacks)
        return jnp.concatenate(
            [
                jnp.pad(stack, ((0, 0), (0, rows - stack.shape[1]), (0, columns - stack.shape[2])))
                for stack in jax.tree.leaves(stacks)
            ]
        )

    def parted(joint: Array, like: Any) -> Any:
        stacks, structure = jax.tree.flatten(like)
        ends = itertools.accumulate(map(len, stacks))
        parts = [
            joint[end - len(stack) : end, : stack.shape[1], : stack.shape[2]]
            for end, stack in zip(ends, stacks, strict=True)
        ]
        return jax.tree.unflatten(structure, parts)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        num_matrices = sum(map(len, jax.tree.leaves(updates)))
        if num_matrices * math.prod(_largest_sides(updates)) > LARGEST_JOINT_STACK:
            return muon.update(updates, state)
        turned, after = muon.update(joined(updates), state._replace(mu=joined(state.mu)))
        return parted(turned, updates), after._replace(mu=parted(after.mu, updates))

    return optax.GradientTransformation(muon.init, update)


def _largest_sides(stacks: Any) -> tuple[int, int]:
    shapes = [stack.shape for stack in jax.tree.leaves(stacks)]
    return max(shape[1] for shape in shapes), max(shape[2] for shape in shapes)
