"""The settings of a run: a locked ConfigDict outside, frozen dataclasses inside, converted once.

A file under ``configs/`` builds a ConfigDict with ``experiment(...)``; the command line may change
any of its fields (``--config.model.num_layers=4``); ``ExperimentConfig.from_config_dict`` checks
all of them and is what the programs use. The parts and their defaults are in ``settings.py``.
"""

import dataclasses
import re
from typing import Any

from ml_collections import ConfigDict

from fsn_jax import FSNConfig, TransformerConfig
from fsn_jax.config import ARCHITECTURES, match_parameters
from fsn_jax.fields import ConfigError, check_fields
from train.bucket import is_remote
from train.data.suffix_match import LONGEST
from train.errors import UserError
from train.settings import (
    PARTS,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    OptimizerConfig,
    TrainingConfig,
)

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "EvaluationConfig",
    "ExperimentConfig",
    "ModelConfig",
    "OptimizerConfig",
    "TrainingConfig",
    "experiment",
]

ModelConfig = FSNConfig | TransformerConfig
LARGEST_BYTE_VOCABULARY = 256
WIDTHS = ("feedforward_width", "num_modes")

WITHOUT_EFFECT = frozenset(
    {
        "run_dir",
        "mirror_dir",
        "data.cache_dir",
        "data.path",
        "data.placement",
        "model.implementation",
        "model.remat",
        "training.accumulation_steps",
        "training.layout",
        "training.patience",
        "training.skipped_limit",
        "evaluation.batch_size",
        "checkpoints.keep",
    }
)
"""Settings that may change when a run resumes, for instance on another machine: they decide where
it lies, how long it trains, and by which operations it computes a step. The last bits may differ,
and with dropout the masks do if ``accumulation_steps`` does."""


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """All settings of a run.

    Attributes:
      name: name of the run, and of its folder under ``runs/``.
      run_dir: folder of the run; empty means ``runs/<name>``.
      seed: seed of the initial parameters and of the order of the data.
      architecture: name of the architecture that ``model`` configures.
      model: config of the model. A ``vocab_size`` of 0 in the ConfigDict means the corpus's. It is
        here the largest of a byte corpus, until ``with_vocabulary`` sets it.
      vocabulary_from_corpus: whether ``vocab_size`` was 0.
      data, optimizer, training, evaluation, checkpoints: see their classes.
      init_from: folder of an exported model whose parameters the run begins with; empty for random
        ones.
      mirror_dir: bucket (``gs://BUCKET/runs``) or folder that keeps a copy of the run's folder
        under the same name; empty for no copy.
      match: model whose number of parameters ``with_vocabulary`` gives to ``model``, by the width
        of its feed-forward, if that (one of WIDTHS) was 0 in the ConfigDict. Another width stands,
        and this is None.
    """

    name: str
    run_dir: str
    seed: int
    architecture: str
    model: ModelConfig
    vocabulary_from_corpus: bool
    data: DataConfig
    optimizer: OptimizerConfig
    training: TrainingConfig
    evaluation: EvaluationConfig
    checkpoints: CheckpointConfig
    init_from: str = ""
    mirror_dir: str = ""
    match: ModelConfig | None = None

    @classmethod
    def from_config_dict(cls, config: ConfigDict) -> "ExperimentConfig":
        """Converts a ConfigDict and checks every field.

        Raises:
          UserError: a field is missing, unknown, or has a value that cannot work.
        """
        fields = config.to_dict()
        try:
            model_fields = dict(fields.pop("model"))
            if match_fields := fields.pop("match", None):
                _, match = _build_model(match_fields, "match")
                open_widths = [name for name in WIDTHS if model_fields.get(name) == 0]
                for name in open_widths:
                    del model_fields[name]
                fields["match"] = match if open_widths else None
            if from_corpus := model_fields.get("vocab_size") == 0:
                model_fields["vocab_size"] = LARGEST_BYTE_VOCABULARY
            architecture, model = _build_model(model_fields, "model")
            experiment = cls(
                architecture=architecture,
                model=model,
                vocabulary_from_corpus=from_corpus,
                **{name: _build(part, fields.pop(name), name) for name, part in PARTS.items()},
                **fields,
            )
        except KeyError as error:
            raise UserError(f"config.{error.args[0]} is missing") from None
        except TypeError as error:
            raise UserError(f"the config has not the form of an experiment: {error}") from None
        experiment._check()
        return experiment

    def _check(self) -> None:
        try:
            check_fields(self)
        except ConfigError as error:
            raise UserError(str(error).replace("ExperimentConfig.", "config.")) from None
        if not 0 <= self.seed < 2**31:
            raise UserError(f"config.seed must be from 0 to 2**31 - 1; got {self.seed}")
        for setting, path, instead in (
            ("run_dir", self.run_dir, "keep a copy of the run there with config.mirror_dir"),
            ("data.cache_dir", self.data.cache_dir, "name a corpus there with config.data.path"),
        ):
            if is_remote(path):
                raise UserError(f"config.{setting}={path} is no folder of this machine: {instead}")
        if self.data.name in ("codeparrot", "text") and not self.data.path:
            raise UserError(
                f"config.data.name={self.data.name} needs a file or folder of yours: give it with "
                f"--config.data.path=FILE_OR_FOLDER"
            )
        if not re.fullmatch(r"[\w.+=-]*\w[\w.+=-]*", self.name):
            raise UserError(
                f"config.name must be a plain folder name of letters, digits and _ . + = -; "
                f"got {self.name!r}"
            )
        steps = self.training.steps_per_dispatch
        for part in ("evaluation", "checkpoints"):
            if (every := getattr(self, part).every) % steps:
                raise UserError(
                    f"config.{part}.every must be a multiple of config.training.steps_per_dispatch "
                    f"({steps}); got {every}"
                )
        if self.evaluation.stride > self.data.context:
            raise UserError(
                f"config.evaluation.stride must be at most config.data.context "
                f"({self.data.context}); got {self.evaluation.stride}"
            )
        if self.evaluation.copy_depth and self.data.context > LONGEST:
            raise UserError(
                f"config.evaluation.copy_depth must be 0 for config.data.context above {LONGEST}; "
                f"got {self.evaluation.copy_depth} and {self.data.context}"
            )

    def with_vocabulary(self, vocab_size: int) -> "ExperimentConfig":
        """Returns the settings with the vocabulary size of the corpus.

        Raises:
          UserError: the config names another size.
        """
        if not self.vocabulary_from_corpus and self.model.vocab_size != vocab_size:
            kind = "byte values" if self.data.vocabulary == "bytes" else "characters"
            raise UserError(
                f"config.model.vocab_size is {self.model.vocab_size}, but the corpus "
                f"{self.data.name!r} has {vocab_size} {kind}; set it to 0 to take the corpus's"
            )
        model: Any = dataclasses.replace(self.model, vocab_size=vocab_size)
        if self.match:
            wanted = dataclasses.replace(self.match, vocab_size=vocab_size).num_params()
            try:
                model = match_parameters(model, wanted)
            except ConfigError as error:
                raise UserError(f"config.match cannot be matched: {error}") from None
        return dataclasses.replace(self, model=model, vocabulary_from_corpus=False, match=None)

    @property
    def evaluation_stride(self) -> int:
        """Number of new tokens that an evaluation window predicts."""
        return self.evaluation.stride or self.data.context

    @property
    def characters_per_step(self) -> int:
        """Number of tokens predicted in a step."""
        return self.training.batch_size * self.data.context

    def to_dict(self) -> dict[str, Any]:
        """Returns nested plain values, as in the run folder's ``config.json``."""
        fields = dataclasses.asdict(self)
        del fields["vocabulary_from_corpus"], fields["match"]
        fields["model"] = {"architecture": fields.pop("architecture"), **fields["model"]}
        return fields


