"""How a run is laid out on its devices: their shares of a batch, and the step that they compile."""

import math
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax

from fsn_jax import FSN, Transformer
from fsn_jax.hub import build_model
from train.config import ExperimentConfig
from train.data.corpus import Corpus
from train.data.windows import WindowOrder, check_evaluation, check_placement
from train.errors import UserError
from train.kernel_choice import with_implementation
from train.mesh import by_step_and_row, replicated
from train.step import make_train_steps

CACHED_TOKENS = 256
"""Number of tokens in a part of a batch on a CPU; the fastest measured, see docs/performance.md."""


def cpu_devices(experiment: ExperimentConfig, num_cores: int) -> int:
    """Returns the number of CPU devices: one a core, or fewer so that they divide the batches."""
    training, evaluation = experiment.training, experiment.evaluation
    rows = training.batch_size // max(1, training.accumulation_steps)
    together = math.gcd(rows, evaluation.batch_size)
    return max(n for n in range(1, num_cores + 1) if together % n == 0)


def parts_of_batch(experiment: ExperimentConfig, mesh: jax.sharding.Mesh) -> int:
    """Returns the number of parts in which a device processes its windows of a batch."""
    training = experiment.training
    if training.accumulation_steps or mesh.devices.flat[0].platform != "cpu":
        return max(1, training.accumulation_steps)
    rows = training.batch_size // mesh.size
    fitting = max(1, CACHED_TOKENS // experiment.data.context)
    return min(
        parts for parts in range(1, rows + 1) if rows % parts == 0 and rows // parts <= fitting
    )


def check_devices(experiment: ExperimentConfig, num_devices: int) -> None:
    """Raises UserError unless every device gets an equal share of each batch."""
    training, evaluation = experiment.training, experiment.evaluation
    parts = max(1, training.accumulation_steps)
    if training.batch_size % (num_devices * parts):
        raise UserError(
            f"config.training.batch_size must be a multiple of {num_devices} devices times "
            f"config.training.accumulation_steps ({parts}); "
            f"got {training.batch_size}"
        )
    if evaluation.batch_size % num_devices:
        raise UserError(
            f"config.evaluation.batch_size must be a multiple of the {num_devices} devices; "
            f"got {evaluation.batch_size}"
        )


def check_experiment(experiment: ExperimentConfig, corpus: Corpus, num_devices: int) -> None:
    """Checks the settings against the corpus and the devices, before anything is written.

    Raises:
      UserError: a batch does not divide, a split is too short for a window, or the corpus does not
        fit ``data.placement`` or ``data.segments``.
    """
    experiment.data.separator(corpus.vocabulary)
    check_devices(experiment, num_devices)
    check_placement(experiment.data.placement, corpus.num_tokens("train"))
    window_order(experiment, corpus)
    held_out = corpus.num_tokens("validation")
    check_evaluation(
        min(held_out, experiment.evaluation.num_tokens or held_out), experiment.data.context
    )


def window_order(experiment: ExperimentConfig, corpus: Corpus) -> WindowOrder:
    """Returns the order of the training windows."""
    return WindowOrder(
        corpus.num_tokens("train"),
        experiment.data.context,
        experiment.training.batch_size,
        experiment.seed,
    )


def model_for(
    experiment: ExperimentConfig, mesh: jax.sharding.Mesh, *, rows: int = 0
) -> FSN | Transformer:
    """Returns the run's model, with the faster path of the causal sum on the mesh.

    ``rows`` is the number of sequences that a device takes at once; 0: that of a train step.
    """
    if not rows:
        rows = experiment.training.batch_size // mesh.size // parts_of_batch(experiment, mesh)
    model = with_implementation(
        experiment.model,
        mesh,
        rows=rows,
        context=experiment.data.context,
        segments=experiment.data.segments != "none",
    )
    return build_model(model)


def train_steps_of(
    experiment: ExperimentConfig,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    *,
    separator: int | None = None,
) -> jax.stages.Wrapped:
    """Calls ``make_train_steps`` with the settings of an experiment.

    ``separator`` is what ``DataConfig.separator`` returns for the corpus.
    """
    return make_train_steps(
        model,
        optimizer,
        mesh=mesh,
        context=experiment.data.context,
        placement=experiment.data.placement,
        accumulation_steps=parts_of_batch(experiment, mesh),
        log_every=experiment.training.log_every,
        layout=experiment.training.layout,
        dropout_seed=experiment.seed if experiment.model.dropout else None,
        separator=separator,
    )


def abstract_inputs(
    experiment: ExperimentConfig, mesh: jax.sharding.Mesh, *, num_tokens: int, dtype: np.dtype[Any]
) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Returns shapes, dtypes and shardings of what the train step takes after the state.

    They are ``[K, B, L + 1]`` windows, or the corpus and the ``[K, B]`` offsets of windows in it;
    see ``make_train_steps``.

    Args:
      experiment: the settings.
      mesh: the devices.
      num_tokens: of the training split.
      dtype: of a token, ``Vocabulary.dtype``.
    """
    training, context = experiment.training, experiment.data.context
    by_rows = by_step_and_row(mesh)
    rows = (training.steps_per_dispatch, training.batch_size)
    if experiment.data.placement == "host":
        return (jax.ShapeDtypeStruct((*rows, context + 1), dtype, sharding=by_rows),)
    return (
        jax.ShapeDtypeStruct((num_tokens,), dtype, sharding=replicated(mesh)),
        jax.ShapeDtypeStruct(rows, np.int32, sharding=by_rows),
    )
