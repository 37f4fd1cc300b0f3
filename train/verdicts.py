"""Whether recorded runs bear a claim out: the comparisons, each a pure function of the records.

A comparison of means is decided where both arms have two seeds or more and differ by more than two
standard errors of the difference; a single seed decides nothing. Losses are BPC: of the whole
validation split where every run of the comparison has been evaluated on it, else of the slice
that the runs evaluated at their end.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from train.arms import Arm, mean_and_deviation
from train.copy_depth import BUCKETS, find_cell

Status = Literal["holds", "fails", "not yet run", "not comparable"]
Direction = Literal["holds", "fails", "undecided"]

STANDARD_ERRORS = 2.0
MATCHED = 0.01
"""Parameters of matched arms differ by no more."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What the runs say.

    Attributes:
      direction: of what was measured.
      measured: the numbers, in words.
      reason: why it is undecided, else empty.
    """

    direction: Direction
    measured: str
    reason: str = ""


class NotRunError(Exception):
    """Something that a verdict needs is not among the results; the message names it."""


class NotComparableError(Exception):
    """The runs were not made alike; the message says in what."""


@dataclasses.dataclass(frozen=True)
class Loss:
    """The final loss of an arm.

    Attributes:
      arm: its name.
      values: BPC, one a seed.
      whole_split: whether of the whole validation split.
    """

    arm: str
    values: tuple[float, ...]
    whole_split: bool

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return mean_and_deviation(self.values)[0]

    @property
    def deviation(self) -> float | None:
        """Over the seeds, of the sample."""
        return mean_and_deviation(self.values)[1]

    @property
    def text(self) -> str:
        """Mean and deviation."""
        spread = "" if self.deviation is None else f" ± {self.deviation:.4f}"
        return f"{self.mean:.4f}{spread}"

    def __str__(self) -> str:
        return f"{self.arm} {self.text} (n = {len(self.values)})"


def final_losses(arms: Sequence[Arm]) -> list[Loss]:
    """The final losses of arms, all on the same part of the validation split."""
    whole = all(run.evaluations for arm in arms for run in arm.runs)

    def values(arm: Arm) -> tuple[float, ...]:
        if whole:
            return tuple(run.evaluations[-1]["bpc"] for run in arm.runs)
        return tuple(run.summary["validation"]["bpc"] for run in arm.runs)

    return [Loss(arm.name, values(arm), whole) for arm in arms]


def difference(one: Loss, other: Loss) -> tuple[float, float | None]:
    """Mean of ``one`` less that of ``other``, and its standard error if both have seeds enough."""
    apart = one.mean - other.mean
    if one.deviation is None or other.deviation is None:
        return apart, None
    error = math.hypot(
        one.deviation / math.sqrt(len(one.values)), other.deviation / math.sqrt(len(other.values))
    )
    return apart, error


def signed(apart: float, error: float | None) -> str:
    """A difference as text."""
    return f"{apart:+.4f}" + ("" if error is None else f" ± {error:.4f} (s.e.)")


def shared_evaluations(one: Arm, other: Arm) -> list[tuple[int, Loss, Loss]]:
    """``(characters, loss of one, loss of the other)`` wherever every seed of both has a row.

    Raises:
      NotComparableError: nowhere.
    """
    ours, theirs = dict(one.curve()), dict(other.curve())
    shared = [
        (
            seen,
            Loss(one.name, tuple(ours[seen]), False),
            Loss(other.name, tuple(theirs[seen]), False),
        )
        for seen in sorted(ours.keys() & theirs.keys())
    ]
    if not shared:
        raise NotComparableError("no evaluation at the same number of characters")
    return shared


def check_comparable(
    arms: Sequence[Arm], *, same_budget: bool = True, same_size: bool = True
) -> None:
    """Refuses arms that saw other data, or more of it, or were evaluated or sized otherwise.

    Raises:
      NotComparableError: naming what differs.
    """
    facts: dict[str, Callable[[Arm], Any]] = {
        "data": lambda arm: arm.runs[0].summary["data_sha256"],
        "context": lambda arm: arm.config["data"]["context"],
        "evaluated characters": lambda arm: arm.runs[0].summary["validation"]["bytes"],
        "evaluation stride": lambda arm: arm.runs[0].summary["validation"]["stride"],
    }
    if same_budget:
        facts["budget"] = characters
    for what, of in facts.items():
        found = {arm.name: of(arm) for arm in arms}
        if len(set(found.values())) > 1:
            listed = ", ".join(f"{name} {value}" for name, value in found.items())
            raise NotComparableError(f"different {what}: {listed}")
    sizes = {arm.name: parameters(arm) for arm in arms}
    if same_size and max(sizes.values()) > (1 + MATCHED) * min(sizes.values()):
        listed = ", ".join(f"{name} {value:,}" for name, value in sizes.items())
        raise NotComparableError(f"different numbers of parameters: {listed}")


def parameters(arm: Arm) -> int:
    """Learned scalars."""
    return int(arm.runs[0].summary["parameters"])


def characters(arm: Arm) -> int:
    """Seen in training."""
    return int(arm.runs[0].summary["characters"])


def wanted(arms: Mapping[str, Arm], names: Sequence[str]) -> list[Arm]:
    """The arms of these names, with their finished runs.

    Raises:
      NotRunError: one is not among the results.
    """
    found = []
    for name in names:
        runs = tuple(run for run in arms[name].runs if run.summary) if name in arms else ()
        if not runs:
            raise NotRunError(name)
        found.append(Arm(name, runs))
    return found


def decide(apart: float, error: float | None) -> tuple[Direction, str]:
    """Whether a difference that should be below zero is, and why that is undecided."""
    if error is None:
        return "undecided", "one seed"
    if abs(apart) <= STANDARD_ERRORS * error:
        return "undecided", f"within {STANDARD_ERRORS:g} standard errors"
    return ("holds" if apart < 0 else "fails"), ""


def below(arms: Sequence[Arm]) -> Verdict:
    """The first arm ends below the second."""
    one, other = final_losses(arms)
    apart, error = difference(one, other)
    direction, reason = decide(apart, error)
    return Verdict(direction, f"{one}, {other}: {signed(apart, error)}", reason)


def below_throughout(arms: Sequence[Arm]) -> Verdict:
    """The first arm is below the second at every evaluation that they share.

    One evaluation at which it is above, beyond the noise, is against it.
    """
    apart = [difference(*losses) for _, *losses in shared_evaluations(*arms)]
    ahead = sum(found < 0 for found, _ in apart)
    end = below(arms)
    text = f"{end.measured}; below at {ahead} of {len(apart)} evaluations"
    if any(decide(*found)[0] == "fails" for found in apart) or end.direction == "fails":
        return Verdict("fails", text)
    if ahead < len(apart):
        return Verdict("undecided", text, end.reason or "above at some, within the noise")
    return Verdict(end.direction, text, end.reason)


def every_seed_below(arms: Sequence[Arm]) -> Verdict:
    """Every seed of the first arm ends below the mean of the second."""
    one, other = final_losses(arms)
    count = sum(value < other.mean for value in one.values)
    text = f"{one}, {other}: {count} of {len(one.values)} seeds below"
    if len(one.values) < 2:
        return Verdict("undecided", text, "one seed")
    return Verdict("holds" if count == len(one.values) else "fails", text)


def tracks(arms: Sequence[Arm], *, within: float) -> Verdict:
    """The first arm ends within so many BPC of the second, to either side."""
    one, other = final_losses(arms)
    apart, error = difference(one, other)
    text = f"{one}, {other}: {signed(apart, error)}, to be within {within}"
    if error is None:
        return Verdict("undecided", text, "one seed")
    return Verdict("holds" if abs(apart) <= within else "fails", text)


def early_only(arms: Sequence[Arm]) -> Verdict:
    """The first arm is below the second at the first shared evaluation and level at the end."""
    first, *starts = shared_evaluations(*arms)[0]
    start, start_error = difference(*starts)
    losses = final_losses(arms)
    end, end_error = difference(*losses)
    text = (
        f"{losses[0]}, {losses[1]}: {signed(start, start_error)} at {first / 1e6:.3g}M characters, "
        f"{signed(end, end_error)} at the end"
    )
    if start_error is None or end_error is None:
        return Verdict("undecided", text, "one seed")
    level = abs(end) <= STANDARD_ERRORS * end_error
    faster = start < -STANDARD_ERRORS * start_error
    return Verdict("holds" if level and faster else "fails", text)


def copy_depth(table: Mapping[str, Any], *, full: str, base: str) -> Verdict:
    """The base layer is behind at every depth, most on far copies; the kernel is ahead from 4 on.

    Args:
      table: what ``python -m train.copy_depth`` wrote, differences to the transformer.
      full: name of the FSN's arm.
      base: of the base layer's.
    """
    for arm in (full, base):
        if arm not in table["arms"]:
            raise NotRunError(f"{arm} in the copy-depth table")
    rows = {arm: table["arms"][arm]["difference"] for arm in (full, base)}

    def cells(arm: str, buckets: Sequence[str]) -> list[dict[str, Any]]:
        found = [find_cell(rows[arm], "all", "any", bucket) for bucket in buckets]
        return [cell for cell in found if cell["n"]]

    behind, ahead = cells(base, BUCKETS), cells(full, BUCKETS[4:])
    kinds = {
        f"{distance} {events}": find_cell(rows[base], events, distance, "all")["mean"]
        for events in ("copy", "other")
        for distance in ("near", "far")
    }
    worst = max((kind for kind in kinds if kinds[kind] is not None), key=lambda kind: kinds[kind])
    parts = {
        "base behind": [cell["low"] > 0 for cell in behind],
        "FSN ahead": [cell["high"] < 0 for cell in ahead],
    }
    against = any(cell["high"] < 0 for cell in behind) or any(cell["low"] > 0 for cell in ahead)
    text = (
        f"95% intervals: base behind the transformer at {sum(parts['base behind'])} of "
        f"{len(behind)} depths, most on {worst} events ({kinds[worst]:+.3f}); FSN ahead at "
        f"{sum(parts['FSN ahead'])} of {len(ahead)} depths from four on ("
        + ", ".join(f"{cell['bucket']}: {cell['mean']:+.3f}" for cell in ahead)
        + ")"
    )
    if against or worst != "far copy":
        return Verdict("fails", text)
    if all(map(all, parts.values())):
        return Verdict("holds", text)
    return Verdict("undecided", text, "some intervals hold zero")


def ladder(pairs: Mapping[str, Sequence[Arm]], *, rungs: int) -> Verdict:
    """The first arm of each rung is below the second.

    Args:
      pairs: of the rungs that have been run.
      rungs: how many it takes.
    """
    apart = {}
    for rung, arms in pairs.items():
        check_comparable(arms)
        apart[rung] = difference(*final_losses(arms))
    text = ", ".join(f"{rung} {signed(*found)}" for rung, found in apart.items())
    signs = [found < 0 for found, _ in apart.values()]
    if len(signs) < rungs:
        return Verdict("undecided", text, f"{len(signs)} of {rungs} rungs")
    return Verdict("holds" if all(signs) else "fails", text)


def readings(page: Mapping[str, Any]) -> Verdict:
    """Every coefficient of every layer's kernel has a reading.

    Args:
      page: what ``python -m train.readings`` wrote.
    """
    layers = page["layers"]
    every = [
        strength
        for layer in layers
        for coefficient in layer["coefficients"]
        for strength in coefficient["strength"]
    ]
    read, total = len(every), sum(map(abs, every))
    repelling = sum(-strength for strength in every if strength < 0) / (total or 1.0)
    text = (
        f"{read} of {page['kernel_coefficients']} coefficients of {len(layers)} layers read; "
        f"{repelling:.0%} of their strength is repulsive"
    )
    return Verdict("holds" if read == page["kernel_coefficients"] else "fails", text)
