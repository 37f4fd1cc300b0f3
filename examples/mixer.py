"""A small transformer in plain Flax, and the three lines that make it an FSN-mixer.

Both learn to repeat: a sequence has random symbols with a random period, so that from the second
symbol of the second period on each can be known from the first period. The mixer's lines turn the
residual stream into phases, couple them, and turn them back; everything else is the transformer's.

    python examples/mixer.py --output mixer.png   # half a minute of one core

At the 400 steps of the default, seed 0, the mixer is right in 90.9% of the last 20 steps and passes
90% at step 69; the transformer is at 47.8% (jax 0.10.2 on a CPU).
"""

import argparse
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array

from fsn_jax import FrustratedAttention

SYMBOLS, LENGTH, WIDTH, HEADS, LAYERS, BATCH = 32, 32, 64, 2, 2, 32
PERIODS = 6, 16


class Block(nn.Module):
    """Attention or the mixer, then an MLP, each added to the residual stream."""

    mixer: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """The residual stream, ``[B, L, D]``, after the block."""
        y = nn.LayerNorm()(x)
        if self.mixer:
            theta = nn.Dense(WIDTH)(y)  # phases, in radians
            theta = theta + FrustratedAttention(num_heads=HEADS)(theta)
            x = x + nn.Dense(WIDTH)(jnp.concatenate([jnp.cos(theta), jnp.sin(theta)], axis=-1))
        else:
            mask = nn.make_causal_mask(x[..., 0])
            x = x + nn.MultiHeadDotProductAttention(num_heads=HEADS)(y, mask=mask)
        y = nn.Dense(2 * WIDTH)(nn.LayerNorm()(x))
        return x + nn.Dense(WIDTH)(nn.gelu(y))


class Model(nn.Module):
    """A language model of a few blocks."""

    mixer: bool

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        """Logits ``[B, L, V]`` of tokens ``[B, L]``."""
        x = nn.Embed(SYMBOLS, WIDTH)(tokens)
        if not self.mixer:  # the mixer knows distances by itself
            x = x + nn.Embed(LENGTH, WIDTH)(jnp.arange(tokens.shape[1]))[None]
        for _ in range(LAYERS):
            x = Block(self.mixer)(x)
        return nn.Dense(SYMBOLS)(nn.LayerNorm()(x))


@functools.partial(jax.jit, static_argnames=("mixer", "steps"))
def train(mixer: bool, steps: int, seed: int = 0) -> Array:
    """Returns the share of what can be known that is predicted right, at each step of training."""
    model, optimizer = Model(mixer), optax.adam(optax.cosine_decay_schedule(3e-3, steps))
    init, draws = jax.random.split(jax.random.key(seed))
    params: Any = model.init(init, jnp.zeros((1, LENGTH - 1), jnp.int32))

    def loss(params: Any, tokens: Array, known: Array) -> tuple[Array, Array]:
        logits: Any = model.apply(params, tokens[:, :-1])
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        right = logits.argmax(axis=-1) == tokens[:, 1:]
        return (nats * known).sum() / known.sum(), (right & known).sum() / known.sum()

    def step(state: tuple[Any, Any], key: Array) -> tuple[tuple[Any, Any], Array]:
        params, memory = state
        of_symbols, of_periods = jax.random.split(key)
        symbols = jax.random.randint(of_symbols, (BATCH, LENGTH), 0, SYMBOLS)
        period = jax.random.randint(of_periods, (BATCH, 1), *PERIODS)
        place = jnp.arange(LENGTH)[None]
        tokens = jnp.take_along_axis(symbols, place % period, axis=1)
        known = place[:, :-1] >= period
        gradient, right = jax.grad(loss, has_aux=True)(params, tokens, known)
        updates, memory = optimizer.update(gradient, memory)
        return (optax.apply_updates(params, updates), memory), right

    curve: Array
    _, curve = jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(draws, steps))
    return curve


def main() -> None:
    """Trains both, prints when each is right nine times in ten, and draws the curves."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--steps", type=int, default=400, help="training steps")
    p.add_argument("--seed", type=int, default=0, help="seed of parameters and sequences")
    p.add_argument("--output", default="", help="file for the picture; none if empty")
    options = p.parse_args()
    curves = {
        name: train(mixer, options.steps, options.seed)
        for name, mixer in (("with attention", False), ("with FrustratedAttention", True))
    }
    for name, curve in curves.items():
        reached = jnp.flatnonzero(curve >= 0.9)
        when = f"90% right at step {int(reached[0])}" if reached.size else "90% not reached"
        print(f"{name:24} {when}; {float(curve[-20:].mean()):.1%} right in the last 20 steps")
    if options.output:
        import matplotlib

        matplotlib.use("agg")
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
        for (name, curve), color in zip(curves.items(), ("C1", "C0"), strict=True):
            axes.plot(curve, color=color, label=name)
        axes.set(
            xlabel="training step", ylabel="share of predictable tokens predicted", ylim=(0, 1.02)
        )
        axes.legend()
        figure.savefig(options.output, dpi=150)


if __name__ == "__main__":
    main()
