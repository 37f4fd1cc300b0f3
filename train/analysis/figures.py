"""``python -m train figures RUN ... --output=FILE.png``: draws the loss curves of runs.

A RUN is a run's folder or its record under ``results/``. With ``--copies`` it draws what copy
events cost while the runs trained, and beside it what all other characters cost.
"""

import contextlib
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from train.analysis.kinds import Style
from train.analysis.records import Arm, read_arms, styles_of
from train.errors import UserError
from train.files import check_output, writing
from train.program import Arguments

SEEN = "characters seen, millions"


STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
}


@contextlib.contextmanager
def panels(target: Path, rows: int = 1, columns: int = 1, **options: Any) -> Iterator[Any]:
    """Yields the panels of a figure, and writes the figure at the end.

    Args:
      target: the picture.
      rows: of panels.
      columns: of panels.
      **options: as for ``plt.subplots``.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(rows, columns, layout="constrained", **options)
        yield axes
        figure.savefig(target, dpi=150)
        plt.close(figure)


def loss_curve(runs: Sequence[str | Path], target: Path) -> None:
    """Draws BPC against characters seen: training as a thin line, validation as dots.

    Runs that differ only in their seed are one curve, their mean, in a band from the lowest to the
    highest.

    Raises:
      UserError: runs of one name differ in more than their seed.
    """
    arms = read_arms(runs)
    evaluated = [bpc for arm in arms.values() for _, seeds in arm.curve() for bpc in seeds]
    evaluated = [bpc for bpc in evaluated if math.isfinite(bpc)]
    with panels(target, figsize=(7, 4)) as axes:
        for arm, style in zip(arms.values(), styles_of(arms.values()), strict=True):
            faint = Style(f"{style.label}, train", style.colour)
            draw_curve(axes, arm, "train", faint, lw=1, alpha=0.3)
            shown = Style(f"{style.label}, validation", style.colour)
            draw_curve(axes, arm, "validation", shown, marker="o", ms=4, lw=1.5)
        if evaluated:  # the training loss falls fast at first, and would set the scale
            axes.set_ylim(top=max(evaluated) + 0.1)
        axes.set_xlabel(SEEN)
        axes.set_ylabel("bits per character")
        legend_above(axes)


def copy_curve(runs: Sequence[str | Path], target: Path) -> None:
    """Draws BPC on copy events, and on all other characters, against characters seen.

    Raises:
      UserError: a run did not evaluate copy events, or runs of one name differ in more than their
        seed.
    """
    arms = read_arms(runs)
    for name, arm in arms.items():
        if not arm.curve("copies"):
            raise UserError(
                f"{name} did not evaluate copy events while it trained: set "
                f"config.evaluation.copy_depth, or leave it out"
            )
    with panels(target, 1, 2, figsize=(10, 4)) as both:
        for axes, (kind, what) in zip(
            both, (("copies", "copy events"), ("others", "all other characters")), strict=True
        ):
            for arm, style in zip(arms.values(), styles_of(arms.values()), strict=True):
                draw_curve(axes, arm, kind, style, marker="o", ms=3, lw=1.5)
            axes.set_xlabel(SEEN)
            axes.set_ylabel(f"bits per character, {what}")
        legend_above(both[0])


def legend_above(axes: Any) -> None:
    """Puts the legend of a panel above all panels, where it hides no curve."""
    lines, labels = axes.get_legend_handles_labels()
    axes.figure.legend(lines, labels, frameon=False, loc="outside upper left", ncols=2)


def draw_curve(axes: Any, arm: Arm, kind: str, style: Style, **line: Any) -> None:
    """Draws the mean over the seeds, and a band from the lowest to the highest.

    Args:
      axes: of a matplotlib figure.
      arm: the runs.
      kind: of loss, a key of ``RunRecord.losses``.
      style: label and colour; the number of seeds is added to the label.
      **line: further style of the curve, as for ``plot``.
    """
    curve = arm.curve(kind)
    seen = [characters / 1e6 for characters, _ in curve]
    seeds = f" ({len(arm.runs)} seeds)" if len(arm.runs) > 1 else ""
    mean = [statistics.fmean(bpc) for _, bpc in curve]
    axes.plot(seen, mean, color=style.colour, label=f"{style.label}{seeds}", **line)
    if seeds:
        low, high = ([pick(bpc) for _, bpc in curve] for pick in (min, max))
        axes.fill_between(seen, low, high, color=style.colour, alpha=0.2, lw=0)


def program(argv: Sequence[str]) -> None:
    """Runs the program with the arguments of its command line."""
    p = Arguments(prog="python -m train figures", description=__doc__)
    p.add_argument("runs", nargs="+", help="folders of runs or of their records")
    p.add_argument("--output", required=True, help="the picture to write, a .png")
    p.add_argument("--copies", action="store_true", help="draw the cost of copy events")
    options = p.parse_args(argv[1:])
    output = check_output(options.output, ".png")
    draw = copy_curve if options.copies else loss_curve
    with writing("--output", output):
        draw(options.runs, output)
