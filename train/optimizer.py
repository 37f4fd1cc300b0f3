"""Adam, or Muon for the matrices of the blocks, with decay, warm-up, cosine, clipping, and groups.

Muon (K. Jordan and others, 2024; Optax' implementation) replaces a matrix's momentum by the nearest
orthogonal matrix. Scaled to the root mean square of a typical Adam update (J. Liu and others, arXiv
2502.16982) it works with the learning rate and decay of Adam.
"""

import itertools
import operator
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

ANGLES, KERNELS, GATES, VECTORS = "angles", "kernels", "gates", "vectors"
MATRICES, TABLES = "matrices", "tables"
DECAYED = (MATRICES, TABLES)

MUON_RMS = 0.2
"""Root mean square of Muon's direction; Adam's is 0.2 to 0.4."""

_GROUP_OF_LEAF = {
    "angles": ANGLES,
    "gate_angle": ANGLES,
    "kernel_real": KERNELS,
    "kernel_imag": KERNELS,
    "gain": KERNELS,
    "gate": GATES,
    "quadrature": GATES,
    "field_gain": GATES,
    "log_beta": GATES,
    "kernel": MATRICES,
    "modes_real": MATRICES,
    "modes_imag": MATRICES,
    **{f"{name}_{part}": MATRICES for name in ("gate", "up", "down") for part in ("real", "imag")},
    "embedding": TABLES,
    "key_shift": VECTORS,
    "query_shift": VECTORS,
    "bias": VECTORS,
    "scale": VECTORS,
}


def group_of(path: tuple[Any, ...]) -> str:
    """Returns the group of a parameter.

    Args:
      path: the parameter's path in the tree, as names or as ``jax.tree_util`` gives it.

    Raises:
      KeyError: no group contains the parameter; a new layer must choose one.
    """
    names = [str(getattr(entry, "key", entry)) for entry in path]
    group = _GROUP_OF_LEAF[names[-1]]
    return TABLES if group == MATRICES and names[0] == "readout" else group


def groups(params: Any) -> Any:
    """Returns the tree of groups of a parameter tree."""
    return jax.tree_util.tree_map_with_path(lambda path, _: group_of(path), params)


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
    if mesh is not None and mesh.devices.flat[0].platform != "cpu":
        mesh = None
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
    in_stacks = contrib.scale_by_muon(
        beta=config.muon_beta,
        weight_dimension_numbers=lambda stacks: jax.tree.map(
            lambda _: contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2), stacks
        ),
    )
    muon = optax.chain(
        _by_shape(in_stacks, mesh),
        optax.stateless(
            lambda updates, _: jax.tree.map(
                lambda update: update * MUON_RMS * max(update.shape) ** 0.5, updates
            )
        ),
    )

    def labels(params: Any) -> Any:
        return jax.tree.map(lambda group: "muon" if group == MATRICES else "adam", groups(params))

    return optax.partition({"muon": muon, "adam": adam}, labels)


def _by_shape(
    muon: optax.GradientTransformation, mesh: Mesh | None
) -> optax.GradientTransformation:
    """Muon on one stack of matrices for each shape, wide and tall ones together.

    A few large products replace many small ones. The devices of a mesh divide the matrices of a
    stack among them. The state holds no stacks.
    """
    shares = P(mesh.axis_names) if mesh else P()

    def placed(stacks: dict[str, Array], spec: P) -> dict[str, Array]:
        if mesh is None:
            return stacks
        return jax.lax.with_sharding_constraint(stacks, NamedSharding(mesh, spec))

    def sides(leaf: Array) -> tuple[int, int]:
        # A kernel of more axes, as Flax's attention has, is the squarest matrix that it can be.
        rows = itertools.accumulate(leaf.shape[:-1], operator.mul)
        best = min(rows, key=lambda n: abs(n - leaf.size // n))
        return best, leaf.size // best

    def shape_of(leaf: Array) -> str:
        return "x".join(map(str, sorted(sides(leaf))))

    def stacked(tree: Any) -> dict[str, Array]:
        by_shape: dict[str, list[Array]] = {}
        for leaf in jax.tree.leaves(tree):
            (rows, columns), matrix = sides(leaf), leaf.reshape(sides(leaf))
            by_shape.setdefault(shape_of(leaf), []).append(matrix if rows <= columns else matrix.T)
        return placed({shape: jnp.stack(group) for shape, group in by_shape.items()}, shares)

    def unstacked(stacks: dict[str, Array], like: Any) -> Any:
        left = {shape: iter(stack) for shape, stack in placed(stacks, P()).items()}

        def next_for(leaf: Array) -> Array:
            (rows, columns), matrix = sides(leaf), next(left[shape_of(leaf)])
            return (matrix if rows <= columns else matrix.T).reshape(leaf.shape)

        return jax.tree.map(next_for, like)  # goes through the leaves in the order of the stacks

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        turned, after = muon.update(stacked(updates), state._replace(mu=stacked(state.mu)))
        return unstacked(turned, updates), after._replace(mu=unstacked(after.mu, updates))

    return optax.GradientTransformation(muon.init, update)
