"""Loads a model from a run's folder, for evaluation and sampling."""

import dataclasses
from pathlib import Path
from typing import Any

import optax
from jax.sharding import Mesh

from fsn_jax import FSN, Transformer
from fsn_jax.hub import Pretrained, build_model
from fsn_jax.vocabulary import Vocabulary
from train.bucket import is_remote
from train.checkpoint import Checkpoints
from train.config import ExperimentConfig
from train.data.corpus import Corpus
from train.data.pinned import PINNED
from train.data.prepare import open_corpus
from train.errors import UserError
from train.files import user_path
from train.mesh import data_mesh
from train.run import RunFolder, open_run, refuse_other_data
from train.run_files import VOCABULARY
from train.step import abstract_state


@dataclasses.dataclass(frozen=True)
class RunModel:
    """A run's model at one checkpoint, without the run's data.

    Attributes:
      run: the run's folder.
      experiment: the run's settings.
      vocabulary: of its data.
      model: the Flax module.
      params: its parameters, laid out as in training.
      step: step of the checkpoint.
      mesh: the devices that hold the parameters.
    """

    run: RunFolder
    experiment: ExperimentConfig
    vocabulary: Vocabulary
    model: FSN | Transformer
    params: Any
    step: int
    mesh: Mesh

    @property
    def source(self) -> dict[str, Any]:
        """Describes the checkpoint: what results of its analysis record."""
        return {
            "run": self.run.path.name,
            "seed": self.experiment.seed,
            "step": self.step,
            "parameters": self.experiment.model.num_params(),
            "characters": self.step * self.experiment.characters_per_step,
            "commit": self.run.read_provenance()[0]["git"]["commit"],
        }

    @property
    def data_sha256(self) -> str:
        """The identity of the data that the run began with."""
        return str(self.run.read_provenance()[0]["data"]["sha256"])

    @property
    def language_model(self) -> Pretrained:
        """The model alone."""
        return pretrained(self.experiment, self.params, self.vocabulary)


@dataclasses.dataclass(frozen=True)
class TrainedModel(RunModel):
    """A run's model at one checkpoint, and the run's data.

    Attributes:
      corpus: the data that the model was trained on.
    """

    corpus: Corpus


def pretrained(experiment: ExperimentConfig, params: Any, vocabulary: Vocabulary) -> Pretrained:
    """Returns a run's model with parameters, without the run and its data."""
    return Pretrained(
        model=build_model(experiment.model),
        params=params,
        vocabulary=vocabulary,
        context=experiment.data.context,
        corpus_name=experiment.data.name,
        separator=experiment.data.separator(vocabulary),
    )


def open_experiment_corpus(experiment: ExperimentConfig) -> Corpus:
    """Opens the corpus of an experiment; prepares it first if needed."""
    data = experiment.data
    return open_corpus(
        name=data.name, path=data.path, cache_dir=data.cache_dir, unit=data.vocabulary
    )


def load(run_dir: str | Path, *, which: str = "best", data_path: str = "") -> TrainedModel:
    """Loads the model of a run, and its data.

    Args:
      run_dir: folder of the run.
      which: ``best`` (lowest validation loss; the latest if none was evaluated), ``latest``, or a
        step.
      data_path: where the data is now; empty if it is where it was.

    Raises:
      UserError: the run or the checkpoint does not exist, or the corpus is not the run's.
    """
    run = open_run(run_dir)
    experiment = run.read_config()
    experiment = with_data_at(experiment, data_path)
    try:
        corpus = open_experiment_corpus(experiment)
    except UserError as error:
        if data_path or not experiment.data.path:
            raise
        raise UserError(f"{error}; if the data of {run.path} has moved, say --data_path") from None
    refuse_other_data(run, corpus)
    found = _restored(run, experiment, corpus.vocabulary, which)
    return TrainedModel(**vars(found), corpus=corpus)


def with_data_at(experiment: ExperimentConfig, data_path: str) -> ExperimentConfig:
    """Returns the settings of a run with its data where it is now.

    Args:
      experiment: as recorded.
      data_path: as of ``load``. Empty, a corpus whose content is known by its hash needs what it
        was prepared from no more.
    """
    path = data_path or experiment.data.path
    if not data_path and experiment.data.name in PINNED and not is_remote(path):
        path = path if user_path("config.data.path", path).exists() else ""
    return dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, path=path))


def load_without_data(run_dir: str | Path, *, which: str = "best", data_path: str = "") -> RunModel:
    """Loads the model of a run without its data, which only runs of earlier versions need.

    Args:
      run_dir: as of ``load``.
      which: as of ``load``.
      data_path: as of ``load``; not looked at if the run does not need its data.

    Raises:
      UserError: the run or the checkpoint does not exist.
    """
    run = open_run(run_dir)
    vocabulary = run.read_vocabulary()
    if vocabulary is None:
        return load(run_dir, which=which, data_path=data_path)
    experiment = run.read_config()
    if len(vocabulary) != experiment.model.vocab_size:
        raise UserError(
            f"{run.path / VOCABULARY} holds {len(vocabulary)} tokens, and the model of the run has "
            f"{experiment.model.vocab_size}; restore it, or remove it to take them from the data"
        )
    return _restored(run, experiment, vocabulary, which)


def _restored(
    run: RunFolder, experiment: ExperimentConfig, vocabulary: Vocabulary, which: str
) -> RunModel:
    """Returns the model with its parameters at a checkpoint."""
    mesh = data_mesh()
    # Its parameters have the same shapes, and no kernel is measured for them.
    shapes = build_model(dataclasses.replace(experiment.model, implementation="xla"))
    if not run.checkpoints.is_dir():
        raise _no_checkpoint(run)
    layout = experiment.training.layout
    with Checkpoints(run.checkpoints, experiment.checkpoints, read_only=True) as checkpoints:
        step = _choose(checkpoints, which, run)
        like = abstract_state(shapes, optax.identity(), mesh=mesh, layout=layout)
        params = checkpoints.restore_params(step, like.params)
    model = build_model(experiment.model)
    return RunModel(run, experiment, vocabulary, model, params, step, mesh)


def _choose(checkpoints: Checkpoints, which: str, run: RunFolder) -> int:
    latest = checkpoints.latest()
    if latest is None:
        raise _no_checkpoint(run)
    if which == "latest":
        return latest
    if which == "best":
        return checkpoints.best() or latest
    steps = checkpoints.all_steps()
    if not which.isdecimal() or int(which) not in steps:
        raise UserError(
            f"--checkpoint must be best, latest or a step among "
            f"{', '.join(map(str, steps))}; got {which!r}"
        )
    return int(which)


def _no_checkpoint(run: RunFolder) -> UserError:
    return UserError(
        f"the run {run.path} has no checkpoint: train it as far as its first one, or, if this is a "
        f"record under results/, name the run's own folder"
    )
