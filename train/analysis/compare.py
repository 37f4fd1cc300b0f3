"""``python -m train compare RUN ...``: compares two arms over their seeds at every evaluation.

A RUN is a run's folder or its record under ``results/``. Prints mean and sample deviation of both
arms and the difference of the means with its standard error, for every evaluation that all runs
share. Then prints the outcome at the end, at every point, and after equal time, by the rules of
docs/protocol.md. Writes the same as JSON and, beside it, as text and as a figure.
"""

import functools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.analysis import verdicts
from train.analysis.figures import SEEN, draw_curve, legend_above, panels
from train.analysis.records import (
    Arm,
    print_missing_ends,
    read_arms,
    read_run,
    reference_arm,
    styles_of,
    with_clocks,
)
from train.analysis.verdicts import STANDARD_ERRORS, Loss
from train.errors import UserError
from train.files import check_json_output, default_output, write_result
from train.program import Arguments
from train.tables import text_table

FIRST_MILLION = 1_000_000


def compare(one: Arm, other: Arm, *, same_budget: bool = True) -> dict[str, Any]:
    """Compares arm ``one`` with ``other``; differences are ``one`` less ``other``, in BPC.

    Args:
      one: an arm.
      other: the reference.
      same_budget: refuse arms that saw different numbers of characters.

    Returns:
      ``points``, one an evaluation that all runs share; ``end``, ``throughout``, ``crossing`` (the
      first number of characters from which ``one`` is below to the end, None if there is none),
      ``seconds`` of training by the clock of each arm, and ``equal_time``; ``whole_validation`` and
      ``test`` if every run was evaluated on them; and ``runs``, where they came from.

    Raises:
      UserError: the arms differ in more than the model, or share no evaluation.
    """
    try:
        verdicts.check_comparable([one, other], same_budget=same_budget)
        shared = verdicts.shared_evaluations(one, other)
    except verdicts.NotComparableError as unlike:
        raise UserError(f"{one.name} and {other.name} cannot be compared: {unlike}") from None
    points = [{"characters": seen, **_apart(*losses)} for seen, *losses in shared]
    above = [i for i, point in enumerate(points) if point["difference"] >= 0]
    later = points[above[-1] + 1 :] if above else points
    result: dict[str, Any] = {
        "arm": one.name,
        "reference": other.name,
        "points": points,
        "end": _apart(*verdicts.losses_at_end([one, other]))["verdict"],
        "throughout": _throughout(points),
        "crossing": later[0]["characters"] if later else None,
        "seconds": {arm.name: _seconds(arm) for arm in (one, other)},
        "equal_time": equal_time(one, other),
        "runs": {arm.name: arm.sources for arm in (one, other)},
    }
    for split in ("whole_validation", "test"):
        ends = [
            Loss(arm.name, tuple(getattr(run, split) for run in arm.runs)) for arm in (one, other)
        ]
        if not any(bpc is None for loss in ends for bpc in loss.values):
            result[split] = _apart(*ends)
    return result


def _apart(one: Loss, other: Loss) -> dict[str, Any]:
    apart, error = verdicts.difference(one, other)
    return {
        one.arm: {"bpc": list(one.values), "mean": one.mean, "deviation": one.deviation},
        other.arm: {"bpc": list(other.values), "mean": other.mean, "deviation": other.deviation},
        "difference": apart,
        "standard_error": error,
        "verdict": _WORDS[verdicts.decide(apart, error)[0]],
    }


_WORDS = {"holds": "below", "fails": "above", "undecided": "undecided"}


def _throughout(points: Sequence[Mapping[str, Any]]) -> str:
    """Returns ``below`` if each evaluation after the first million characters is decided so."""
    found = {point["verdict"] for point in points if point["characters"] > FIRST_MILLION}
    return found.pop() if len(found) == 1 else "undecided" if "above" not in found else "mixed"


def equal_time(one: Arm, other: Arm) -> dict[str, Any] | None:
    """Returns the difference at the time when the faster arm ends; None without a common clock.

    There is no common clock if no speed was logged or the runs used devices of different kinds.
    Losses are interpolated linearly between evaluations. At that time the slower arm is in the
    middle of its schedule, with a learning rate that has not fallen yet.
    """
    first, second = _seconds(one), _seconds(other)
    devices = set[str]().union(*(run.devices for arm in (one, other) for run in arm.runs))
    if first is None or second is None or len(devices) > 1:
        return None
    seconds = min(first, second)
    curves = {
        arm.name: [
            [(run.clock[seen], bpc) for seen, bpc in run.losses["validation"].items()]
            for run in arm.runs
        ]
        for arm in (one, other)
    }
    losses = [
        Loss(
            name,
            tuple(
                float(np.interp(seconds, [s for s, _ in curve], [bpc for _, bpc in curve]))
                for curve in by_seed
            ),
        )
        for name, by_seed in curves.items()
    ]
    return {"seconds": seconds, **_apart(*losses)}


def _seconds(arm: Arm) -> float | None:
    """Returns the mean seconds of training over the seeds; None if a run did not log its speed."""
    if not all(run.clock for run in arm.runs):
        return None
    return statistics.fmean(max(run.clock.values()) for run in arm.runs)


