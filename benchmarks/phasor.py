"""Time and error of cosine and sine: the library's, and the polynomial of ``fsn_jax.torus``.

python -m benchmarks.phasor
"""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from fsn_jax.torus import phasor
from train.provenance import device_description

ELEMENTS = 2_000_000
ROUNDS = 15


def both(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Uses both results, so that neither is dead code."""
    return pair[0] + pair[1]


CONTENDERS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "cos + sin": lambda x: both((jnp.cos(x), jnp.sin(x))),
    "phasor": lambda x: both(phasor(x)),
    "copy": lambda x: x + 1.0,
}


def main() -> None:
    """Prints nanoseconds an element, timed in turn in one process, and the largest error."""
    x = jax.random.normal(jax.random.key(0), (ELEMENTS,))
    programs = {name: jax.jit(f) for name, f in CONTENDERS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for program in programs.values():
        program(x).block_until_ready()  # compiles
    for _ in range(ROUNDS):
        for name, program in programs.items():
            began = time.perf_counter()
            program(x).block_until_ready()
            seconds[name].append(time.perf_counter() - began)
    print(f"{device_description()} · {ELEMENTS:,} float32 · medians (quartiles) of {ROUNDS} rounds")
    for name, times in seconds.items():
        low, middle, high = np.quantile(times, [0.25, 0.5, 0.75]) / ELEMENTS * 1e9
        print(f"{name:10} {middle:6.2f} ns an element ({low:.2f}-{high:.2f})")
    for turn in (1.0, 100.0, 9000.0):
        angles = np.random.default_rng(0).uniform(-turn, turn, ELEMENTS).astype(np.float32)
        z = phasor(jnp.asarray(angles))
        exact = np.exp(1j * angles.astype(np.float64))
        error = np.abs(np.asarray(z.re) + 1j * np.asarray(z.im) - exact).max()
        print(f"largest error up to {turn:g} rad: {error:.1e}")


if __name__ == "__main__":
    main()
