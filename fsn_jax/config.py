"""Configurations of the models: frozen, self-validating, and aware of their own size.

Letters (used in names, annotations and einsums throughout the package)::

    B batch          L sequence length      V vocabulary       N phases per token
    H heads          P = N / H              M harmonics        T delays (1 or 2)
    J heads that a phase hears
    R phase pairs of a score                F feed-forward     K collective modes
    D transformer width
"""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, Literal

from fsn_jax.fields import (
    ConfigError,
    CouplingFields,
    Frozen,
    ModelFields,
    ModesFields,
    SwiGLUFields,
    documented,
    setting,
)

__all__ = [
    "ARCHITECTURES",
    "FSNConfig",
    "TransformerConfig",
    "match_parameters",
    "recorded_fields",
]

Values = Literal["circular", "linear"]
FeedForward = Literal["swiglu", "collective_modes", "none"]
TokenShift = Literal["none", "keys", "queries_and_keys"]

TRAINING_FLOPS_FACTOR = 3
"""Forward plus backward over forward: for each product the backward pass has two."""


def _mean_causal_pairs(context: int) -> float:
    """Returns the average number of positions ``u <= t`` over the ``t`` of a window."""
    if context < 1:
        raise ConfigError(f"context must be at least 1; got {context}")
    return (context + 1) / 2


@documented
@typing.no_type_check
@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class FSNConfig(Frozen, ModelFields, CouplingFields, SwiGLUFields, ModesFields):
    """A Frustrated Synchronization Network: the settings of its layers and of their stack.

    Raises:
      ConfigError: a setting has a value that cannot work.
    """

    num_phases: int = setting(64, "N, oscillators per token", least=1)
    values: Values = setting(
        "circular",
        "what heads sum: ``circular`` (the coupling kernel) or ``linear`` (dense values)",
    )
    field_features: bool = setting(
        False,
        "whether the feed-forward reads, besides the phases, the local field of the coupling: "
        "coherence and torque of each phase; no effect without a feed-forward",
    )
    feedforward: FeedForward = setting(
        "swiglu", "feed-forward: ``swiglu``, ``collective_modes`` (no MLP) or ``none``"
    )
    embedding_scale: float = setting(
        1.0, "standard deviation of the initial angles of the embedding, in radians", least=0
    )

    def _check(self) -> None:
        super()._check()
        self.check_width(self.num_phases)
        if self.field_features and self.values == "linear":
            raise ConfigError(
                "FSNConfig.field_features must be False for values='linear', which have no field"
            )

    @property
    def phases_per_head(self) -> int:
        """P, phases of a head's block."""
        return self.num_phases // self.num_heads

    @property
    def phases_per_kernel(self) -> int:
        """Phases that one head couples: J P."""
        return self.heads_per_phase * self.phases_per_head

    @property
    def score_pairs(self) -> int:
        """Complex pairs per head whose inner product is the score: R (0 without a score)."""
        return self.num_score_pairs(self.num_phases)

    @property
    def key_heads(self) -> int:
        """Heads of a projected score whose keys are not their queries: H - S."""
        return self.num_heads - self.similarity_heads

    @property
    def _inputs(self) -> int:
        """Number of reals that a ``PhasorDense`` reads."""
        return self.num_phases * (2 if self.features == "phasor" else 1)

    def _phasor_dense(self, outputs: int, groups: int = 1) -> int:
        """Number of parameters of a ``PhasorDense`` without bias."""
        quadratures = 0 if self.features == "phasor" else 2 * groups * self.num_phases
        return self._inputs * outputs + quadratures

    def _mode_matrices(self) -> int:
        """Number of parameters of K collective modes without biases."""
        modes = self.num_modes
        if self.mode_weights == "coherence":
            return 6 * modes * self.num_phases
        return self._phasor_dense(modes) + 2 * modes * self.num_phases

    def num_params(self) -> int:
        """Returns the number of learned scalars, the size of the parameter tree."""
        n, h, v = self.num_phases, self.num_heads, self.vocab_size
        gates = self.score_pairs * h
        score = {
            "gated": (2 if self.score_angles else 1) * gates + h,
            "content_gated": 2 * (self._phasor_dense(gates) + gates) + h,
            "projected": sum(
                self._phasor_dense(2 * groups * self.score_pairs, groups)
                for groups in (h, self.key_heads)
            )
            + h,
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
            "collective_modes": self._mode_matrices() + gains + modes,
            "none": 0,
        }[self.feedforward]
        ends = v * n + 2 * n * v + v
        return self.num_layers * (score + coupling + feedforward) + ends

    def flops_per_token(self, context: int) -> float:
        """Returns the floating-point operations of training, per token, in windows of ``context``.

        Counts multiplications and additions of matrix products, forward and backward, and only the
        causal pairs of attention. Elementwise operations (sines, softmax, gates) do not count.
        """
        n, inputs = self.num_phases, self._inputs
        pairs = _mean_causal_pairs(context)
        # Heads that read a quadrature each are computed from both, in one product.
        score_dense = {
            "projected": sum(
                (inputs if groups == 1 else 2 * n) * 2 * groups * self.score_pairs
                for groups in (self.num_heads, self.key_heads)
            ),
            "gated": 0,
            "content_gated": 2 * inputs * self.num_heads * self.score_pairs,
            "none": 0,
        }[self.score]
        scores = pairs * 2 * self.num_heads * self.score_pairs
        values = {
            "circular": pairs * 2 * self.num_harmonics * self.num_heads * self.phases_per_kernel,
            "linear": pairs * n + inputs * n + n * n,
        }[self.values]
        feedforward = {
            "swiglu": (2 * inputs + n) * self.feedforward_width,
            "collective_modes": (12 * n if self.mode_weights == "coherence" else inputs + 2 * n)
            * self.num_modes,
            "none": 0,
        }[self.feedforward]
        layer = score_dense + scores + values + feedforward
        multiply_adds = self.num_layers * layer + 2 * n * self.vocab_size
        return float(TRAINING_FLOPS_FACTOR * 2 * multiply_adds)


