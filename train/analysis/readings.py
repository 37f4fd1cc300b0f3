"""``python -m train readings RUN``: reads a trained FSN as a system of coupled oscillators.

From the kernel of every layer: coupling functions of both delays, frustration angles, signed Daido
coefficients, and how repulsive each harmonic is. From windows of the validation split: attention
entropy, what each head attends to, order parameters, and the frustration that the text itself
brings into the delayed coupling. Writes JSON and, beside it, two figures.
"""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt

from fsn_jax import FSN, FSNConfig
from fsn_jax.coupling import coupling_function
from fsn_jax.readings import (
    LayerState,
    coefficients,
    data_frustration,
    repulsiveness,
    resultant,
    trace_layers,
)
from fsn_jax.torus import order_parameter
from train.analysis.figures import STYLE, panels
from train.analysis.heads import head_names, measure_attention, rounded
from train.analysis.windows import add_window_options, validation_windows
from train.errors import UserError
from train.files import check_output, default_output, write_atomically, writing
from train.load import load
from train.program import Arguments, start_jax
from train.provenance import provenance
from train.tables import text_table

POINTS = 65
"""Number of points of a coupling curve, from -pi to pi."""
BINS = 36
"""Number of bins of a histogram over the circle."""
BAND = (10, 50, 90)
"""Percentiles over the phases that summarise coupling curves."""


@jax.jit
def measure(
    state: LayerState, tokens: jax.Array, segment_ids: jax.Array | None = None
) -> dict[str, Any]:
    """Computes all readings of a layer from its kernel and states, as arrays."""
    strength, angle = coefficients(state.kappa)
    frustration = data_frustration(state.before, state.attention, state.kappa.shape[2])
    mean = resultant(frustration)
    states = {"before": state.before, "coupled": state.coupled, "after": state.after}
    return {
        "strength": strength,
        "angle": angle,
        "repulsiveness": repulsiveness(strength),
        "curves": coupling_function(state.kappa, POINTS),
        "attention": measure_attention(state.attention, tokens, segment_ids),
        "order": {
            place: {
                "token": order_parameter(theta).mean(),
                "coordinates": order_parameter(theta.reshape(-1, theta.shape[-1]).T),
            }
            for place, theta in states.items()
        },
        "frustration": frustration._asdict(),
        "mean_length": jnp.abs(mean),
        "mean_direction": jnp.angle(mean),
    }


def read_layer(
    state: LayerState, tokens: jax.Array, segment_ids: jax.Array | None = None
) -> dict[str, Any]:
    """Returns the readings of one layer on a text, as plain values."""
    measured = jax.device_get(measure(state, tokens, segment_ids))
    frustration = measured.pop("frustration")
    found = rounded(measured)
    num_delays, num_harmonics, num_kernels, _ = state.kappa.shape
    return {
        "coefficients": [
            {
                "delay": delay,
                "harmonic": harmonic + 1,
                "head": head,
                "strength": found["strength"][delay][harmonic][head],
                "angle": found["angle"][delay][harmonic][head],
            }
            for delay in range(num_delays)
            for harmonic in range(num_harmonics)
            for head in range(num_kernels)
        ],
        "repulsiveness": found["repulsiveness"],
        "coupling": [
            {"delay": delay, "head": head}
            | {
                f"p{level}": rounded(np.percentile(measured["curves"][delay, head], level, axis=0))
                for level in BAND
            }
            for delay in range(num_delays)
            for head in range(num_kernels)
        ],
        **found["attention"],
        "order": found["order"],
        "data_frustration": {
            "length": found["mean_length"],
            "direction": found["mean_direction"],
            "histogram": rounded(circle_histogram(**frustration)),
        },
    }


def circle_histogram(
    angle: npt.NDArray[Any], weight: npt.NDArray[Any] | None = None
) -> npt.NDArray[np.float64]:
    """Computes the share of the weight in each of BINS equal arcs from -pi to pi."""
    counts, _ = np.histogram(angle, bins=BINS, range=(-np.pi, np.pi), weights=weight, density=False)
    return np.asarray(counts / max(counts.sum(), 1e-30), np.float64)


