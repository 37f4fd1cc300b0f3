"""From a run's folder to a model that can be applied: what evaluation and sampling start from."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh

from fsn_jax import FSN, Transformer
from train.checkpoint import Checkpoints
from train.config import ExperimentConfig
from train.data.corpus import Corpus
from train.data.prepare import open_corpus
from train.data.vocabulary import Vocabulary
from train.errors import UserError
from train.mesh import data_mesh
from train.optimizer import make_optimizer
from train.run import RunFolder, open_run, refuse_other_data
from train.step import abstract_state, build_model


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """What it takes to continue a text.

    Attributes:
      model: the Flax module.
      params: its parameters.
      vocabulary: what its tokens stand for.
      context: the longest window it was trained on, in tokens.
      corpus_name: of the text that the vocabulary is of.
    """

    model: FSN | Transformer
    params: Any
    vocabulary: Vocabulary
    context: int
    corpus_name: str

    def encode(self, text: bytes) -> npt.NDArray[np.int32]:
        """The tokens of a text; see ``Vocabulary.encode``."""
        return self.vocabulary.encode(text, source=self.corpus_name)


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A model of a run at one checkpoint.

    Attributes:
      run: its folder.
      experiment: its settings.
      corpus: the data it was trained on.
      model: the Flax module.
      params: its parameters.
      step: of the checkpoint.
      mesh: where the parameters are.
    """

    run: RunFolder
    experiment: ExperimentConfig
    corpus: Corpus
    model: FSN | Transformer
    params: Any
    step: int
    mesh: Mesh

    @property
    def language_model(self) -> LanguageModel:
        """Without the run and its data."""
        return LanguageModel(
            model=self.model,
            params=self.params,
            vocabulary=self.corpus.codec,
            context=self.experiment.data.context,
            corpus_name=self.corpus.name,
        )


def open_experiment_corpus(experiment: ExperimentConfig) -> Corpus:
    """The corpus of an experiment, prepared if need be."""
    data = experiment.data
    return open_corpus(
        name=data.name, path=data.path, cache_dir=data.cache_dir, unit=data.vocabulary
    )


def load(run_dir: str | Path, *, which: str = "best") -> TrainedModel:
    """Loads a run.

    Args:
      run_dir: its folder.
      which: ``best`` (lowest validation loss; the latest if none was evaluated), ``latest``, or a
        step.

    Raises:
      UserError: there is no run, no such checkpoint, or the corpus is not the run's.
    """
    run = open_run(run_dir)
    experiment = run.read_config()
    corpus = open_experiment_corpus(experiment)
    refuse_other_data(run, corpus)
    mesh = data_mesh()
    model = build_model(experiment.model)
    optimizer = make_optimizer(experiment.optimizer, experiment.training.num_steps)
    if not run.checkpoints.is_dir():
        raise _no_checkpoint(run)
    with Checkpoints(run.checkpoints, experiment.checkpoints, read_only=True) as checkpoints:
        step = _choose(checkpoints, which, run)
        state = checkpoints.restore(step, abstract_state(model, optimizer, mesh=mesh))
    return TrainedModel(run, experiment, corpus, model, state.params, step, mesh)


def _choose(checkpoints: Checkpoints, which: str, run: RunFolder) -> int:
    latest = checkpoints.latest()
    if latest is None:
        raise _no_checkpoint(run)
    if which == "latest":
        return latest
    if which == "best":
        return checkpoints.best() or latest
    steps = checkpoints.all_steps()
    if not which.isdigit() or int(which) not in steps:
        raise UserError(
            f"--checkpoint must be best, latest or a step among "
            f"{', '.join(map(str, steps))}; got {which!r}"
        )
    return int(which)


def _no_checkpoint(run: RunFolder) -> UserError:
    return UserError(f"the run {run.path} has no checkpoint yet: train it as far as its first one")