@documented
@typing.no_type_check
@dataclasses.dataclass(kw_only=True, unsafe_hash=True)
class TransformerConfig(Frozen, ModelFields):
    """The baseline: decoder-only, pre-RMSNorm, RoPE, SwiGLU, no biases.

    Raises:
      ConfigError: a setting has a value that cannot work.
    """

    width: int = setting(64, "D, width of the residual stream", least=1)
    num_heads: int = setting(4, "H, heads of D / H dimensions each", least=1)
    feedforward_width: int = setting(176, "F, hidden width of the SwiGLU", least=1)
    tied_embedding: bool = setting(False, "whether the readout is the embedding transposed")
    rotary_base: float = setting(10_000.0, "base of RoPE", above=1)
    token_shift: TokenShift = setting(
        "none",
        "``keys`` or ``queries_and_keys`` add those of the previous token, times a learned weight "
        "per channel, which lets one layer copy",
    )

    def _check(self) -> None:
        super()._check()
        if self.width % (2 * self.num_heads):
            raise ConfigError(
                f"TransformerConfig.width must be a multiple of 2 * num_heads (rotary pairs); "
                f"got width {self.width} and {self.num_heads} heads"
            )

    def num_params(self) -> int:
        """Returns the number of learned scalars, the size of the parameter tree."""
        d = self.width
        shifts = {"none": 0, "keys": 1, "queries_and_keys": 2}[self.token_shift]
        layer = 4 * d * d + 3 * d * self.feedforward_width + (2 + shifts) * d
        ends = self.vocab_size * d * (1 if self.tied_embedding else 2) + d
        return self.num_layers * layer + ends

    def flops_per_token(self, context: int) -> float:
        """Returns the floating-point operations of training, per token, counted as for the FSN."""
        d = self.width
        attention = _mean_causal_pairs(context) * 2 * d
        layer = 4 * d * d + attention + 3 * d * self.feedforward_width
        multiply_adds = self.num_layers * layer + d * self.vocab_size
        return float(TRAINING_FLOPS_FACTOR * 2 * multiply_adds)


ARCHITECTURES: dict[str, type[FSNConfig] | type[TransformerConfig]] = {
    "fsn": FSNConfig,
    "transformer": TransformerConfig,
}

REMOVED = {
    "embedding_init": "normal",
    "kernel_init": "first_harmonic",
    "score_harmonics": 1,
    "drift_share": 1.0,
}
"""Settings of earlier versions, and the value that every recorded run has."""


def recorded_fields(
    kind: type[FSNConfig] | type[TransformerConfig], fields: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns all fields of a config that this or an earlier version wrote, in today's names.

    Before ``similarity_heads`` and ``heads_per_phase`` were fields, every head had drift and a
    phase heard one head. Before ``score_scope`` was a field, ``gated`` meant gates that depend on
    content, ``static`` was one gate a phase, and kernels began without frustration angles. Before
    ``feature_scale`` was, features were not scaled, and scores had no frustration angles. Before
    ``mode_weights`` was, a dense layer weighed the collective modes.

    Args:
      kind: the class of the config.
      fields: what ``dataclasses.asdict`` gave; what it lacks gets what it was before it was
        a field, else its default.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    if fields.get("feedforward") == "collective_modes" and "mode_weights" not in fields:
        defaults |= {"mode_weights": "dense"}
    if kind is FSNConfig:
        defaults |= {"score_scope": "all", "similarity_heads": 0, "heads_per_phase": 1}
    if kind is FSNConfig and "feature_scale" not in fields:
        defaults |= {"feature_scale": 1.0, "score_angles": False}
    if kind is FSNConfig and "score_scope" not in fields:
        defaults |= {"score": "projected", "kernel_angle": 0.0}
        renamed = {"gated": "content_gated", "static": "gated"}
        if fields.get("score") in renamed:
            fields = {**fields, "score": renamed[fields["score"]], "score_scope": "block"}
    kept = {name: value for name, value in fields.items() if (name, value) not in REMOVED.items()}
    return {**defaults, **kept}


_Model = typing.TypeVar("_Model", FSNConfig, TransformerConfig)


def match_parameters(config: _Model, num_params: int) -> _Model:
    """Returns the config with the feed-forward width that brings it nearest ``num_params``.

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
