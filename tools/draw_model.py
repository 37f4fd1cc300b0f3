"""The pictures of README and docs/model.md, drawn with the library: python tools/draw_model.py.

Writes coupling_curve.png, delay_term.png and model.png to docs/images.
"""

from pathlib import Path

import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle

from fsn_jax.coupling import coupling_function, coupling_update

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#8A8A8A"
STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 130}
QUARTERS = ([-np.pi, -np.pi / 2, 0, np.pi / 2, np.pi], ["−π", "−π/2", "0", "π/2", "π"])


def curve(*coefficients: complex) -> np.ndarray:
    """Returns the coupling function of one phase, ``[256]``, for kappa of each harmonic."""
    kappa = jnp.array(coefficients, jnp.complex64)[None, :, None]
    return np.asarray(coupling_function(kappa))[0, 0]


def draw_coupling_curve(target: Path) -> None:
    """Draws what frustration angle, second harmonic and sign do to the coupling function."""
    phi = np.linspace(-np.pi, np.pi, 256)
    alpha = np.pi / 4
    panels = {
        "Frustration angle: the zero moves by α": [
            ("Kuramoto: κ = 1", curve(1), GREY),
            ("Sakaguchi: κ = exp(−iπ/4)", curve(np.exp(-1j * alpha)), BLUE),
        ],
        "Second harmonic: the slopes change": [
            ("κ₁ = 1", curve(1), GREY),
            ("Daido: κ₁ = 1, κ₂ = −1/2", curve(1, -0.5), GREEN),
        ],
        "Sign: attraction becomes repulsion": [
            ("κ = 1, attracts", curve(1), GREY),
            ("κ = −0.7, repels", curve(-0.7), ORANGE),
        ],
    }
    figure, row = plt.subplots(1, 3, figsize=(11, 3.3), sharey=True, layout="constrained")
    for axes, (title, curves) in zip(row, panels.items(), strict=True):
        for label, gamma, color in curves:
            axes.plot(phi, gamma, color=color, lw=2, label=label)
        axes.axhline(0, color="black", lw=0.7)
        axes.plot([0, 0], [-1.5, 1.4], color="black", lw=0.7)
        axes.set_title(title, fontsize=11)
        axes.set_xticks(*QUARTERS)
        axes.set_ylim(-1.5, 2.15)
        axes.legend(frameon=False, loc="upper left", fontsize=9)
    row[0].annotate(
        "",
        (alpha, -0.25),
        (0, -0.25),
        arrowprops={"arrowstyle": "<|-|>", "color": BLUE, "shrinkA": 0, "shrinkB": 0},
    )
    row[0].text(alpha + 0.12, -0.33, "α", color=BLUE)
    row[0].plot([alpha], [0], "o", color=BLUE, ms=6)
    row[0].set_ylabel("push on the receiver Γ(φ), radians")
    figure.supxlabel("phase of the source less that of the receiver, φ, radians", fontsize=10)
    figure.savefig(target)
    plt.close(figure)


LETTERS = {"A": 0.15, "B": 1.75, "C": 3.4, "D": 5.0}
"""Phases in radians, as in examples/tour.ipynb."""

COLORS = {"A": BLUE, "B": GREY, "C": GREY, "D": ORANGE}


def draw_delay_term(target: Path) -> None:
    """Draws which tokens couple and how each delay moves the phase of the last token."""
    text = "CADBA"
    figure = plt.figure(figsize=(11.5, 3.7), layout="constrained")
    left, middle, right = figure.subfigures(1, 3, width_ratios=(1.25, 1, 1))
    _draw_text(left.add_subplot(), text)
    for panel, kappa, title in (
        (
            middle,
            [[[0.8]], [[0.0]]],
            "Coupled to that A (τ = 0):\nsame phase, so nothing moves",
        ),
        (
            right,
            [[[0.0]], [[0.8]]],
            "Coupled to its successor (τ = 1):\nthe phase turns from A to D",
        ),
    ):
        wheel = panel.add_subplot(projection="polar")
        _draw_wheel(wheel, phases_under_coupling(text, kappa))
        wheel.set_title(title, fontsize=11, pad=12)
    figure.savefig(target)
    plt.close(figure)


def phases_under_coupling(
    text: str, kappa: list[list[list[float]]], updates: int = 8
) -> list[float]:
    """Computes the last token's phase before and after each update, in radians.

    It attends to the second token alone; the other tokens keep their phases.
    """
    theta = jnp.array([LETTERS[c] for c in text])[None, :, None]  # [B, L, N] = [1, 5, 1]
    attention = jnp.eye(len(text)).at[-1].set(jnp.eye(len(text))[1])[None, None]
    kernel = jnp.array(kappa, jnp.complex64)  # [T, M, N]
    path = [float(theta[0, -1, 0])]
    for _ in range(updates):
        theta = theta.at[0, -1].add(coupling_update(theta, attention, kernel)[0, -1])
        path.append(float(theta[0, -1, 0]))
    return path