def table_text(result: Mapping[str, Any]) -> str:
    """Formats the table and the summary."""
    names = result["arm"], result["reference"]
    rows = {f"{point['characters'] / 1e6:.2f}M": point for point in result["points"]}
    for split, label in (("whole_validation", "validation"), ("test", "test")):
        if split in result:
            rows[label] = result[split]
    head = ("characters", *names, "difference", "")
    lines = [text_table([head, *((label, *_cells(row, names)) for label, row in rows.items())])]
    arm = result["arm"]
    crossing = result["crossing"]
    part = "whole validation split" if "whole_validation" in result else "last evaluation"
    lines += [
        "",
        f"at the end ({part}) {arm} is {result['end']}, counted from {STANDARD_ERRORS:g} standard "
        "errors on",
        f"at every evaluation after the first million characters: {result['throughout']}",
        f"its mean is below from {crossing / 1e6:.2f}M characters on to the end"
        if crossing
        else "its mean is not below at the end",
    ]
    if time := result["equal_time"]:
        spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in result["seconds"].items())
        lines += [
            f"training, at the median speed of each run: {spent}",
            f"after {time['seconds']:.0f} s of training, when the faster arm has ended:",
            "  ".join(_cells(time, names)),
        ]
    return "\n".join(lines)


def _cells(row: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    losses = [Loss(name, tuple(row[name]["bpc"])).text for name in names]
    return [*losses, verdicts.signed(row["difference"], row["standard_error"]), row["verdict"]]


def draw(result: Mapping[str, Any], one: Arm, other: Arm, target: Path) -> None:
    """Draws loss against characters and against time, and the difference with its errors."""
    points = result["points"]
    seen = [point["characters"] / 1e6 for point in points]
    timed = bool(result["equal_time"])  # else the runs have no clock in common
    with panels(target, 1, 2 + timed, figsize=(8 + 4 * timed, 3.8)) as axes:
        left, *middle, right = axes
        looks = styles_of((one, other))
        for arm, style in zip((one, other), looks, strict=True):
            draw_curve(left, arm, "validation", style, marker="o", ms=3)
            clocks = [run.clock for run in arm.runs if run.clock]
            if clocks and timed:
                curve = arm.curve()
                minutes = [statistics.fmean(clock[c] for clock in clocks) / 60 for c, _ in curve]
                mean = [statistics.fmean(bpc) for _, bpc in curve]
                middle[0].plot(minutes, mean, color=style.colour, marker="o", ms=3)
        apart = np.array([point["difference"] for point in points])
        error = np.array([point["standard_error"] or 0.0 for point in points])
        right.axhline(0, color="0.4", lw=1)
        right.errorbar(
            seen, apart, STANDARD_ERRORS * error, color="0.2", marker="o", ms=3, capsize=2
        )
        late = np.array(seen) > FIRST_MILLION / 1e6
        if late.any():  # zero is on it, and what comes before would set the scale
            reach = np.array([-1, 1])[:, None] * STANDARD_ERRORS * error[late] + apart[late]
            low, high = min(reach.min(), 0), max(reach.max(), 0)
            margin = 0.08 * (high - low) or 1e-3
            right.set_ylim(low - margin, high + margin)
        ends = [points[-1][arm.name]["mean"] for arm in (one, other)]
        for curves in (left, *middle):
            curves.set_ylim(min(ends) - 0.05, min(ends) + 0.95)
            curves.set_ylabel("bits per character, validation")
        left.set_xlabel(SEEN)
        legend_above(left)
        for minutes_axes in middle:
            minutes_axes.set_xlabel("minutes of training")
        right.set_xlabel(SEEN)
        apart_label = " less\n".join(style.label for style in looks)
        right.set_ylabel(f"{apart_label}, BPC, ± {STANDARD_ERRORS:g} s.e.")


def program(argv: Sequence[str]) -> None:
    """Runs the program with the arguments of its command line."""
    p = Arguments(prog="python -m train compare", description=__doc__)
    p.add_argument("runs", nargs="+", help="folders of the finished runs of two arms")
    p.add_argument("--reference", default="", help="the arm to compare with; else the transformer")
    p.add_argument(
        "--any_budget", action="store_true", help="let one arm see fewer characters than the other"
    )
    p.add_argument(
        "--clocks",
        nargs="+",
        default=[],
        metavar="RUN",
        help="runs of the same models whose speed counts in place of the runs' own",
    )
    p.add_argument("--output", help="a .json; else comparison.json with the runs")
    options = p.parse_args(argv[1:])
    output = check_json_output(options.output or default_output(options.runs, "comparison.json"))
    arms = read_arms(options.runs, finished=True)
    one, other = pair(arms, options.reference)
    if options.clocks:
        clocks = [read_run(folder) for folder in options.clocks]
        one, other = (with_clocks(arm, clocks) for arm in (one, other))
    result = compare(one, other, same_budget=not options.any_budget)
    write_result(output, result, table_text(result), functools.partial(draw, result, one, other))
    print_missing_ends(arms.values())


def pair(arms: Mapping[str, Arm], reference: str) -> tuple[Arm, Arm]:
    """Returns the arm and its reference.

    Raises:
      UserError: there are not two arms, or it is unclear which one is the reference.
    """
    if len(arms) != 2:
        raise UserError(f"name the runs of two arms; these are of {', '.join(arms)}")
    reference = reference_arm(arms, reference)
    (one,) = (arm for name, arm in arms.items() if name != reference)
    return one, arms[reference]
