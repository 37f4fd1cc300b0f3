"""Settings of the layers, each written once: its name, type, default, range and meaning.

A layer (a Flax module) inherits the settings that it reads, and ``FSNConfig`` inherits those of all
layers of the model. They check themselves: what cannot work is refused by name at construction.
"""

import dataclasses
import inspect
import math
import operator
import textwrap
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

Score = Literal["gated", "content_gated", "projected", "none"]
ScoreScope = Literal["all", "block"]
Features = Literal["phasor", "quadrature"]
ModeWeights = Literal["coherence", "dense"]
DType = Literal["float32", "bfloat16"]
Implementation = Literal["auto", "reference", "xla", "pallas"]

_Value = typing.TypeVar("_Value")
_Class = typing.TypeVar("_Class", bound=type)


class ConfigError(ValueError):
    """A setting has a value that cannot work; one line that names it."""


def setting(default: _Value, doc: str, **bounds: int | float) -> _Value:
    """Returns a dataclass field with its meaning and its range.

    Args:
      default: its default.
      doc: what it is, for the docstring of every class that has it.
      **bounds: of a number: ``least`` and ``most`` are allowed, ``above`` and ``below`` are not.
    """
    return dataclasses.field(default=default, metadata={"doc": doc, **bounds})


def check_fields(config: object) -> None:
    """Checks each field of a dataclass: a choice, a number in its range, a switch.

    A whole number in a field of floats becomes a float.

    Raises:
      ConfigError: a value is of the wrong type, out of range or not among the choices.
    """
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        if problem := _problem(field.type, value) or _out_of_range(field.metadata, value):
            raise ConfigError(f"{type(config).__name__}.{field.name} must be {problem}")
        if field.type is float:
            object.__setattr__(config, field.name, float(value))  # some are frozen


def _problem(hint: Any, value: Any) -> str:
    """Says what a value of this type must be and is not; empty if it is."""
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        if not isinstance(value, str) or value not in choices:
            return f"one of {', '.join(map(repr, choices))}; got {value!r}"
    elif hint is bool and not isinstance(value, bool):
        return f"True or False; got {value!r}"
    elif hint is int and (not isinstance(value, int) or isinstance(value, bool)):
        return f"a whole number; got {value!r}"
    elif hint is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not math.isfinite(value):
            return f"a finite number; got {value!r}"
    elif hint is str and not isinstance(value, str):
        return f"a string; got {value!r}"
    return ""


_BOUNDS = {"least": operator.ge, "most": operator.le, "above": operator.gt, "below": operator.lt}


def _out_of_range(bounds: Mapping[Any, Any], value: Any) -> str:
    if all(holds(value, bounds[name]) for name, holds in _BOUNDS.items() if name in bounds):
        return ""
    if "above" in bounds:
        return f"above {bounds['above']}; got {value}"
    if "most" in bounds:
        return f"from {bounds['least']} to {bounds['most']}; got {value}"
    if "below" in bounds:
        return f"from {bounds['least']} to below {bounds['below']}; got {value}"
    return f"at least {bounds['least']}; got {value}"


def documented(kind: _Class) -> _Class:
    """Class decorator: appends the meanings of the settings to the docstring."""
    lines = [
        textwrap.fill(
            f"{field.name}: {field.metadata['doc']}",
            width=100,
            initial_indent="  ",
            subsequent_indent="    ",
        )
        for field in _settings(kind)
    ]
    kind.__doc__ = "\n".join([inspect.cleandoc(kind.__doc__ or ""), "", "Attributes:", *lines, ""])
    return kind


def shared_settings(source: "Fields", target: type["Fields"]) -> dict[str, Any]:
    """Returns the settings that two classes share: what a model hands to a layer."""
    names = {field.name for field in _settings(type(source))}
    return {f.name: getattr(source, f.name) for f in _settings(target) if f.name in names}


def _settings(kind: type[Any]) -> Iterator["dataclasses.Field[Any]"]:
    return (field for field in dataclasses.fields(kind) if "doc" in field.metadata)


