"""``python -m train final_losses RUN ...``: compares the final losses of any number of arms.

A RUN is a finished run's folder or its record under ``results/``. Rungs of a scale ladder, arms
named ``KIND_RUNG``, are drawn against parameters and training FLOPs, each kind a line from point to
point. Variants of one size are drawn one below the other. Losses are those of the whole validation
split if every run was evaluated on it, otherwise those of the slice that each run evaluates at its
end. Writes the table as JSON and, beside it, as text and as a figure.
"""

import functools
import itertools
import os.path
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from train.analysis import verdicts
from train.analysis.figures import panels
from train.analysis.kinds import styles
from train.analysis.records import print_missing_ends, read_arms, reference_arm
from train.errors import UserError
from train.files import check_json_output, default_output, write_result
from train.program import Arguments
from train.tables import text_table

LEAST_STEP = 1.2
"""Least ratio of sizes from one rung to the next; closer arms are variants of one size."""
FAR_OFF = 6.0
"""Edge of a figure, in median differences to the reference; larger losses become arrows."""
SIZES = {"parameters": "parameters", "training_flops": "training FLOPs"}


def result(folders: Sequence[str | Path], *, reference: str = "") -> dict[str, Any]:
    """Computes the table of finished runs; prints a note for runs evaluated elsewhere.

    Args:
      folders: folders of runs.
      reference: the arm that differences are taken to; the first if none is named.

    Returns:
      ``arms``, one row each, with ``difference`` to the reference and its ``standard_error`` (None
      with a single seed), in BPC; ``variants``, whether the arms have one size and are no rungs;
      ``edge``, the largest BPC in a figure of variants; and ``runs``, where they came from.

    Raises:
      UserError: a run has not ended or cannot be read, two arms saw different data, or the
        reference is not among the arms.
    """
    arms = read_arms(folders, finished=True)
    print_missing_ends(arms.values())
    first, *others = arms.values()
    for arm in others:
        if arm.runs[0].summary["data_sha256"] != first.runs[0].summary["data_sha256"]:
            raise UserError(
                f"{first.name} and {arm.name} saw different data, so that their losses make no "
                f"table; leave one out"
            )
    losses = {loss.arm: loss for loss in verdicts.losses_at_end(list(arms.values()))}
    reference = reference_arm(arms, reference or next(iter(arms)))
    rows = []
    for name, loss in losses.items():
        summary = arms[name].runs[0].summary
        apart, error = verdicts.difference(loss, losses[reference])
        rows.append(
            {
                "arm": name,
                "kind": name.rpartition("_")[0] or name,
                "architecture": arms[name].architecture,
                "model": arms[name].kind,
                "parameters": summary["parameters"],
                "characters": summary["characters"],
                "training_flops": summary["training_flops"],
                "seeds": list(loss.values),
                "bpc": loss.mean,
                "deviation": loss.deviation,
                "difference": apart,
                "standard_error": error,
                "evaluated": "whole" if loss.whole_split else summary["validation"]["bytes"],
            }
        )
    distances = [abs(row["difference"]) for row in rows if row["arm"] != reference]
    return {
        "kind": "final_losses",
        "reference": reference,
        "arms": rows,
        "variants": not _are_rungs(rows),
        "edge": losses[reference].mean + FAR_OFF * statistics.median(distances or [0.0]),
        "runs": {name: arm.sources for name, arm in arms.items()},
    }


