"""Reading a trained FSN as a system of coupled oscillators: its layers, kernels and states.

Attention is read of either kind of model, with ``trace_attention`` and ``attention_targets``.

``fsn_jax.coupling.coupling_function`` is the kernel as a curve, ``fsn_jax.torus.order_parameter``
the order of a state; this module has the other readings. Source of the names: a kernel entry
``kappa = rho exp(-i alpha)`` acts as ``rho sin(m (theta_u - theta_t) - alpha)``, so alpha is the
frustration angle of Sakaguchi and Kuramoto and rho the coefficient of Daido's m-th harmonic.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex64, Float, Int

from fsn_jax.fsn import FSN
from fsn_jax.torus import imaginary_product, phasor, real_product
from fsn_jax.transformer import Transformer


class Coefficients(NamedTuple):
    """Kernel entries in polar form, signed: ``kappa = strength exp(-i angle)``.

    Attributes:
      strength: Daido coefficients; attractive if positive, repulsive if negative.
      angle: frustration angles in radians, from -pi / 2 to pi / 2.
    """

    strength: Float[Array, "*shape"]
    angle: Float[Array, "*shape"]


def coefficients(kappa: Complex64[Array, "*shape"]) -> Coefficients:
    """Returns strength and frustration angle of kernel entries, signed as the in-phase part."""
    sign = jnp.where(kappa.real < 0, -1.0, 1.0)
    return Coefficients(sign * jnp.abs(kappa), -jnp.angle(sign * kappa))


def repulsiveness(strength: Float[Array, "T M *phases"]) -> Float[Array, "T M"]:
    """Computes the share of a harmonic's strength that repels: 0 if every phase attracts."""
    total = jnp.abs(strength).reshape(*strength.shape[:2], -1).sum(axis=-1)
    repelling = jnp.maximum(-strength, 0.0).reshape(*strength.shape[:2], -1).sum(axis=-1)
    return repelling / jnp.maximum(total, jnp.finfo(total.dtype).tiny)


class LayerState(NamedTuple):
    """Phases before, within and after a block, its attention and its kernel, for some text.

    Attributes:
      before: phases that enter it, radians.
      coupled: phases after its coupling.
      after: phases after its feed-forward.
      attention: its weights, causal rows that sum to one.
      kappa: its coupling kernel, ``[T, M, J, N]``.
    """

    before: Float[Array, "B L N"]
    coupled: Float[Array, "B L N"]
    after: Float[Array, "B L N"]
    attention: Float[Array, "B H L L"]
    kappa: Complex64[Array, "T M J N"]


def trace_layers(
    model: FSN,
    variables: dict[str, Any],
    tokens: Int[Array, "B L"],
    segment_ids: Int[Array, "B L"] | None = None,
    positions: Int[Array, "*B L"] | None = None,
) -> list[LayerState]:
    """Computes the state of every block of an FSN over some text.

    Args:
      model: of the architecture.
      variables: its parameters, under ``params``.
      tokens: token ids.
      segment_ids: tokens couple to those of their own segment; None: all are in one.
      positions: of the tokens, for the drift; None: 0, 1, 2, ...

    Raises:
      ValueError: the model has linear values, so there is no kernel.
    """
    if model.config.values != "circular":
        raise ValueError(f"values={model.config.values!r} have no coupling kernel to be read")

    def walk(model: FSN, tokens: Array) -> list[LayerState]:
        theta = model.embedding(tokens)
        states = []
        for block in model.blocks:
            kappa = jax.lax.complex(*block.attention.kappa())
            update = block.attention(theta, segment_ids=segment_ids, positions=positions)
            coupled = theta + update
            weights = block.attention_weights(theta, segment_ids, positions)
            after = block(theta, segment_ids, positions, True)
            states.append(LayerState(theta, coupled, after, weights, kappa))
            theta = after
        return states

    states: Any = model.apply(variables, tokens, method=walk)
    return states


def trace_attention(
    model: FSN | Transformer,
    variables: dict[str, Any],
    tokens: Int[Array, "B L"],
    segment_ids: Int[Array, "B L"] | None = None,
    positions: Int[Array, "*B L"] | None = None,
) -> list[Float[Array, "B H L L"]]:
    """Computes the attention weights of every block of a model over some text.

    Args:
      model: of either architecture.
      variables: its parameters, under ``params``.
      tokens: token ids.
      segment_ids: tokens attend to those of their own segment; None: all are in one.
      positions: of the tokens, for the drift of an FSN or a transformer's rotation; None: 0, 1, ...
    """

    def walk(model: FSN | Transformer, tokens: Array) -> list[Array]:
        state, weights = model.embedding(tokens), []
        for block in model.blocks:
            weights.append(block.attention_weights(state, segment_ids, positions))
            state = block(state, segment_ids, positions, True)
        return weights

    weights: Any = model.apply(variables, tokens, method=walk)
    return weights