def _build_model(fields: dict[str, Any], where: str) -> tuple[str, ModelConfig]:
    """Returns the name of the architecture and the config of a model."""
    fields = dict(fields)
    architecture = fields.pop("architecture", None)
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"config.{where}.architecture must be one of {', '.join(ARCHITECTURES)}; "
            f"got {architecture!r}"
        )
    kind = ARCHITECTURES[architecture]
    of_others = set().union(*map(_names, ARCHITECTURES.values())) - _names(kind)
    for name in fields:
        if name in of_others:
            raise UserError(
                f"config.{where}.{name} is no setting of the architecture {architecture}: an arm "
                f"has one architecture; choose another arm with --config=FILE:ARM"
            )
    return architecture, _build(kind, fields, where)


def _names(kind: type[Any]) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def _build(kind: type[Any], fields: dict[str, Any], where: str) -> Any:
    known = _names(kind)
    for name in fields:
        if name not in known:
            raise UserError(
                f"config.{where}.{name} is not a setting; there are {', '.join(sorted(known))}"
            )
    try:
        return kind(**fields)
    except ConfigError as error:
        raise UserError(str(error).replace(f"{kind.__name__}.", f"config.{where}.")) from None


def experiment(
    name: str,
    *,
    model: ModelConfig,
    data: DataConfig | None = None,
    optimizer: OptimizerConfig | None = None,
    training: TrainingConfig | None = None,
    evaluation: EvaluationConfig | None = None,
    checkpoints: CheckpointConfig | None = None,
) -> ConfigDict:
    """Returns a locked ConfigDict for a file under ``configs/``, missing parts by default."""
    architecture = next(name for name, kind in ARCHITECTURES.items() if kind is type(model))
    parts: dict[str, Any] = {
        "data": data or DataConfig(),
        "optimizer": optimizer or OptimizerConfig(),
        "training": training or TrainingConfig(),
        "evaluation": evaluation or EvaluationConfig(),
        "checkpoints": checkpoints or CheckpointConfig(),
    }
    config = ConfigDict(
        {
            "name": name,
            "run_dir": "",
            "mirror_dir": "",
            "init_from": "",
            "seed": 0,
            "model": {"architecture": architecture, **dataclasses.asdict(model)},
            **{key: dataclasses.asdict(part) for key, part in parts.items()},
        }
    )
    return config.lock()
