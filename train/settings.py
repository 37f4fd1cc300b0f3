"""The settings of a run, part by part: data, optimizer, training, evaluation, checkpoints.

Each default stands here, once. The settings of the models are in ``fsn_jax/config.py``.
"""

import dataclasses
from typing import Any, Literal

from fsn_jax.config import ConfigError, check_at_least, check_fields, check_positive
from fsn_jax.vocabulary import Unit, Vocabulary
from train.errors import UserError


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
      segments: what a token may see of its window: ``none`` all before it; ``documents``, of a
        ``text`` of several files or of JSON lines, only what is before it in its own document.
      context: L, number of tokens in a window.
    """

    name: Literal["enwik8", "pycode", "codeparrot", "text"] = "enwik8"
    path: str = ""
    cache_dir: str = ""
    placement: Literal["resident", "host"] = "resident"
    vocabulary: Unit = "bytes"
    segments: Literal["none", "documents"] = "none"
    context: int = 256

    def __post_init__(self) -> None:
        check_fields(self)
        check_at_least(self, 2, "context")
        if self.vocabulary == "characters" and self.name != "text":
            raise ConfigError(
                f"DataConfig.vocabulary=characters is for DataConfig.name=text; {self.name} is a "
                f"corpus of bytes"
            )
        if self.segments == "documents" and self.name != "text":
            raise ConfigError(
                f"DataConfig.segments=documents is for DataConfig.name=text; windows of "
                f"{self.name} are read as one text"
            )

    def separator(self, vocabulary: Vocabulary) -> int | None:
        """Returns the token that begins each segment; None if a window is one.

        Raises:
          UserError: ``segments`` is ``documents`` and the text has no more than one.
        """
        if self.segments == "none":
            return None
        if vocabulary.separator is None:
            raise UserError(
                f"config.data.segments=documents needs several documents, and config.data.path="
                f"{self.path} gives one: name a folder of files or JSON lines, or say "
                f"config.data.segments=none"
            )
        return vocabulary.separator


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
      patience: number of evaluations in a row without a new lowest validation loss after which the
        run ends; 0 for never. The learning rate falls as if it went on to ``num_steps``.
      layout: layout of the parameters: ``replicated`` on every device, or ``sharded`` over the
        devices with Adam's moments, to fit a larger model. The losses agree up to rounding.
    """

    batch_size: int = 32
    num_steps: int = 1000
    steps_per_dispatch: int = 10
    accumulation_steps: int = 0
    log_every: int = 50
    skipped_limit: int = 0
    patience: int = 0
    layout: Literal["replicated", "sharded"] = "replicated"

    def __post_init__(self) -> None:
        check_fields(self)
        check_at_least(self, 1, "batch_size", "num_steps", "steps_per_dispatch")
        check_at_least(self, 0, "accumulation_steps")
        check_at_least(self, 1, "log_every")
        check_at_least(self, 0, "skipped_limit", "patience")
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
