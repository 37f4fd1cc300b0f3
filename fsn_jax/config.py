"""Configurations of the models: frozen, self-validating, and aware of their own size.

Letters (used in names, annotations and einsums throughout the package)::

    B batch          L sequence length      V vocabulary       N phases per token
    H heads          P = N / H              M harmonics        T delays (1 or 2)
    J heads that a phase hears
    R phase pairs of a projected score      F feed-forward     K collective modes
    D transformer width
"""

import dataclasses
import math
import typing
from typing import Literal

Score = Literal["projected", "gated", "static", "none"]
Values = Literal["circular", "linear"]
Features = Literal["phasor", "quadrature"]
FeedForward = Literal["swiglu", "collective_modes", "none"]
EmbeddingInit = Literal["normal", "uniform"]
KernelInit = Literal["sawtooth", "first_harmonic"]
DType = Literal["float32", "bfloat16"]
Implementation = Literal["auto", "reference", "xla", "pallas"]

TRAINING_FLOPS_FACTOR = 3
"""Forward plus backward over forward: for each product the backward pass has two."""


class ConfigError(ValueError):
    """A field of a configuration has a value that cannot work; one line that names it."""


def check_fields(config: object) -> None:
    """Checks each field of a dataclass against its annotation: a choice, a number, a switch.

    Raises:
      ConfigError: a value is of the wrong type or not among the choices.
    """
    kind = type(config).__name__
    hints = {f.name: f.type for f in dataclasses.fields(config)}  # type: ignore[arg-type]
    for name, hint in hints.items():
        value = getattr(config, name)
        choices = getattr(hint, "__args__", None) if "Literal" in str(hint) else None
        if choices is not None:
            if value not in choices:
                listed = ", ".join(repr(c) for c in choices)
                raise ConfigError(f"{kind}.{name} must be one of {listed}; got {value!r}")
        elif hint is bool:
            if not isinstance(value, bool):
                raise ConfigError(f"{kind}.{name} must be True or False; got {value!r}")
        elif hint is int:
            if not isinstance(value, int) or isinstance(value, bool):
                raise ConfigError(f"{kind}.{name} must be a whole number; got {value!r}")
        elif hint is float:
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not math.isfinite(value):
                raise ConfigError(f"{kind}.{name} must be a finite number; got {value!r}")
        elif hint is str and not isinstance(value, str):
            raise ConfigError(f"{kind}.{name} must be a string; got {value!r}")


def check_at_least(config: object, least: int, *names: str) -> None:
    """Raises ConfigError unless each named field is at least ``least``."""
    for name in names:
        if getattr(config, name) < least:
            raise ConfigError(
                f"{type(config).__name__}.{name} must be at least {least}; "
                f"got {getattr(config, name)}"
            )


def check_positive(config: object, *names: str) -> None:
    """Raises ConfigError unless each named field is above zero."""
    for name in names:
        if not getattr(config, name) > 0:
            raise ConfigError(
                f"{type(config).__name__}.{name} must be above zero; got {getattr(config, name)}"
            )


def _mean_causal_pairs(context: int) -> float:
    """Average number of positions ``u <= t`` over the ``t`` of a window."""
    if context < 1:
        raise ConfigError(f"context must be at least 1; got {context}")
    return (context + 1) / 2


