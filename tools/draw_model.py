"""The pictures of docs/model.md, from the library's own functions: python tools/draw_model.py.

Writes docs/images/coupling_curve.png and docs/images/delay_term.png.
"""

from pathlib import Path

import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyArrowPatch

from fsn_jax.coupling import coupling_function, coupling_update

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#8A8A8A"
STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 130}
QUARTERS = ([-np.pi, -np.pi / 2, 0, np.pi / 2, np.pi], ["−π", "−π/2", "0", "π/2", "π"])


def curve(*coefficients: complex) -> np.ndarray:
    """Gamma(phi) of one phase, ``[256]``, given kappa of each harmonic."""
    kappa = jnp.array(coefficients, jnp.complex64)[None, :, None]
    return np.asarray(coupling_function(kappa))[0, 0]


def draw_coupling_curve(target: Path) -> None:
    """What the two parts of the kernel do to the plain sine."""
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


LETTERS = {"A": 0.4, "B": 2.2, "C": 3.6, "D": 5.3}
"""Phases in radians."""


def draw_delay_term(target: Path) -> None:
    """Left: which tokens couple with which delay. Right: where that takes the phase."""
    text = "CADBA"
    theta = jnp.array([LETTERS[c] for c in text])[None, :, None]
    attention = jnp.eye(5).at[4].set(jnp.eye(5)[1])[None, None]
    kappa = jnp.array([[[0.0]], [[0.5]]], jnp.complex64)
    path = [float(theta[0, -1, 0])]
    for _ in range(8):
        theta = theta.at[0, -1].add(coupling_update(theta, attention, kappa)[0, -1])
        path.append(float(theta[0, -1, 0]))

    figure = plt.figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.5, 1))
    axes = left.add_subplot()
    for place, c in enumerate(text):
        mine = place == 4
        axes.text(
            place,
            0,
            c,
            ha="center",
            va="center",
            fontsize=20,
            weight="bold",
            color=BLUE if mine else "black",
        )
        label = {1: "u", 2: "u + 1", 4: "t"}.get(place, "")
        axes.text(place, -0.42, label, ha="center", color=GREY, style="italic")
    axes.text(5, 0, "?", ha="center", va="center", fontsize=20, color=GREY)
    for start, end, bend, color, style in (
        ((4, 0.28), (1, 0.28), 0.42, GREY, "--"),
        ((2, 0.28), (4, 0.2), -0.32, BLUE, "-"),
    ):
        axes.add_patch(
            FancyArrowPatch(
                start,
                end,
                connectionstyle=f"arc3,rad={bend}",
                arrowstyle="-|>",
                mutation_scale=16,
                color=color,
                lw=1.8,
                ls=style,
            )
        )
    axes.text(2.5, 0.98, "attends: same character, A[t, u]", color=GREY, ha="center")
    axes.text(5.3, 0.62, "is pulled to the\nsuccessor, κ[1]", color=BLUE, ha="right")
    axes.set(xlim=(-0.6, 5.6), ylim=(-0.6, 1.15))
    axes.set_axis_off()
    axes.set_title("The delay term couples t to u + 1", fontsize=11)

    wheel = right.add_subplot(projection="polar")
    ring = np.linspace(0, 2 * np.pi, 200)
    wheel.plot(ring, np.ones_like(ring), color=GREY, lw=1)
    for c, angle in LETTERS.items():
        wheel.plot([angle], [1], "o", color="black", ms=5)
        wheel.text(angle, 1.22, c, ha="center", va="center", fontsize=14, weight="bold")
    wheel.plot(path, np.linspace(0.55, 0.92, len(path)), "o-", color=BLUE, ms=4, lw=1.2)
    wheel.annotate(
        "", (path[-1], 0.93), (0, 0), arrowprops={"arrowstyle": "-|>", "color": BLUE, "lw": 2}
    )
    wheel.set(ylim=(0, 1.35), yticks=[], xticks=[])
    wheel.grid(False)
    wheel.spines["polar"].set_visible(False)
    wheel.set_title("The phase of t, eight updates: from A to D", fontsize=11)
    figure.savefig(target)
    plt.close(figure)


def main() -> None:
    """Draws both."""
    with plt.rc_context(STYLE):
        draw_coupling_curve(IMAGES / "coupling_curve.png")
        draw_delay_term(IMAGES / "delay_term.png")


if __name__ == "__main__":
    main()
