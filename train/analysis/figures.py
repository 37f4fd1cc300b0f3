"""``python -m train figures RUN ... --output=FILE.png``: draws the loss curves of runs.

A RUN is a run's folder or its record under ``results/``.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from train.analysis.records import read_arms
from train.errors import UserError
from train.files import user_path
from train.program import Arguments


def style() -> Any:
    """Sets the style that all figures share."""
    return plt.rc_context(
        {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
         "grid.alpha": 0.3}
    )  # fmt: skip


def loss_curve(runs: Sequence[str | Path], target: Path) -> None:
    """Draws BPC against characters seen: training as a thin line, validation as dots.

    Runs that differ only in their seed are one curve, their mean, in a band from the lowest to the
    highest.

    Raises:
      UserError: runs of one name differ in more than their seed.
    """
    arms = read_arms(runs)
    with style():
        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        for index, arm in enumerate(arms.values()):
            seeds = f", {len(arm.runs)} seeds" if len(arm.runs) > 1 else ""
            for kind, line in (
                ("train", {"lw": 1, "alpha": 0.6}),
                ("validation", {"marker": "o", "ms": 4, "lw": 1.5}),
            ):
                curve = arm.curve(kind)
                seen = [characters / 1e6 for characters, _ in curve]
                mean = [statistics.fmean(bpc) for _, bpc in curve]
                label = f"{arm.name}, {kind}{seeds}"
                axes.plot(seen, mean, color=f"C{index}", label=label, **line)
                if seeds:
                    low, high = ([pick(bpc) for _, bpc in curve] for pick in (min, max))
                    axes.fill_between(seen, low, high, color=f"C{index}", alpha=0.2, lw=0)
        axes.set_xlabel("characters seen, millions")
        axes.set_ylabel("bits per character")
        axes.legend(frameon=False)
        figure.savefig(target, dpi=150)
        plt.close(figure)


def program(argv: Sequence[str]) -> None:
    """Parses and calls."""
    p = Arguments(prog="python -m train figures", description=__doc__)
    p.add_argument("runs", nargs="+", help="folders of runs or of their records")
    p.add_argument("--output", type=Path, required=True, help="the picture to write, a .png")
    options = p.parse_args(argv[1:])
    output = user_path("--output", options.output)
    if output.suffix != ".png":
        raise UserError(f"--output={output} must end in .png")
    if not output.parent.is_dir():
        raise UserError(f"--output={output}: there is no folder {output.parent}")
    loss_curve(options.runs, output)