# They check themselves, with words for a user; run-time type checks would only come in between.
@typing.no_type_check
@dataclasses.dataclass(frozen=True)
class FSNConfig:
    """A Frustrated Synchronization Network.

    Attributes:
      vocab_size: V, number of token values.
      num_layers: number of blocks (coupling, then feed-forward).
      num_phases: N, oscillators per token.
      num_heads: H; each head couples its own block of N / H phases.
      heads_per_phase: J, heads that each phase hears. With 1, head h couples the h-th block of
        N / H phases, by a kernel ``[T, M, N]``. With more, a phase of block h hears heads h,
        h + 1, ..., h + J - 1 (modulo H), each by its own kernel, ``[T, M, J, N]``.
      num_harmonics: M, harmonics of the coupling kernel.
      delay: whether the kernel has a one-step delay (T = 2), coupling to successors.
      static_angles: whether the kernel is complex, i.e. has frustration angles.
      signed_harmonics: whether the in-phase part of the kernel may be repulsive (negative).
      score: what selects the tokens that couple; ``projected`` (dense queries and keys),
        ``gated`` (content-gated phase similarity), ``static`` (one learned gate per phase; the
        score is then invariant under a global rotation), ``none`` (uniform mean field).
      score_phases: R, phase pairs per head of a projected score; 0 means N / H.
      similarity_heads: S; the first S heads of a projected score compare what two tokens are, not
        where: their queries are their keys, and no drift turns them.
      values: ``circular`` (the coupling kernel) or ``linear`` (dense values, an ablation).
      features: what the dense layers inside a block see of a phase: ``phasor`` (cosine and sine) or
        ``quadrature`` (one learned combination of the two for each layer, for queries and keys for
        each head), which halves their weights; see ``PhasorDense``.
      field_features: whether the feed-forward sees, besides the phases, the local field that their
        coupling has put each of them in: coherence and torque.
      feedforward: ``swiglu``, ``collective_modes`` (no MLP) or ``none``.
      feedforward_width: F, of the SwiGLU.
      num_modes: K, of the collective modes.
      rotary_base: of the rotary drift, as in RoPE: pair p of R turns by ``rotary_base**(-p / R)``
        radians a position.
      embedding_init: distribution of the embedding angles at the start.
      embedding_scale: standard deviation of the normal ones, in radians.
      score_sharpness: initial inverse temperature in units of ``1 / sqrt(R)``.
      kernel_init: ``first_harmonic`` (the others start at zero) or ``sawtooth`` (rho_m proportional
        to ``(-1)**(m+1) / m``, which in full moves a phase onto the attended one in one step).
      kernel_scale: the first harmonic's initial coefficient, for each delay and the first head that
        a phase hears; what starts at zero starts at 0.01 if ``signed_harmonics`` is off.
      dtype: of the matrix products; angles, softmax and logits are float32 always.
      remat: recompute each block in the backward pass instead of keeping its activations; on a CPU
        XLA (jaxlib 0.10.2) undoes that.
      implementation: of the coupling; ``auto`` takes the fastest one for the backend, ``xla`` goes
        block by block, ``pallas`` is a fused kernel for one GPU or TPU or inside ``shard_map``,
        ``reference`` is the definition, the only one with forward-mode derivatives.
    """

    vocab_size: int = 256
    num_layers: int = 4
    num_phases: int = 64
    num_heads: int = 4
    heads_per_phase: int = 1
    num_harmonics: int = 2
    delay: bool = True
    static_angles: bool = True
    signed_harmonics: bool = True
    score: Score = "projected"
    score_phases: int = 0
    similarity_heads: int = 0
    values: Values = "circular"
    features: Features = "phasor"
    field_features: bool = False
    feedforward: FeedForward = "swiglu"
    feedforward_width: int = 128
    num_modes: int = 32
    rotary_base: float = 10_000.0
    embedding_init: EmbeddingInit = "normal"
    embedding_scale: float = 1.0
    score_sharpness: float = 4.0
    kernel_init: KernelInit = "first_harmonic"
    kernel_scale: float = 0.5
    dtype: DType = "float32"
    remat: bool = False
    implementation: Implementation = "auto"

    def __post_init__(self) -> None:
        check_fields(self)
        check_at_least(self, 1, "vocab_size", "num_layers", "num_phases", "num_heads")
        check_at_least(self, 1, "num_harmonics", "feedforward_width", "num_modes")
        check_at_least(self, 0, "score_phases", "embedding_scale")
        check_positive(self, "score_sharpness", "kernel_scale")
        if self.rotary_base <= 1:
            raise ConfigError(f"FSNConfig.rotary_base must be above 1; got {self.rotary_base}")
        if self.num_phases % self.num_heads:
            raise ConfigError(
                f"FSNConfig.num_heads must divide num_phases; "
                f"got {self.num_heads} heads and {self.num_phases} phases"
            )
        if not 1 <= self.heads_per_phase <= self.num_heads:
            raise ConfigError(
                f"FSNConfig.heads_per_phase must be from 1 to num_heads ({self.num_heads}); "
                f"got {self.heads_per_phase}"
            )
        for name in ("score_phases", "similarity_heads"):
            if getattr(self, name) and self.score != "projected":
                raise ConfigError(
                    f"FSNConfig.{name} belongs to score='projected'; leave it 0 for "
                    f"score={self.score!r}"
                )
        if not 0 <= self.similarity_heads <= self.num_heads:
            raise ConfigError(
                f"FSNConfig.similarity_heads must be from 0 to num_heads ({self.num_heads}); "
                f"got {self.similarity_heads}"
            )
        if self.field_features and self.values == "linear":
            raise ConfigError(
                "FSNConfig.field_features must be False for values='linear', which have no field"
            )

    @property
    def phases_per_head(self) -> int:
        """P."""
        return self.num_phases // self.num_heads

    @property
    def phases_per_kernel(self) -> int:
        """Phases that one head couples: J P."""
        return self.heads_per_phase * self.phases_per_head

    @property
    def num_delays(self) -> int:
        """T."""
        return 2 if self.delay else 1

    @property
    def score_pairs(self) -> int:
        """Complex pairs per head whose inner product is the score: R (0 without a score)."""
        if self.score == "none":
            return 0
        return self.score_phases or self.phases_per_head

    @property
    def key_heads(self) -> int:
        """Heads of a projected score whose keys are not their queries: H - S."""
        return self.num_heads - self.similarity_heads

    @property
    def _inputs(self) -> int:
        """Reals that an output of a ``PhasorDense`` sees."""
        return self.num_phases * (2 if self.features == "phasor" else 1)

    def _phasor_dense(self, outputs: int, groups: int = 1) -> int:
        """Parameters of a ``PhasorDense`` without bias."""
        quadratures = 0 if self.features == "phasor" else 2 * groups * self.num_phases
        return self._inputs * outputs + quadratures

    def num_params(self) -> int:
        """Number of learned scalars, equal to the size of the parameter tree."""
        n, h, v = self.num_phases, self.num_heads, self.vocab_size
        score = {
            "projected": sum(
                self._phasor_dense(2 * groups * self.score_pairs, groups)
                for groups in (h, self.key_heads)
            )
            + h,
            "gated": 2 * (self._phasor_dense(n) + n) + h,
            "static": n + h,
            "none": 0,
        }[self.score]
        parts = 2 if self.static_angles else 1
        coupling = {
            "circular": parts * self.num_delays * self.num_harmonics * h * self.phases_per_kernel,
            "linear": self._phasor_dense(n) + n * n,
        }[self.values]
        width, modes = self.feedforward_width, self.num_modes
        gains = 2 * n if self.field_features else 0
        feedforward = {
            "swiglu": 2 * (self._phasor_dense(width) + gains) + width * n,
            "collective_modes": self._phasor_dense(modes) + gains + modes + 2 * modes * n,
            "none": 0,
        }[self.feedforward]
        ends = v * n + 2 * n * v + v
        return self.num_layers * (score + coupling + feedforward) + ends

    def flops_per_token(self, context: int) -> float:
        """Floating-point operations of training, per token, in windows of ``context`` tokens.

        Counts the multiplications and additions of matrix products, forward and backward, and of
        attention only the causal pairs; leaves out what is elementwise (sines, softmax, gates).
        """
        n, inputs = self.num_phases, self._inputs
        pairs = _mean_causal_pairs(context)
        # Heads that read a quadrature each are computed from both, in one product.
        score_dense = {
            "projected": sum(
                (inputs if groups == 1 else 2 * n) * 2 * groups * self.score_pairs
                for groups in (self.num_heads, self.key_heads)
            ),
            "gated": 2 * inputs * n,
            "static": 0,
            "none": 0,
        }[self.score]
        scores = pairs * 2 * self.num_heads * self.score_pairs
        values = {
            "circular": pairs * 2 * self.num_harmonics * self.num_heads * self.phases_per_kernel,
            "linear": pairs * n + inputs * n + n * n,
        }[self.values]
        feedforward = {
            "swiglu": (2 * inputs + n) * self.feedforward_width,
            "collective_modes": (inputs + 2 * n) * self.num_modes,
            "none": 0,
        }[self.feedforward]
        layer = score_dense + scores + values + feedforward
        multiply_adds = self.num_layers * layer + 2 * n * self.vocab_size
        return float(TRAINING_FLOPS_FACTOR * 2 * multiply_adds)