def _draw_text(axes: Axes, text: str) -> None:
    """Draws the tokens in a row, with one arrow for attention and one for the pull."""
    last = len(text) - 1
    for place, c in enumerate(text):
        axes.text(
            place, 0, c, ha="center", va="center", fontsize=22, weight="bold", color=COLORS[c]
        )
    axes.text(last + 1, 0, "?", ha="center", va="center", fontsize=22, color=GREY)
    for place, label in ((1, "u"), (2, "u + 1"), (last, "t")):
        axes.text(place, -0.5, label, ha="center", va="center", color=GREY, style="italic")
    arrow = {"arrowstyle": "-|>", "mutation_scale": 16, "lw": 2}
    for start, end, bend, look in (
        ((last, 0.26), (1, 0.26), 0.5, {"color": BLUE, "ls": "--"}),
        ((2, -0.72), (last, -0.72), 0.45, {"color": ORANGE}),
    ):
        axes.add_patch(
            FancyArrowPatch(start, end, connectionstyle=f"arc3,rad={bend}", **arrow, **look)
        )
    axes.text(2.5, 1.2, "attends to the earlier A", color=BLUE, ha="center", va="center")
    axes.text(3, -1.38, "and is pulled by its successor, D", color=ORANGE, ha="center", va="center")
    axes.set(xlim=(-0.5, 5.5), ylim=(-1.75, 1.5))
    axes.set_axis_off()
    axes.set_title("The last A: what comes next?", fontsize=11, pad=12)


def _draw_wheel(wheel: Axes, path: list[float]) -> None:
    """Draws the circle of phases, its letters, and the path of one phase."""
    ring = np.linspace(0, 2 * np.pi, 200)
    wheel.plot(ring, np.ones_like(ring), color=GREY, lw=1)
    for c, angle in LETTERS.items():
        wheel.plot([angle], [1], "o", color=COLORS[c], ms=8)
        wheel.text(
            angle, 1.25, c, ha="center", va="center", fontsize=15, weight="bold", color=COLORS[c]
        )
    wheel.plot(path, np.full(len(path), 0.82), "o", color=BLUE, ms=5)
    wheel.plot(np.linspace(path[0], path[-1]), np.full(50, 0.82), color=BLUE, lw=1.2)
    wheel.annotate(
        "", (path[-1], 0.78), (0, 0), arrowprops={"arrowstyle": "-|>", "color": BLUE, "lw": 2}
    )
    note = "small dots: phase\nafter each update\narrow: where it ends"
    wheel.text(2.75, 0.5, note, ha="center", va="center", fontsize=8, color=GREY)
    wheel.set(ylim=(0, 1.4), yticks=[], xticks=[])
    wheel.grid(False)
    wheel.spines["polar"].set_visible(False)


BOXES = [
    (0.0, 1.1, "tokens\n[B, L]", GREY),
    (1.75, 1.1, "embedding:\none angle vector\na token", "black"),
    (4.45, 2.3, "score: which tokens couple\nA = softmax (causal)", BLUE),
    (4.45, 0.3, "coupling by the kernel κ\nharmonics m, delays τ", ORANGE),
    (7.25, 0.3, "feed-forward\nSwiGLU or modes", GREEN),
    (9.75, 1.1, "readout:\nlinear on\ncos θ, sin θ", "black"),
    (11.5, 1.1, "logits\n[B, L, V]", GREY),
]
"""Centre, text and colour."""

WIRES = [
    ("black", (0.32, 1.1), (1.07, 1.1)),
    ("black", (2.43, 1.1), (9.24, 1.1)),
    ("black", (10.26, 1.1), (11.12, 1.1)),
    (BLUE, (3.2, 1.1), (3.2, 2.3), (3.42, 2.3)),
    (BLUE, (4.45, 2.02), (4.45, 0.6)),
    (ORANGE, (3.2, 1.1), (3.2, 0.3), (3.52, 0.3)),
    (ORANGE, (5.4, 0.3), (6.05, 0.3), (6.05, 0.98)),
    (GREEN, (6.4, 1.1), (6.4, 0.3), (6.54, 0.3)),
    (GREEN, (7.96, 0.3), (8.3, 0.3), (8.3, 0.98)),
]
"""Colour and corners of each line; it ends in an arrow."""


def draw_model(target: Path) -> None:
    """Draws a forward pass: embedding, one block with its two updates, readout."""
    figure, axes = plt.subplots(figsize=(11.5, 3.4), layout="constrained")
    for color, *corners in WIRES:
        xs, ys = zip(*corners, strict=True)
        axes.plot(xs[:-1], ys[:-1], color=color, lw=1.5)
        axes.annotate(
            "",
            corners[-1],
            corners[-2],
            arrowprops={"arrowstyle": "-|>", "color": color, "lw": 1.5, "shrinkA": 0, "shrinkB": 0},
        )
    for x, y, text, color in BOXES:
        box = {"boxstyle": "round,pad=0.4", "fc": "white", "ec": color, "lw": 1.5}
        axes.text(x, y, text, ha="center", va="center", fontsize=9.5, color=color, bbox=box)
    for x, color in ((6.05, ORANGE), (8.3, GREEN)):
        axes.plot([x], [1.1], "o", ms=13, color="white", mec=color, mew=1.5, zorder=4)
        axes.text(x, 1.09, "+", ha="center", va="center", color=color, fontsize=12, zorder=5)
    axes.text(4.55, 1.5, "A", color=BLUE)
    axes.text(4.6, 1.19, "θ [B, L, N], radians", fontsize=9)
    axes.text(8.7, 2.83, "block, repeated num_layers times", fontsize=9.5, color=GREY, ha="right")
    axes.add_patch(Rectangle((2.8, -0.2), 5.9, 2.95, fc="none", ec=GREY, ls=":"))
    axes.set(xlim=(-0.45, 12.0), ylim=(-0.3, 3.1))
    axes.set_axis_off()
    figure.savefig(target)
    plt.close(figure)


def main() -> None:
    """Draws all three."""
    with plt.rc_context(STYLE):
        draw_coupling_curve(IMAGES / "coupling_curve.png")
        draw_delay_term(IMAGES / "delay_term.png")
        draw_model(IMAGES / "model.png")


if __name__ == "__main__":
    main()