def _by_kind(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    kinds = sorted({row["kind"] for row in rows})
    return {kind: [row for row in rows if row["kind"] == kind] for kind in kinds}


def _are_rungs(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether some kind has two sizes, and no kind has one size twice."""
    kinds = _by_kind(rows).values()
    return len(rows) > len(kinds) and not any(map(_share_a_size, kinds))


def _share_a_size(rows: Sequence[Mapping[str, Any]]) -> bool:
    sizes = sorted(float(row["parameters"]) for row in rows)
    return any(large / small < LEAST_STEP for small, large in itertools.pairwise(sizes))


def result_text(found: Mapping[str, Any]) -> str:
    """Formats the table."""
    rows = found["arms"]
    if found["variants"]:
        rows = sorted(rows, key=lambda row: row["bpc"])
    table = [["arm", "parameters", "characters", "training FLOPs", "seeds", "BPC"]]
    if found["variants"]:
        table[0].append(f"less {found['reference']}")
    for row in rows:
        spread = "" if row["deviation"] is None else f" ± {row['deviation']:.4f}"
        counts = (
            f"{row['parameters']:,}",
            f"{row['characters']:,}",
            f"{row['training_flops']:.2e}",
        )
        cells = [row["arm"], *counts, str(len(row["seeds"])), f"{row['bpc']:.4f}{spread}"]
        if found["variants"]:
            apart = verdicts.signed(row["difference"], row["standard_error"])
            cells.append("" if row["arm"] == found["reference"] else apart)
        table.append(cells)
    lines = [text_table(table)]
    judged = {str(row["evaluated"]) for row in rows}
    for part in sorted(judged):
        names = [row["arm"] for row in rows if str(row["evaluated"]) == part]
        where = "the whole split" if part == "whole" else f"its first {int(part):,} bytes"
        whose = "" if len(judged) == 1 else f" ({', '.join(names)})"
        lines.append(f"validation: {where}{whose}")
    return "\n".join(lines)


def draw(found: Mapping[str, Any], target: Path) -> None:
    """Draws variants one below the other, or rungs against their size."""
    if found["variants"]:
        _draw_variants(found, target)
    else:
        _draw_rungs(found, target)


def _draw_variants(found: Mapping[str, Any], target: Path) -> None:
    """Draws the best arm on top: a dot for the mean, small dots for seeds, a line: the reference.

    An arm beyond the edge is an arrow.
    """
    rows = sorted(found["arms"], key=lambda row: row["bpc"], reverse=True)
    shared = os.path.commonprefix([row["arm"] for row in rows])
    prefix = shared[: shared.rfind("_") + 1]
    line = next(row["bpc"] for row in rows if row["arm"] == found["reference"])
    with panels(target, figsize=(7, 1.0 + 0.26 * len(rows))) as axis:
        axis.axvline(line, color="0.5", lw=1, ls="--")
        for place, row in enumerate(rows):
            color = "C1" if row["architecture"] == "transformer" else "C0"
            within = row["bpc"] <= found["edge"]
            end = min(row["bpc"], found["edge"])
            axis.plot([line, end], [place, place], color=color, lw=2, alpha=0.4)
            if within:
                axis.plot(
                    row["seeds"], [place] * len(row["seeds"]), ".", color=color, ms=4, alpha=0.6
                )
            axis.plot(end, place, "o" if within else ">", color=color, ms=6)
            apart = "" if row["arm"] == found["reference"] else f"{row['difference']:+z.4f}"
            axis.annotate(
                apart,
                (max(end, line), place),
                (8, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        axis.set_yticks(range(len(rows)), [row["arm"].removeprefix(prefix) for row in rows])
        axis.grid(axis="y", visible=False)
        axis.margins(x=0.12)
        axis.set_xlabel(f"bits per character; less {found['reference'].removeprefix(prefix)}")


def _draw_rungs(found: Mapping[str, Any], target: Path) -> None:
    """Draws loss against parameters and training FLOPs."""
    by_kind = _by_kind(found["arms"])
    models = [(kind, same[0]["model"]) for kind, same in by_kind.items()]
    looks = dict(zip(by_kind, styles(models), strict=True))
    with panels(target, 1, 2, figsize=(9, 3.8), sharey=True) as axes:
        for axis, (what, label) in zip(axes, SIZES.items(), strict=True):
            for kind, same in by_kind.items():
                rows = sorted(same, key=lambda row: row[what])
                axis.errorbar(
                    [row[what] for row in rows],
                    [row["bpc"] for row in rows],
                    yerr=[row["deviation"] or 0.0 for row in rows],
                    color=looks[kind].colour,
                    marker="o",
                    lw=1,
                    label=looks[kind].label,
                )
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 200k, 5T
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.yaxis.set_major_formatter("{x:.2f}")
            axis.yaxis.set_minor_formatter("{x:.2f}")
            axis.set_xlabel(label)
            axis.legend(frameon=False, fontsize=8)
        axes[0].set_ylabel("bits per character")


def write(found: Mapping[str, Any], output: Path) -> None:
    """Writes JSON, text and figure."""
    write_result(output, found, result_text(found), functools.partial(draw, found))


def program(argv: Sequence[str]) -> None:
    """Runs the program with the arguments of its command line."""
    p = Arguments(prog="python -m train final_losses", description=__doc__)
    p.add_argument("runs", nargs="+", help="folders of finished runs or of their records")
    p.add_argument("--reference", default="", help="the arm to compare with; else the first")
    p.add_argument("--output", help="a .json; else final_losses.json with the runs")
    options = p.parse_args(argv[1:])
    output = check_json_output(options.output or default_output(options.runs, "final_losses.json"))
    write(result(options.runs, reference=options.reference), output)