@typing.no_type_check
@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """The baseline: decoder-only, pre-RMSNorm, RoPE, SwiGLU, no biases.

    Attributes:
      vocab_size: V, number of token values.
      num_layers: number of blocks.
      width: D.
      num_heads: H, of D / H dimensions each.
      feedforward_width: F, of the SwiGLU.
      tied_embedding: whether the readout is the embedding transposed.
      rotary_base: of RoPE.
      dtype: of the matrix products; softmax, norms and logits are float32 always.
      remat: recompute each block in the backward pass instead of keeping its activations; on a CPU
        XLA (jaxlib 0.10.2) undoes that.
      implementation: of the attention, as for the FSN.
    """

    vocab_size: int = 256
    num_layers: int = 4
    width: int = 64
    num_heads: int = 4
    feedforward_width: int = 176
    tied_embedding: bool = False
    rotary_base: float = 10_000.0
    dtype: DType = "float32"
    remat: bool = False
    implementation: Implementation = "auto"

    def __post_init__(self) -> None:
        check_fields(self)
        check_at_least(self, 1, "vocab_size", "num_layers", "width", "num_heads")
        check_at_least(self, 1, "feedforward_width")
        if self.rotary_base <= 1:
            raise ConfigError(
                f"TransformerConfig.rotary_base must be above 1; got {self.rotary_base}"
            )
        if self.width % (2 * self.num_heads):
            raise ConfigError(
                f"TransformerConfig.width must be a multiple of 2 * num_heads (rotary pairs); "
                f"got width {self.width} and {self.num_heads} heads"
            )

    def num_params(self) -> int:
        """Number of learned scalars, equal to the size of the parameter tree."""
        d = self.width
        layer = 4 * d * d + 3 * d * self.feedforward_width + 2 * d
        ends = self.vocab_size * d * (1 if self.tied_embedding else 2) + d
        return self.num_layers * layer + ends

    def flops_per_token(self, context: int) -> float:
        """Floating-point operations of training per token; counted as for the FSN."""
        d = self.width
        attention = _mean_causal_pairs(context) * 2 * d
        layer = 4 * d * d + attention + 3 * d * self.feedforward_width
        multiply_adds = self.num_layers * layer + d * self.vocab_size
        return float(TRAINING_FLOPS_FACTOR * 2 * multiply_adds)


_Model = typing.TypeVar("_Model", FSNConfig, TransformerConfig)


def match_parameters(config: _Model, num_params: int) -> _Model:
    """The config with the width of its feed-forward for a size as near ``num_params`` as can be.

    The width is F, or K of collective modes.

    Raises:
      ConfigError: there is no feed-forward, or even one of width 1 is too large.
    """
    field = "feedforward_width"
    if isinstance(config, FSNConfig):
        if config.feedforward == "none":
            raise ConfigError("FSNConfig.feedforward is 'none': there is no width to match with")
        if config.feedforward == "collective_modes":
            field = "num_modes"

    def with_width(width: int) -> _Model:
        change: dict[str, typing.Any] = {field: width}
        return dataclasses.replace(config, **change)

    one, two = with_width(1).num_params(), with_width(2).num_params()
    width = 1 + round((num_params - one) / (two - one))
    if width < 1:
        raise ConfigError(
            f"{type(config).__name__}: {num_params} parameters are fewer than the {one} of the "
            f"smallest feed-forward; lower the width or the depth"
        )
    return with_width(width)
