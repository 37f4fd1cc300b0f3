"""The settings of a run, part by part: data, optimizer, training, evaluation, checkpoints.

Each default stands here, once, with its range. The settings of the models are in
``fsn_jax/fields.py`` and ``fsn_jax/config.py``, those of a run as a whole in ``train/config.py``.
"""

import dataclasses
from typing import Any, Literal

from fsn_jax.fields import ConfigError, check_fields, documented, setting
from fsn_jax.vocabulary import Unit, Vocabulary
from train.errors import UserError

Placement = Literal["resident", "host"]
Layout = Literal["replicated", "sharded"]


@dataclasses.dataclass(frozen=True)
class _Settings:
    """Base of the parts: they check themselves at construction, and raise ConfigError."""

    def __post_init__(self) -> None:
        check_fields(self)
        self._check()

    def _check(self) -> None:
        """Raises ConfigError if settings do not go together."""


@documented
@dataclasses.dataclass(frozen=True)
class DataConfig(_Settings):
    """Settings of the corpus and how it reaches the device."""

    name: Literal["enwik8", "pycode", "codeparrot", "text"] = setting(
        "enwik8", "name of the corpus; ``text`` is the user's own"
    )
    path: str = setting("", "the user's file or folder (required by ``codeparrot`` and ``text``)")
    cache_dir: str = setting(
        "", "folder of prepared corpora; empty means $FSN_JAX_CACHE or ~/.cache/fsn_jax"
    )
    placement: Placement = setting(
        "resident",
        "``resident`` keeps the corpus on the device and gathers windows inside the compiled step; "
        "``host`` feeds them through Grain. Both give the same batches, bit for bit",
    )
    vocabulary: Unit = setting(
        "bytes",
        "tokens of ``text``: its bytes or its Unicode characters. Tokens of all other corpora are "
        "bytes",
    )
    segments: Literal["none", "documents"] = setting(
        "none",
        "what a token may see of its window: ``none`` all before it; ``documents``, of a ``text`` "
        "of several files or of JSON lines, only what is before it in its own document",
    )
    context: int = setting(256, "L, number of tokens in a window", least=2)

    def _check(self) -> None:
        for name, value in (("vocabulary", "characters"), ("segments", "documents")):
            if getattr(self, name) == value and self.name != "text":
                raise ConfigError(
                    f"DataConfig.{name}={value} is for DataConfig.name=text; got {self.name}"
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


@documented
@dataclasses.dataclass(frozen=True)
class OptimizerConfig(_Settings):
    """Settings of the optimizer: warm-up, cosine decay, clipping, a rate per group."""

    matrices: Literal["adam", "muon"] = setting(
        "adam",
        "optimizer of the matrices inside the blocks: ``adam``, or ``muon``, which orthogonalises "
        "their momentum. Adam optimizes all other parameters",
    )
    peak_learning_rate: float = setting(
        1e-2, "learning rate of the matrices after warm-up", above=0
    )
    final_fraction: float = setting(
        0.1, "learning rate at the last step, as a fraction of the peak", least=0, most=1
    )
    warmup_steps: int = setting(
        100,
        "number of steps of linear growth from zero; a shorter run grows up to its last step",
        least=0,
    )
    beta1: float = setting(0.9, "decay rate of Adam's first moment", least=0, below=1)
    beta2: float = setting(0.99, "decay rate of Adam's second moment", least=0, below=1)
    epsilon: float = setting(1e-8, "constant in Adam's denominator", above=0)
    muon_beta: float = setting(0.95, "decay rate of Muon's momentum", least=0, below=1)
    weight_decay: float = setting(
        0.01,
        "decay of all matrices, tables and readout included; other groups have none",
        least=0,
    )
    clip_norm: float = setting(1.0, "largest global norm of the gradient", above=0)
    angle_factor: float = setting(
        1.0, "learning rate of embedding and score angles relative to that of the matrices", above=0
    )
    kernel_factor: float = setting(
        1.0, "relative learning rate of coupling kernels and of the base layer's gain", above=0
    )
    gate_factor: float = setting(
        1.0,
        "relative learning rate of score gates, inverse temperatures, quadratures and field gains",
        above=0,
    )


@documented
@dataclasses.dataclass(frozen=True)
class TrainingConfig(_Settings):
    """Settings of the training steps."""

    batch_size: int = setting(32, "B, number of windows in a step, over all devices", least=1)
    num_steps: int = setting(1000, "number of optimizer steps in the run", least=1)
    steps_per_dispatch: int = setting(
        10,
        "number of steps compiled into one call, so that a small model does not wait for the host",
        least=1,
    )
    accumulation_steps: int = setting(
        0,
        "number of parts in which a batch is processed, to save memory; 0 means one part, or on a "
        "CPU parts that fit its caches",
        least=0,
    )
    log_every: int = setting(50, "number of steps between rows of metrics", least=1)
    skipped_limit: int = setting(
        0,
        "number of steps with a NaN or infinite loss or gradient that may be skipped before the "
        "run stops",
        least=0,
    )
    patience: int = setting(
        0,
        "number of evaluations in a row without a new lowest validation loss after which the run "
        "ends; 0 for never. The learning rate falls as if it went on to ``num_steps``",
        least=0,
    )
    layout: Layout = setting(
        "replicated",
        "layout of the parameters: ``replicated`` on every device, or ``sharded`` over the devices "
        "with the optimizer's moments, to fit a larger model. The losses agree up to rounding",
    )

    def _check(self) -> None:
        for name, other in (
            ("num_steps", "steps_per_dispatch"),
            ("log_every", "steps_per_dispatch"),
            ("batch_size", "accumulation_steps"),
        ):
            value, part = getattr(self, name), getattr(self, other)
            if part and value % part:
                raise ConfigError(
                    f"TrainingConfig.{name} must be a multiple of {other} ({part}); got {value}"
                )


@documented
@dataclasses.dataclass(frozen=True)
class EvaluationConfig(_Settings):
    """Settings of validation during the run; ``train evaluate`` covers the whole split."""

    every: int = setting(500, "number of steps between evaluations", least=1)
    num_tokens: int = setting(
        0, "number of tokens at the start of the validation split; 0 means all", least=0
    )
    batch_size: int = setting(64, "number of windows in a batch", least=1)
    stride: int = setting(
        0,
        "number of new tokens that a window predicts; 0 means the context, so that no window sees "
        "what came before it",
        least=0,
    )
    copy_depth: int = setting(
        0,
        "if not 0, the loss on copy events is recorded too: on characters that continue a "
        "repetition of at least this many characters in their window (see ``suffix_match.py``)",
        least=0,
    )


@documented
@dataclasses.dataclass(frozen=True)
class CheckpointConfig(_Settings):
    """Settings of the checkpoints."""

    every: int = setting(500, "number of steps between saves", least=1)
    keep: int = setting(2, "number of latest checkpoints to keep, beside the best", least=1)


PARTS: dict[str, type[Any]] = {
    "data": DataConfig,
    "optimizer": OptimizerConfig,
    "training": TrainingConfig,
    "evaluation": EvaluationConfig,
    "checkpoints": CheckpointConfig,
}