class AttentionTargets(NamedTuple):
    """What a head attends to: mean weights, from 0 to 1.

    Attributes:
      itself: of a token for itself, where the coupling has nothing to pull at but its own angle.
      previous: for the token before.
      repeat: for all earlier tokens that end the same two characters as the token, together. The
        delayed term couples to their successors: a head with much of it copies (is an induction
        head, in one layer).
      after_repeat: for the earlier tokens that follow one of those, together: what an induction
        head of a transformer attends to.
    """

    itself: Float[Array, " H"]
    previous: Float[Array, " H"]
    repeat: Float[Array, " H"]
    after_repeat: Float[Array, " H"]


def attention_targets(
    attention: Float[Array, "B H L L"],
    tokens: Int[Array, "B L"],
    segment_ids: Int[Array, "B L"] | None = None,
) -> AttentionTargets:
    """Computes the mean weights of each head on each target, over the tokens that have one.

    Args:
      attention: weights.
      tokens: token ids.
      segment_ids: targets are in the token's own segment; None: all are in one.
    """
    batch, length = tokens.shape
    same = tokens[:, :, None] == tokens[:, None, :]
    before = same[:, :-1, :-1]
    if segment_ids is not None:  # both with the token before in their own segment
        follows = segment_ids[:, 1:] == segment_ids[:, :-1]
        before &= follows[:, :, None] & follows[:, None, :]
    before = jnp.pad(before, ((0, 0), (1, 0), (1, 0)))
    own, one_before = (jnp.eye(length, k=-step, dtype=bool)[None] for step in (0, 1))
    repeat = same & before & jnp.tri(length, k=-1, dtype=bool)[None]
    after = jnp.pad(repeat[:, :, :-1], ((0, 0), (0, 0), (1, 0))) & ~own
    masks = (own, one_before, repeat, after)

    def mean(mask: Array) -> Array:
        mask = jnp.broadcast_to(mask, (batch, length, length))
        if segment_ids is not None:
            mask &= segment_ids[:, :, None] == segment_ids[:, None, :]
        mask = mask[:, None]
        received = jnp.where(mask, attention, 0).sum(axis=(0, 2, 3))
        return received / jnp.maximum(mask.any(axis=-1).sum(), 1)

    return AttentionTargets(*map(mean, masks))


class WeightedAngles(NamedTuple):
    """Angles in radians and how much each of them counts."""

    angle: Float[Array, "B L1 N"]
    weight: Float[Array, "B L1 N"]


def data_frustration(
    theta: Float[Array, "B L N"], attention: Float[Array, "B H L L"], heads_per_phase: int
) -> WeightedAngles:
    """Computes the frustration angles that the text itself brings into the delayed coupling.

    A token couples to the successor of what it attends to, and ``sin(theta_{u+1} - theta_t) =
    sin(theta_u - theta_t - alpha_u)`` with ``alpha_u = -(theta_{u+1} - theta_u)``: the text's
    transition at u acts as a frustration angle. It counts as much as it is attended to, by the
    heads that the phase hears, from all t > u.

    Args:
      theta: the phases that the layer couples, in radians.
      attention: its weights.
      heads_per_phase: J; a phase of block h hears heads h, ..., h + J - 1 (modulo H).
    """
    z = phasor(theta)
    here = jax.tree.map(lambda part: part[:, :-1], z)
    after = jax.tree.map(lambda part: part[:, 1:], z)
    angle = -jnp.arctan2(imaginary_product(here, after), real_product(here, after))
    received = jnp.tril(attention, -1).sum(axis=2)[:, :, :-1]
    heard = sum(jnp.roll(received, -j, axis=1) for j in range(heads_per_phase)) / heads_per_phase
    per_head = theta.shape[-1] // attention.shape[1]
    return WeightedAngles(angle, jnp.repeat(jnp.moveaxis(heard, 1, 2), per_head, axis=-1))


def resultant(angles: WeightedAngles) -> Complex64[Array, " N"]:
    """Computes the weighted mean of ``exp(i angle)`` of each phase over the text.

    Its argument is the mean angle in radians; its length is 1 if the angle is always the same, 0
    if it is anything.
    """
    z = phasor(angles.angle)
    total = angles.weight.sum(axis=(0, 1))
    mean_re, mean_im = ((part * angles.weight).sum(axis=(0, 1)) for part in z)
    return jax.lax.complex(mean_re, mean_im) / jnp.maximum(total, jnp.finfo(total.dtype).tiny)