# Settings check themselves, with words for a user; run-time type checks would come in between.
@typing.no_type_check
@dataclasses.dataclass(kw_only=True)
class Fields:
    """Base of all groups of settings: checks them at construction."""

    def __post_init__(self) -> None:
        parent = getattr(self, "parent", None)  # of a Flax module, its first argument
        if isinstance(parent, Frozen):
            raise ConfigError(
                f"{type(self).__name__} takes settings by their names, num_heads=2, not a "
                f"{type(parent).__name__}"
            )
        for field in _settings(type(self)):
            value = getattr(self, field.name)
            if isinstance(value, np.generic):
                setattr(self, field.name, value.item())
            if field.name == "dtype" and isinstance(value, (type, np.dtype)):
                setattr(self, field.name, jnp.dtype(value).name)
        check_fields(self)
        self._check()
        after: Any = getattr(super(), "__post_init__", None)  # of a Flax module
        if after is not None:
            after()

    def _check(self) -> None:
        """Raises ConfigError if settings do not go together."""

    def refuse(self, name: str, reason: str) -> typing.NoReturn:
        """Raises ConfigError about one setting: its name, what it must be, what it is."""
        raise ConfigError(f"{type(self).__name__}.{name} must {reason}; got {getattr(self, name)}")


@typing.no_type_check
@dataclasses.dataclass(kw_only=True)
class ComputeFields(Fields):
    """Settings of the computation."""

    dtype: DType = setting(
        "float32",
        "type of the matrix products; angles, softmax and logits are float32 always. TPUs and GPUs "
        "round the factors of float32 products unless ``jax_default_matmul_precision`` is "
        "``highest``",
    )
    implementation: Implementation = setting(
        "auto",
        "path of the causal sum: ``auto`` is the fastest for the backend, ``xla`` goes block by "
        "block, ``pallas`` is a fused kernel for one GPU or TPU or inside ``shard_map``, "
        "``reference`` is the definition, the only path with forward-mode derivatives",
    )


@typing.no_type_check
@dataclasses.dataclass(kw_only=True)
class DenseFields(ComputeFields):
    """Settings of dense layers that read phasors."""

    features: Features = setting(
        "phasor",
        "what dense layers read of a phase: ``phasor`` (cosine and sine) or ``quadrature`` (one "
        "learned combination of the two, for queries and keys one a head), with half the weights",
    )
    feature_scale: float = setting(
        0.5,
        "factor of what dense layers read: below 1, their updates in training are gentler; like "
        "``features`` without effect in a layer that has no dense ones",
        above=0,
    )


@typing.no_type_check
@dataclasses.dataclass(kw_only=True)
class ScoreFields(DenseFields):
    """Settings of the score, which selects the tokens that couple."""

    num_heads: int = setting(2, "H, number of attention heads", least=1)
    score: Score = setting(
        "gated",
        "what selects the tokens that couple: ``gated`` (phase coherence under learned gates, one "
        "a head and phase), ``content_gated`` (gates are functions of the token), ``projected`` "
        "(dense queries and keys), ``none`` (uniform mean field)",
    )
    score_scope: ScoreScope = setting(
        "block",
        "phases that a gated head compares: ``all`` N, or its own ``block`` of N / H; without "
        "effect on a projected score",
    )
    score_angles: bool = setting(
        True,
        "whether a gated score has frustration angles too, one a head and phase: its gates are "
        "complex; other scores have none",
    )
    score_angle: float = setting(
        1.5, "standard deviation of the initial angles of a gated score, in radians", least=0
    )
    score_phases: int = setting(
        0, "R, phase pairs a head of a projected score; 0 stands for N / H", least=0
    )
    similarity_heads: int = setting(
        1,
        "S, heads that compare what two tokens are and not where: they have no drift, and in a "
        "projected score their keys are their queries; if all heads are (S = H) the score has no "
        "positions",
        least=0,
    )
    rotary_base: float = setting(
        10_000.0,
        "base of the drift, as in RoPE: the p-th of P phases or pairs turns by "
        "``rotary_base**(-p / P)`` radians a position",
        above=1,
    )
    score_sharpness: float = setting(
        4.0, "initial inverse temperature in units of ``1 / sqrt(R)``", above=0
    )

    def _check(self) -> None:
        super()._check()
        if self.similarity_heads > self.num_heads:
            self.refuse("similarity_heads", f"be from 0 to num_heads ({self.num_heads})")
        for name, default, fits in (
            ("score_phases", 0, self.score == "projected"),
            ("similarity_heads", 1, self.score != "none"),
        ):
            if getattr(self, name) not in (0, default) and not fits:
                self.refuse(name, f"be {default!r} for score={self.score!r}")

    def check_width(self, num_phases: int) -> None:
        """Raises ConfigError unless ``num_heads`` divides the number of phases."""
        if num_phases % self.num_heads:
            self.refuse("num_heads", f"divide the number of phases ({num_phases})")

    def num_score_pairs(self, num_phases: int) -> int:
        """Returns R, the complex pairs of a head's score (0 without a score)."""
        if self.score == "none":
            return 0
        per_head = num_phases // self.num_heads
        if self.score == "projected":
            return self.score_phases or per_head
        return num_phases if self.score_scope == "all" else per_head


