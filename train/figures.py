"""``python -m train.figures RUN ... --output=FILE.png``: the loss curves of runs, from their logs.

A RUN is a run's folder or its record under ``results/``.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from train.errors import UserError
from train.metrics import read_rows
from train.program import Arguments, run_program
from train.run import open_run


def style() -> Any:
    """The look that the figures share."""
    return plt.rc_context(
        {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
         "grid.alpha": 0.3}
    )  # fmt: skip


def loss_curve(runs: Sequence[Path], target: Path) -> None:
    """Bits per character against characters seen: training as a thin line, validation as dots."""
    with style():
        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        for index, run in enumerate(runs):
            rows = read_rows(run / "metrics.jsonl")
            name = json.loads((run / "config.json").read_text())["name"]
            color = f"C{index}"
            for kind, line in (
                ("train", {"lw": 1, "alpha": 0.6}),
                ("validation", {"marker": "o", "ms": 4, "lw": 1.5}),
            ):
                points = [row for row in rows if row["kind"] == kind]
                axes.plot(
                    [row["characters"] / 1e6 for row in points],
                    [row["bpc"] for row in points],
                    color=color,
                    label=f"{name}, {kind}",
                    **line,
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
        axes.legend(frameon=False)
        figure.savefig(target, dpi=150)
        plt.close(figure)


def program(argv: Sequence[str]) -> None:
    """Parses and calls."""
    p = Arguments(prog="python -m train.figures", description=__doc__)
    p.add_argument("runs", nargs="+", type=Path, help="folders of runs or of their records")
    p.add_argument("--output", type=Path, required=True, help="the picture to write, a .png")
    options = p.parse_args(argv[1:])
    folders = [open_run(run).path for run in options.runs]
    if options.output.suffix != ".png":
        raise UserError(f"--output={options.output} must end in .png")
    if not options.output.parent.is_dir():
        raise UserError(f"--output={options.output}: there is no folder {options.output.parent}")
    loss_curve(folders, options.output)


def main() -> None:
    """The command line."""
    sys.exit(run_program(program, sys.argv))


if __name__ == "__main__":
    main()