def read(
    folder: str,
    *,
    checkpoint: str = "latest",
    num_windows: int = 16,
    length: int = 0,
    data_path: str = "",
) -> dict[str, Any]:
    """Reads a run and returns the content of the JSON file.

    Raises:
      UserError: the run cannot be loaded, or is not of an FSN with a coupling kernel, or its text
        has not the documents that its config wants.
    """
    trained = load(folder, which=checkpoint, data_path=data_path)
    config = trained.experiment.model
    if not isinstance(config, FSNConfig) or not isinstance(trained.model, FSN):
        raise UserError(
            f"the run {folder} is of a transformer, which has no coupling to be read; what its "
            f"heads attend to: python -m train heads {folder}"
        )
    if config.values != "circular":
        raise UserError(
            f"the run {folder} has config.model.values={config.values}, which leaves no coupling "
            f"kernel to be read"
        )
    tokens, segment_ids = validation_windows(trained, num_windows, length)
    variables = {"params": jax.device_get(trained.params)}
    trace = jax.jit(functools.partial(trace_layers, trained.model))
    states = trace(variables, tokens, segment_ids)
    return {
        "kind": "readings",
        "name": trained.experiment.name,
        **trained.source,
        "split": "validation",
        "windows": num_windows,
        "length": tokens.shape[1],
        "kernel_coefficients": config.num_layers
        * config.num_delays
        * config.num_harmonics
        * config.num_heads
        * config.phases_per_kernel,
        "heads": head_names(config),
        "layers": [read_layer(state, tokens, segment_ids) for state in states],
        "provenance": provenance(trained.corpus),
    }


def draw_kernels(page: dict[str, Any], target: Path) -> None:
    """Draws one row a layer: coupling curves and angles for each delay, and the text's own angles.

    The angle of a kernel entry is drawn over the whole circle, weighted by its size: near 0 the
    entry attracts, near pi it repels, in between it drives phases around.
    """
    layers = page["layers"]
    delays = 1 + max(c["delay"] for c in layers[0]["coefficients"])
    columns = 2 * delays + 1
    phi = np.linspace(-np.pi, np.pi, POINTS)
    edges = np.linspace(-np.pi, np.pi, BINS + 1)
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(2.5 * columns, 2.3 * len(layers)), layout="constrained")
        for row, layer in enumerate(layers):
            for delay in range(delays):
                axis = figure.add_subplot(len(layers), columns, row * columns + delay + 1)
                for curve in layer["coupling"]:
                    if curve["delay"] == delay:
                        color = f"C{curve['head'] % 10}"
                        axis.fill_between(phi, curve["p10"], curve["p90"], color=color, alpha=0.18)
                        label = _HEARD.get(curve["head"], f"own + {curve['head']}")
                        axis.plot(phi, curve["p50"], color=color, lw=1.4, label=label)
                if row + delay == 0 and len(layer["coupling"]) > delays:
                    axis.legend(frameon=False, fontsize=6)
                axis.axhline(0, color="0.5", lw=0.7)
                axis.set_xticks([-np.pi, 0, np.pi], [r"$-\pi$", "0", r"$\pi$"])
                axis.set_ylabel("radians", fontsize=7)
                if row == len(layers) - 1:
                    axis.set_xlabel(r"phase difference $\phi$, radians", fontsize=8)
                axis.set_title(
                    rf"layer {row + 1}: update $\Gamma(\phi)$, delay {delay}", fontsize=9
                )
                place = row * columns + delays + delay + 1
                polar = figure.add_subplot(len(layers), columns, place, projection="polar")
                strength = _of_delay(layer, delay, "strength")
                full = _of_delay(layer, delay, "angle") + np.pi * (strength < 0)
                wrapped = np.angle(np.exp(1j * full))
                _rose(polar, edges, circle_histogram(wrapped, np.abs(strength)), "C0")
                polar.set_title(rf"angle $\alpha$, delay {delay}", fontsize=9)
            place = (row + 1) * columns
            polar = figure.add_subplot(len(layers), columns, place, projection="polar")
            _rose(polar, edges, np.array(layer["data_frustration"]["histogram"]), "C1")
            polar.set_title(r"$-(\theta_{u+1}-\theta_u)$ of the text", fontsize=9)
        figure.savefig(target, dpi=120)
        plt.close(figure)


_HEARD = {0: "own head", 1: "next head"}
"""Heads that a phase hears, counted from the head of its block."""


def _of_delay(layer: dict[str, Any], delay: int, what: str) -> npt.NDArray[np.float64]:
    return np.concatenate([np.array(c[what]) for c in layer["coefficients"] if c["delay"] == delay])


def _rose(axis: Any, edges: npt.NDArray[Any], share: npt.NDArray[Any], color: str) -> None:
    """Draws a histogram over the circle with areas, not radii, in proportion."""
    width = edges[1] - edges[0]
    axis.bar(edges[:-1] + width / 2, np.sqrt(share), width=width, color=color, alpha=0.8, lw=0)
    axis.set_yticklabels([])
    axis.set_xticks(np.pi / 2 * np.arange(4), ["0", r"$\pi/2$", r"$\pi$", r"$-\pi/2$"], fontsize=8)


