"""The settings of a run: a locked ConfigDict outside, frozen dataclasses inside, converted once.

A file under ``configs/`` builds a ConfigDict with ``experiment(...)``; the command line may change
any of its fields (``--config.model.num_layers=4``); ``ExperimentConfig.from_config_dict`` checks
all of them and is what the programs use. Each default stands here, once.
"""

import dataclasses
import re
from typing import Any, Literal

from ml_collections import ConfigDict

from fsn_jax import FSNConfig, TransformerConfig
from fsn_jax.config import (
    ConfigError,
    check_at_least,
    check_fields,
    check_positive,
    match_parameters,
)
from fsn_jax.vocabulary import Unit
from train.bucket import is_remote
from train.errors import UserError

ModelConfig = FSNConfig | TransformerConfig
ARCHITECTURES: dict[str, type[FSNConfig] | type[TransformerConfig]] = {
    "fsn": FSNConfig,
    "transformer": TransformerConfig,
}
LARGEST_BYTE_VOCABULARY = 256


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Settings of the corpus and how it reaches the device.

    Attributes:
      name: name of the corpus; ``text`` is the user's own.
      path: the user's file or folder (required by ``codeparrot`` and ``text``).
      cache_dir: folder of prepared corpora; empty means $FSN_JAX_CACHE or ~/.cache/fsn_jax.
      placement: ``resident`` keeps the corpus on the device and gathers windows inside the
        compiled step; ``host`` feeds them through Grain. Both give the same batches, bit for bit.
      vocabulary: tokens of ``text``: its bytes or its Unicode characters. Tokens of all other
        corpora are bytes.
      context: L, number of tokens in a window.
    """

    name: Literal["enwik8", "pycode", "codeparrot", "text"] = "enwik8"
    path: str = ""
    cache_dir: str = ""
    placement: Literal["resident", "host"] = "resident"
    vocabulary: Unit = "bytes"
    context: int = 256

    def __post_init__(self) -> None:
        check_fields(self)
        check_at_least(self, 2, "context")
        if self.vocabulary == "characters" and self.name != "text":
            raise ConfigError(
                f"DataConfig.vocabulary=characters is for DataConfig.name=text; {self.name} is a "
                f"corpus of bytes"
            )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Settings of the optimizer: warm-up, cosine decay, clipping, a learning-rate factor per group.

    Attributes:
      matrices: optimizer of the matrices inside the blocks: ``adam``, or ``muon``, which
        orthogonalises their momentum. Adam optimizes all other parameters.
      peak_learning_rate: learning rate of the matrices after warm-up.
      final_fraction: learning rate at the last step, as a fraction of the peak.
      warmup_steps: number of steps of linear growth from zero.
      beta1: decay rate of Adam's first moment.
      beta2: decay rate of Adam's second moment.
      epsilon: constant in Adam's denominator.
      muon_beta: decay rate of Muon's momentum.
      weight_decay: decay of all matrices, tables and readout included; other groups have none.
      clip_norm: largest global norm of the gradient.
      angle_factor: learning rate of the embedding angles relative to that of the matrices.
      kernel_factor: relative learning rate of coupling kernels, gains and collective modes.
      gate_factor: relative learning rate of score gates and inverse temperatures.
    """

    matrices: Literal["adam", "muon"] = "adam"
    peak_learning_rate: float = 1e-2
    final_fraction: float = 0.1
    warmup_steps: int = 100
    beta1: float = 0.9
    beta2: float = 0.99
    epsilon: float = 1e-8
    muon_beta: float = 0.95
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    angle_factor: float = 1.0
    kernel_factor: float = 1.0
    gate_factor: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self)
        check_positive(self, "peak_learning_rate", "epsilon", "clip_norm")
        check_positive(self, "angle_factor", "kernel_factor", "gate_factor")
        check_at_least(self, 0, "warmup_steps", "weight_decay", "final_fraction")
        if not 0 <= self.final_fraction <= 1:
            raise ConfigError(
                f"OptimizerConfig.final_fraction must be from 0 to 1; got {self.final_fraction}"
            )
        for name in ("beta1", "beta2", "muon_beta"):
            if not 0 <= getattr(self, name) < 1:  # at 1 a mean would never leave zero
                raise ConfigError(
                    f"OptimizerConfig.{name} must be from 0 to below 1; got {getattr(self, name)}"
                )


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Settings of the training steps.

    Attributes:
      batch_size: B, number of windows in a step, over all devices.
      num_steps: number of optimizer steps in the run.
      steps_per_dispatch: number of steps compiled into one call, so that a small model does not
        wait for the host.
      accumulation_steps: number of parts in which a batch is processed, to save memory; 0 means
        one part, or on a CPU parts that fit its caches.
      log_every: number of steps between rows of metrics.
      skipped_limit: number of steps with a NaN or infinite loss or gradient that may be skipped
        before the run stops.
      layout: layout of the parameters: ``replicated`` on every device, or ``sharded`` over the
        devices with Adam's moments, to fit a larger model. The losses agree up to rounding.
    """

    batch_size: int = 32
    num_steps: int = 1000
    steps_per_dispatch: int = 10
    accumulation_steps: int = 0
    log_every: int = 50
    skipped_limit: int = 0
    layout: Literal["replicated", "sharded"] = "replicated"

    def __post_init__(self) -> None:
        check_fields(self)
        check_at_least(self, 1, "batch_size", "num_steps", "steps_per_dispatch")
        check_at_least(self, 0, "accumulation_steps")
        check_at_least(self, 1, "log_every")
        check_at_least(self, 0, "skipped_limit")
        _check_multiple(self, "num_steps", "steps_per_dispatch", self.steps_per_dispatch)
        _check_multiple(self, "log_every", "steps_per_dispatch", self.steps_per_dispatch)
        if self.accumulation_steps:
            _check_multiple(self, "batch_size", "accumulation_steps", self.accumulation_steps)


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Settings of validation during the run; ``python -m train evaluate`` covers the whole split.

    Attributes:
      every: number of steps between evaluations.
      num_tokens: number of tokens at the start of the validation split; 0 means all.
      batch_size: number of windows in a batch.
      stride: number of new tokens that a window predicts; 0 means the context, so that no window
        sees what came before it.
      copy_depth: if not 0, the loss on copy events is recorded too: on characters that continue a
        repetition of at least this many characters in their window (see ``suffix_match.py``).
    """

    every: int = 500
    num_tokens: int = 0
    batch_size: int = 64
    stride: int = 0
    copy_depth: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        check_at_least(self, 1, "every", "batch_size")
        check_at_least(self, 0, "num_tokens", "stride", "copy_depth")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Settings of the checkpoints.

    Attributes:
      every: number of steps between saves.
      keep: number of latest checkpoints to keep, beside the best.
    """

    every: int = 500
    keep: int = 2

    def __post_init__(self) -> None:
        check_fields(self)
        check_at_least(self, 1, "every", "keep")


def _check_multiple(config: object, name: str, other: str, of: int) -> None:
    if getattr(config, name) % of:
        kind = type(config).__name__
        raise ConfigError(
            f"{kind}.{name} must be a multiple of {other} ({of}); got {getattr(config, name)}"
        )


PARTS: dict[str, type[Any]] = {
    "data": DataConfig,
    "optimizer": OptimizerConfig,
    "training": TrainingConfig,
    "evaluation": EvaluationConfig,
    "checkpoints": CheckpointConfig,
}


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """All settings of a run.

    Attributes:
      name: name of the run, and of its folder under ``runs/``.
      run_dir: folder of the run; empty means ``runs/<name>``.
      seed: seed of the initial parameters and of the order of the data.
      architecture: name of the architecture that ``model`` configures.
      model: config of the model. A ``vocab_size`` of 0 in the ConfigDict means that of the corpus;
        here it is then the largest of a byte corpus, until ``with_vocabulary`` sets it.
      vocabulary_from_corpus: whether ``vocab_size`` was 0.
      data, optimizer, training, evaluation, checkpoints: see their classes.
      mirror_dir: bucket (``gs://BUCKET/runs``) or folder that keeps a copy of the run's folder
        under the same name; empty for no copy.
      match: model whose number of parameters ``with_vocabulary`` gives to ``model``, by the width
        of its feed-forward; None to leave that as it is.
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
            architecture = model_fields.pop("architecture")
            if architecture not in ARCHITECTURES:
                raise UserError(
                    f"config.model.architecture must be one of {', '.join(ARCHITECTURES)}; "
                    f"got {architecture!r}"
                )
            if match := fields.pop("match", None):
                fields["match"] = _build(ARCHITECTURES[match.pop("architecture")], match, "match")
            if from_corpus := model_fields.get("vocab_size") == 0:
                model_fields["vocab_size"] = LARGEST_BYTE_VOCABULARY
            experiment = cls(
                architecture=architecture,
                model=_build(ARCHITECTURES[architecture], model_fields, "model"),
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


def _build(kind: type[Any], fields: dict[str, Any], where: str) -> Any:
    known = {field.name for field in dataclasses.fields(kind)}
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
    seed: int = 0,
) -> ConfigDict:
    """Returns a locked ConfigDict for a file under ``configs/``, missing parts by default."""
    architecture = "fsn" if isinstance(model, FSNConfig) else "transformer"
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
            "seed": seed,
            "model": {"architecture": architecture, **dataclasses.asdict(model)},
            **{key: dataclasses.asdict(part) for key, part in parts.items()},
        }
    )
    return config.lock()
