"""AdamW with warm-up and cosine decay, clipping, and parameter groups chosen by path."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from train.config import OptimizerConfig

ANGLES, KERNELS, GATES, MATRICES, VECTORS = "angles", "kernels", "gates", "matrices", "vectors"

_GROUP_OF_LEAF = {
    "angles": ANGLES,
    "kernel_real": KERNELS,
    "kernel_imag": KERNELS,
    "gain": KERNELS,
    "modes_real": KERNELS,
    "modes_imag": KERNELS,
    "gate": GATES,
    "quadrature": GATES,
    "log_beta": GATES,
    "kernel": MATRICES,
    "embedding": MATRICES,
    "bias": VECTORS,
    "scale": VECTORS,
}


def group_of(path: tuple[Any, ...]) -> str:
    """The group of a parameter.

    Args:
      path: its path in the parameter tree, as ``jax.tree_util`` gives it.

    Raises:
      KeyError: a parameter that no group knows, which a new layer must decide.
    """
    names = [str(getattr(entry, "key", entry)) for entry in path]
    if any(name in ("query_gate", "key_gate") for name in names):
        return GATES
    return _GROUP_OF_LEAF[names[-1]]


def groups(params: Any) -> Any:
    """The tree of groups of a parameter tree."""
    return jax.tree_util.tree_map_with_path(lambda path, _: group_of(path), params)


def learning_rate_factors(config: OptimizerConfig) -> dict[str, float]:
    """Each group's learning rate over that of the matrices."""
    return {
        ANGLES: config.angle_factor,
        KERNELS: config.kernel_factor,
        GATES: config.gate_factor,
        MATRICES: 1.0,
        VECTORS: 1.0,
    }


def learning_rate(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Linear warm-up, then a cosine to ``final_fraction`` of the peak at the last step."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.peak_learning_rate,
        warmup_steps=min(config.warmup_steps, num_steps - 1),
        decay_steps=num_steps,
        end_value=config.peak_learning_rate * config.final_fraction,
    )


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """The optimizer of a run: clip, Adam, decay of matrices, group factors, schedule."""
    factors = learning_rate_factors(config)
    decayed: Callable[[Any], Any] = lambda params: jax.tree.map(  # noqa: E731
        lambda group: group == MATRICES, groups(params)
    )
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
        optax.stateless(
            lambda updates, _: jax.tree_util.tree_map_with_path(
                lambda path, update: update * factors[group_of(path)], updates
            )
        ),
        optax.scale_by_learning_rate(learning_rate(config, num_steps)),
    )
