"""Figures of runs, made from their logs alone."""

import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from train.metrics import read_rows


def loss_curve(runs: Sequence[Path], target: Path) -> None:
    """Bits per character against characters seen: training as a thin line, validation as dots."""
    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        for index, run in enumerate(runs):
            rows = read_rows(run / "metrics.jsonl")
            name = json.loads((run / "config.json").read_text())["name"]
            color = f"C{index}"
            for kind, style in (
                ("train", {"lw": 1, "alpha": 0.6}),
                ("validation", {"marker": "o", "ms": 4, "lw": 1.5}),
            ):
                points = [row for row in rows if row["kind"] == kind]
                axes.plot(
                    [row["characters"] / 1e6 for row in points],
                    [row["bpc"] for row in points],
                    color=color,
                    label=f"{name}, {kind}",
                    **style,
                )
        validation = [
            row["bpc"]
            for run in runs
            for row in read_rows(run / "metrics.jsonl")
            if row["kind"] == "validation"
        ]
        if validation:
            axes.set_ylim(min(validation) - 0.1, max(validation) + 1.0)
        axes.set_xlabel("characters seen, millions")
        axes.set_ylabel("bits per character")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        figure.savefig(target, dpi=150)
        plt.close(figure)
