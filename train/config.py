"""What a run is: frozen dataclasses inside, a locked ConfigDict outside, converted once.

A file under ``configs/`` builds a ConfigDict with ``experiment(...)``; the command line may change
any of its fields (``--config.model.num_layers=4``); ``ExperimentConfig.from_config_dict`` checks
everything and is what the programs use. Each default stands here, once.
"""

import dataclasses
import json
import re
from typing import Any, Literal

from ml_collections import ConfigDict

from fsn_jax import FSNConfig, TransformerConfig
from fsn_jax.config import ConfigError, check_at_least, check_fields, check_positive
from train.bucket import is_remote
from train.data.vocabulary import Unit
from train.errors import UserError

ModelConfig = FSNConfig | TransformerConfig
ARCHITECTURES: dict[str, type[FSNConfig] | type[TransformerConfig]] = {
    "fsn": FSNConfig,
    "transformer": TransformerConfig,
}
LARGEST_BYTE_VOCABULARY = 256


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The corpus and how it reaches the device.

    Attributes:
      name: which corpus; ``text`` is the user's own.
      path: a file or folder of the user's (needed by ``codeparrot`` and ``text``).
      cache_dir: where prepared corpora live; empty means $FSN_JAX_CACHE or ~/.cache/fsn_jax.
      placement: ``resident`` keeps the corpus on the device and gathers windows inside the
        compiled step; ``host`` feeds them through Grain. The batches are the same bits.
      vocabulary: what a token of ``text`` stands for: one of its bytes, or one of its Unicode
        characters. Every other corpus is of bytes.
      context: L, tokens a window.
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
    """Adam with warm-up, cosine decay, clipping, and a learning-rate factor per group.

    Attributes:
      matrices: what turns the gradients of the matrices inside the blocks into a direction:
        ``adam``, or ``muon``, which makes their momentum orthogonal. All else is Adam's.
      peak_learning_rate: of the matrices, after warm-up.
      final_fraction: of the peak, at the last step.
      warmup_steps: of linear growth from zero.
      beta1: decay of the first moment.
      beta2: decay of the second moment.
      epsilon: of Adam's denominator.
      muon_beta: decay of Muon's momentum.
      weight_decay: of all matrices, also of tables and readout; every other group has none.
      clip_norm: largest global norm of the gradient.
      angle_factor: learning rate of the embedding angles over that of the matrices.
      kernel_factor: the same for the coupling kernels, gains and collective modes.
      gate_factor: the same for score gates and inverse temperatures.
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
    """The steps.

    Attributes:
      batch_size: B, windows a step over all devices.
      num_steps: optimizer steps in the run.
      steps_per_dispatch: steps compiled into one call, so that a small model does not wait for
        the host.
      accumulation_steps: parts that a batch is worked through in, to save memory; 0 leaves it to
        the device: one part, or on a CPU parts that fit its caches.
      log_every: steps between rows of metrics.
      skipped_limit: steps with a NaN or infinite loss or gradient that may be skipped before the
        run stops.
      parameters: ``replicated`` on every device, or ``sharded`` (divided among them, with Adam's
        moments) to fit a larger model; the losses are the same but for rounding.
    """

    batch_size: int = 32
    num_steps: int = 1000
    steps_per_dispatch: int = 10
    accumulation_steps: int = 0
    log_every: int = 50
    skipped_limit: int = 0
    parameters: Literal["replicated", "sharded"] = "replicated"

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
    """Validation during the run; ``python -m train evaluate`` covers the whole split.

    Attributes:
      every: steps between evaluations.
      num_bytes: how much of the start of the validation split; 0 means all of it.
      batch_size: windows at a time.
      stride: new characters a window predicts; 0 means the context, so each window starts cold.
    """

    every: int = 500
    num_bytes: int = 0
    batch_size: int = 64
    stride: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        check_at_least(self, 1, "every", "batch_size")
        check_at_least(self, 0, "num_bytes", "stride")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints.

    Attributes:
      every: steps between saves.
      keep: how many of the latest to keep, beside the best.
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
    """A whole run.

    Attributes:
      name: of the run, and of its folder under ``runs/``.
      run_dir: the run's folder; empty means ``runs/<name>``.
      seed: of the initial parameters and of the order of the data.
      architecture: which model ``model`` configures.
      model: the model. A ``vocab_size`` of 0 outside stands for the corpus's own; here it is then
        the largest a byte corpus can have, until ``with_vocabulary`` settles it.
      vocabulary_from_corpus: whether it was 0.
      data, optimizer, training, evaluation, checkpoints: see their classes.
      mirror_dir: a bucket (``gs://BUCKET/runs``) or folder in which a copy of the run's folder is
        kept, by the same name; empty for none.
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

    @classmethod
    def from_config_dict(cls, config: ConfigDict) -> "ExperimentConfig":
        """Checks every field.

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
            from_corpus = model_fields.get("vocab_size") == 0
            if from_corpus:
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
            raise UserError(
                f"the config does not have the form of an experiment: {error}"
            ) from None
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
        for setting, every in (
            ("evaluation.every", self.evaluation.every),
            ("checkpoints.every", self.checkpoints.every),
        ):
            if every % steps:
                raise UserError(
                    f"config.{setting} must be a multiple of config.training.steps_per_dispatch "
                    f"({steps}); got {every}"
                )
        if self.evaluation.stride > self.data.context:
            raise UserError(
                f"config.evaluation.stride must be at most config.data.context "
                f"({self.data.context}); got {self.evaluation.stride}"
            )

    def with_vocabulary(self, vocab_size: int) -> "ExperimentConfig":
        """The same run with the corpus's vocabulary.

        Raises:
          UserError: the config names another size.
        """
        if not self.vocabulary_from_corpus and self.model.vocab_size != vocab_size:
            kind = "byte values" if self.data.vocabulary == "bytes" else "characters"
            raise UserError(
                f"config.model.vocab_size is {self.model.vocab_size}, but the corpus "
                f"{self.data.name!r} has {vocab_size} {kind}; set it to 0 to take the corpus's"
            )
        model = dataclasses.replace(self.model, vocab_size=vocab_size)
        return dataclasses.replace(self, model=model, vocabulary_from_corpus=False)

    @property
    def evaluation_stride(self) -> int:
        """New characters each evaluation window predicts."""
        return self.evaluation.stride or self.data.context

    @property
    def characters_per_step(self) -> int:
        """Characters predicted in a step."""
        return self.training.batch_size * self.data.context

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values: what the run folder's ``config.json`` holds."""
        fields = dataclasses.asdict(self)
        fields.pop("vocabulary_from_corpus")
        fields["model"] = {"architecture": fields.pop("architecture"), **fields["model"]}
        return fields

    @classmethod
    def from_json(cls, text: str) -> "ExperimentConfig":
        """The inverse of ``to_dict`` after ``json.dumps``."""
        return cls.from_config_dict(ConfigDict(json.loads(text)))


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
    """A locked ConfigDict for a file under ``configs/``: the given parts, defaults for the rest."""
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
