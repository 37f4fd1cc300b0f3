"""``--config.init_from=FOLDER``: begins a run with the parameters of an exported model.

The two models are the same up to their vocabularies. A token takes the parameters of its byte or
character in the exported model; one that the other does not have keeps those it was given at
random. The optimizer begins anew.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from fsn_jax import hub
from fsn_jax.hub import build_model
from fsn_jax.vocabulary import Vocabulary
from train.config import ExperimentConfig
from train.errors import UserError
from train.files import file_sha256, user_path
from train.mesh import on_host, placed
from train.processes import agree, together

MAY_DIFFER = frozenset({"vocab_size", "dropout", "dtype", "implementation", "remat"})
"""Settings that may differ: the vocabulary, and those that change a result by rounding, or in
training only."""


class Beginning(NamedTuple):
    """What a run begins with.

    Attributes:
      params: on the devices of the run.
      weights_sha256: of the file that they are from.
      new_tokens: tokens that the exported model does not have, as Python writes them.
    """

    params: Any
    weights_sha256: str
    new_tokens: list[str]


def check_init_from(experiment: ExperimentConfig, vocabulary: Vocabulary) -> None:
    """Checks what ``init_from`` names, if it names anything, without its weights.

    Args:
      experiment: the settings.
      vocabulary: of the run's corpus.

    Raises:
      UserError: it is no exported model, or another one than the run trains.
    """
    if not experiment.init_from:
        return
    setting = f"config.init_from={experiment.init_from}"
    folder = user_path("config.init_from", experiment.init_from)
    if not hub.is_exported(folder):
        raise UserError(
            f"{setting} holds no exported model: name one of pretrained/, or the folder that "
            f"`python -m train export RUN FOLDER` wrote"
        )
    try:
        described = hub.describe(folder)
    except ValueError as error:
        raise UserError(f"{setting}: {error}") from error
    if type(described.config) is not type(experiment.model):
        raise UserError(
            f"config.model.architecture is {experiment.architecture}, and the model of {setting} "
            f"another: take its settings with --config=configs/finetune.py:FOLDER"
        )
    ours, theirs = map(dataclasses.asdict, (experiment.model, described.config))
    for name in ours:
        if name not in MAY_DIFFER and ours[name] != theirs[name]:
            raise UserError(
                f"config.model.{name} is {ours[name]!r}, and {theirs[name]!r} in {setting}: take "
                f"its settings with --config=configs/finetune.py:FOLDER"
            )
    if (unit := described.vocabulary.unit) != vocabulary.unit:
        raise UserError(
            f"config.data.vocabulary is {vocabulary.unit}, and the tokens of {setting} are {unit}: "
            f"set it to {unit}"
        )


def new_tokens(known: Vocabulary, vocabulary: Vocabulary) -> list[str]:
    """Returns the tokens of a vocabulary that another does not have, as Python writes them."""
    values = np.setdiff1d(vocabulary.values, known.values).tolist()
    return [repr(bytes([value]) if vocabulary.unit == "bytes" else chr(value)) for value in values]


def begin(experiment: ExperimentConfig, vocabulary: Vocabulary, fresh: Any) -> Beginning:
    """Returns what a run with ``init_from`` begins with.

    Args:
      experiment: the settings.
      vocabulary: of the run's corpus.
      fresh: the parameters of the run's own initialisation, on its devices.

    Raises:
      UserError: as of ``check_init_from``, or the weights are damaged, or not the same in every
        process.
    """
    source, sha256 = together(lambda: _read(experiment, vocabulary))
    agree(weights_of_init_from=sha256)
    of_both = np.intersect1d(vocabulary.values, source.vocabulary.values)
    ours, theirs = (np.searchsorted(v.values, of_both) for v in (vocabulary, source.vocabulary))
    axes, given = _vocabulary_axes(experiment, fresh), flatten_dict(source.params)

    def of_leaf(path: tuple[str, ...], own: Any) -> jax.Array:
        values, axis = np.asarray(given[path]), axes[path]
        if axis is not None:
            tokens = np.moveaxis(values, axis, 0)[theirs]
            values = np.array(on_host(own))
            np.moveaxis(values, axis, 0)[ours] = tokens
        return placed(values, own.sharding)

    begun = {path: of_leaf(path, own) for path, own in flatten_dict(fresh).items()}
    return Beginning(unflatten_dict(begun), sha256, new_tokens(source.vocabulary, vocabulary))


def _read(experiment: ExperimentConfig, vocabulary: Vocabulary) -> tuple[hub.Pretrained, str]:
    """Returns the exported model and the SHA-256 of its weights."""
    check_init_from(experiment, vocabulary)
    folder = user_path("config.init_from", experiment.init_from)
    try:
        return hub.load(folder), file_sha256(folder / hub.WEIGHTS)
    except (OSError, ValueError) as error:
        raise UserError(f"config.init_from={experiment.init_from}: {error}") from error


def _vocabulary_axes(experiment: ExperimentConfig, params: Any) -> dict[Any, int | None]:
    """Returns the axis of each parameter that grows with the vocabulary, by its path."""
    config = experiment.model
    changes: dict[str, Any] = {"vocab_size": config.vocab_size + 1, "implementation": "xla"}
    larger = build_model(dataclasses.replace(config, **changes))
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    grown = flatten_dict(jax.eval_shape(larger.init, jax.random.key(0), tokens)["params"])
    return {
        path: next((axis for axis, n in enumerate(own.shape) if n != grown[path].shape[axis]), None)
        for path, own in flatten_dict(params).items()
    }