@typing.no_type_check
@dataclasses.dataclass(kw_only=True)
class CouplingFields(ScoreFields):
    """Settings of the coupling kernel, beside those of the score."""

    heads_per_phase: int = setting(
        2,
        "J, heads that each phase hears: with 1, head h couples the h-th block of N / H phases by "
        "a kernel ``[T, M, N]``; with more, a phase of block h hears heads h, ..., h + J - 1 "
        "(modulo H), each by a kernel of its own, ``[T, M, J, N]``",
        least=1,
    )
    num_harmonics: int = setting(2, "M, harmonics of the kernel", least=1)
    delay: bool = setting(
        True, "whether the kernel has a one-step delay (T = 2), which couples to successors"
    )
    static_angles: bool = setting(
        True, "whether the kernel is complex, which is to say has frustration angles"
    )
    signed_harmonics: bool = setting(
        True, "whether the in-phase part of the kernel may be negative (repulsive)"
    )
    kernel_scale: float = setting(
        0.5,
        "initial in-phase coefficient ``rho cos(alpha)`` of the first harmonic, for each delay and "
        "the first head that a phase hears; zeros become 0.01 if ``signed_harmonics`` is off",
        above=0,
    )
    kernel_angle: float = setting(
        0.1,
        "standard deviation of the initial frustration angles alpha, in radians; normal, so that "
        "none of them is near a quarter turn, where ``tan(alpha)`` has no bound",
        least=0,
        most=0.3,
    )

    def _check(self) -> None:
        super()._check()
        if self.heads_per_phase > self.num_heads:
            reason = f"be from 1 to num_heads ({self.num_heads})"
            if self.similarity_heads == self.num_heads and self.score != "none":
                reason += ", and similarity_heads 0 for a score with positions"
            self.refuse("heads_per_phase", reason)

    @property
    def num_delays(self) -> int:
        """T, number of delays."""
        return 2 if self.delay else 1

    @property
    def phasor_heads(self) -> int:
        """Heads of the phasors that heads couple: H, or 1 if all heads couple all phases."""
        return 1 if self.heads_per_phase == self.num_heads else self.num_heads


@typing.no_type_check
@dataclasses.dataclass(kw_only=True)
class SwiGLUFields(DenseFields):
    """Settings of the SwiGLU on phasors."""

    feedforward_width: int = setting(128, "F, hidden width of the SwiGLU", least=1)


@typing.no_type_check
@dataclasses.dataclass(kw_only=True)
class ModesFields(DenseFields):
    """Settings of the collective modes."""

    num_modes: int = setting(32, "K, number of collective modes", least=1)
    mode_weights: ModeWeights = setting(
        "coherence",
        "what weighs the collective modes: ``coherence`` of two order parameters of the token, so "
        "that only phase differences enter, or a ``dense`` layer",
    )


@typing.no_type_check
@dataclasses.dataclass(kw_only=True)
class ModelFields(ComputeFields):
    """Settings that both language models have."""

    vocab_size: int = setting(256, "V, number of token values", least=1)
    num_layers: int = setting(4, "number of blocks", least=1)
    dropout: float = setting(
        0.0,
        "probability of dropout, from 0 to below 1, in training (``deterministic=False``): of the "
        "update of each layer and of the embedding",
        least=0,
        below=1,
    )
    remat: bool = setting(
        False,
        "recompute each block in the backward pass instead of keeping its activations; on a CPU "
        "XLA (jaxlib 0.10.2) undoes that",
    )


class Frozen:
    """Base of configs that cannot be changed, as with ``dataclass(frozen=True)``.

    A frozen dataclass cannot inherit from one that is not, and Flax modules are not.
    """

    def __post_init__(self) -> None:
        after: Any = getattr(super(), "__post_init__", None)
        if after is not None:
            after()
        self._frozen = True

    def __setattr__(self, name: str, value: Any) -> None:
        if "_frozen" in self.__dict__:
            raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}")
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        raise dataclasses.FrozenInstanceError(f"cannot delete field {name!r}")