def draw_depth(page: dict[str, Any], target: Path) -> None:
    """Draws order parameters, attention entropy and repeats, and the text's angles by layer."""
    layers = page["layers"]
    depth = np.arange(len(layers))
    with panels(target, 1, 4, figsize=(14.5, 3.4)) as axes:
        by_depth = [layers[0]["order"]["before"], *(layer["order"]["after"] for layer in layers)]
        coordinates = np.array([order["coordinates"] for order in by_depth])
        places = np.arange(len(by_depth))
        axes[0].plot(places, coordinates, color="0.3", alpha=0.12, lw=0.8)
        axes[0].plot(
            places, np.median(coordinates, axis=1), color="0.3", marker="o",
            label="each phase, over the text (thin); their median",
        )  # fmt: skip
        axes[0].plot(
            places, [order["token"] for order in by_depth], color="C3", marker="s",
            label="each token, over its phases (mean)",
        )  # fmt: skip
        axes[0].set_xticks(places, ["embedding", *(str(i + 1) for i in depth)])
        axes[0].set_ylabel("order parameter")
        axes[0].set_ylim(0, 1)
        axes[0].legend(frameon=False, fontsize=7)
        entropy = np.array([layer["relative_entropy"] for layer in layers])
        axes[1].plot(depth, entropy, marker="o", lw=1, label=page["heads"])
        axes[1].set_ylabel("entropy of attention\n(1: even over the tokens seen)")
        axes[1].set_ylim(0, 1)
        repeat = np.array([layer["attention_to"]["repeat"] for layer in layers])
        axes[2].plot(depth, repeat, marker="o", lw=1, label=page["heads"])
        axes[2].set_ylabel("attention weight on ends of\nrepeats of two characters")
        axes[2].set_ylim(0, max(0.1, 1.1 * repeat.max()))
        length = np.array([layer["data_frustration"]["length"] for layer in layers])
        axes[3].boxplot(length.T, positions=depth, widths=0.5)
        axes[3].set_ylabel(
            "length of the mean of\n$e^{i(\\theta_u - \\theta_{u+1})}$ over the text"
        )
        axes[3].set_ylim(0, 1)
        for axis in axes[1:3]:
            axis.legend(frameon=False, fontsize=7)
        for axis in axes[1:]:
            axis.set_xticks(depth, [str(i + 1) for i in depth])
        for axis in axes:
            axis.set_xlabel("layer")


def program(argv: Sequence[str]) -> None:
    """Runs the program with the arguments of its command line."""
    p = Arguments(prog="python -m train readings", description=__doc__)
    p.add_argument("run", help="the folder of an FSN's run with checkpoints")
    p.add_argument("--output", help="a .json; else readings.json with the run")
    p.add_checkpoint_options("latest")
    add_window_options(p, windows=16)
    options = p.parse_args(argv[1:])
    wanted = options.output or default_output([options.run], "readings.json")
    output = check_output(wanted, ".json", beside=("_kernels.png", "_depth.png"))
    start_jax()
    page = read(
        options.run,
        checkpoint=options.checkpoint,
        num_windows=options.windows,
        length=options.length,
        data_path=options.data_path,
    )
    kernels, depth = (output.with_name(output.stem + end) for end in ("_kernels.png", "_depth.png"))
    with writing("--output", output):
        write_atomically(output, json.dumps(page) + "\n")
        draw_kernels(page, kernels)
        draw_depth(page, depth)
    print(summary_text(page))
    print(f"\n{output}\n{kernels}\n{depth}")


def summary_text(page: dict[str, Any]) -> str:
    """Formats one line a layer: a summary of its kernel and states."""
    rows: list[tuple[str, ...]] = [
        ("layer", "repulsive (delay 0; 1)", "|angle|", "entropy", "to repeats", "order",
         "text's frustration")
    ]  # fmt: skip
    for number, layer in enumerate(page["layers"], 1):
        repelling = "; ".join(
            " ".join(f"{share:.2f}" for share in by_harmonic)
            for by_harmonic in layer["repulsiveness"]
        )
        means = (
            np.mean(np.abs(np.concatenate([c["angle"] for c in layer["coefficients"]]))),
            np.mean(layer["attention_entropy"]),
            np.max(layer["attention_to"]["repeat"]),
            np.mean(layer["order"]["after"]["coordinates"]),
            np.mean(layer["data_frustration"]["length"]),
        )
        rows.append((str(number), repelling, *(f"{mean:.3f}" for mean in means)))
    return text_table(rows)
