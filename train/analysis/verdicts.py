"""Tests that judge claims by recorded runs; each is a pure function of the records.

A comparison of means is decided if both arms have two seeds or more and differ by more than two
standard errors of the difference; a single seed decides nothing. Losses are BPC of the whole
validation split if every run of the comparison was evaluated on it, otherwise of the slice that
the runs evaluate at their end.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from train.analysis.copy_depth import BUCKETS, find_cell
from train.analysis.records import Arm, RunRecord, mean_and_deviation

Status = Literal["holds", "fails", "not yet run", "not comparable"]
Direction = Literal["holds", "fails", "undecided"]

DIRECTIONS: tuple[Direction, ...] = ("fails", "undecided", "holds")
"""The verdict on a claim in parts is the first of these that any part has."""

STANDARD_ERRORS = 2.0
NOISE = f"within {STANDARD_ERRORS:g} standard errors"
MATCHED = 0.01
"""Largest relative difference between the parameter counts of matched arms."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The outcome of a test.

    Attributes:
      direction: whether the measured difference has the claimed direction.
      measured: the measured numbers, as text.
      reason: why the outcome is undecided; empty if it is decided.
    """

    direction: Direction
    measured: str
    reason: str = ""


class NotRunError(Exception):
    """A record that a test needs is missing; the message names it."""


class NotComparableError(Exception):
    """The runs differ in more than the model; the message says in what."""


@dataclasses.dataclass(frozen=True)
class Loss:
    """The final loss of an arm.

    Attributes:
      arm: name of the arm.
      values: BPC of each seed.
      whole_split: whether the values are of the whole validation split.
    """

    arm: str
    values: tuple[float, ...]
    whole_split: bool = False

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return mean_and_deviation(self.values)[0]

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation over the seeds."""
        return mean_and_deviation(self.values)[1]

    @property
    def text(self) -> str:
        """Formats mean and deviation."""
        spread = "" if self.deviation is None else f" ± {self.deviation:.4f}"
        return f"{self.mean:.4f}{spread}"

    def __str__(self) -> str:
        return f"{self.arm} {self.text} (n = {len(self.values)})"


def losses_at_end(arms: Sequence[Arm]) -> list[Loss]:
    """Returns the final losses of arms, all on the same part of the validation split."""
    whole = all(run.whole_validation is not None for arm in arms for run in arm.runs)

    def of(run: RunRecord) -> float:
        if whole and run.whole_validation is not None:
            return run.whole_validation
        return float(run.summary["validation"]["bpc"])

    return [Loss(arm.name, tuple(map(of, arm.runs)), whole) for arm in arms]


def difference(one: Loss, other: Loss) -> tuple[float, float | None]:
    """Returns the difference of the means and its standard error (None for a single seed)."""
    apart = one.mean - other.mean
    if one.deviation is None or other.deviation is None:
        return apart, None
    error = math.hypot(
        one.deviation / math.sqrt(len(one.values)), other.deviation / math.sqrt(len(other.values))
    )
    return apart, error


def signed(apart: float, error: float | None) -> str:
    """Formats a difference with its standard error."""
    return f"{apart:+.4f}" + ("" if error is None else f" ± {error:.4f} (s.e.)")


def shared_evaluations(one: Arm, other: Arm) -> list[tuple[int, Loss, Loss]]:
    """Returns ``(characters, loss of one, loss of the other)`` for each row that all seeds share.

    Raises:
      NotComparableError: the arms share no row.
    """
    ours, theirs = dict(one.curve()), dict(other.curve())
    shared = [
        (
            seen,
            Loss(one.name, tuple(ours[seen])),
            Loss(other.name, tuple(theirs[seen])),
        )
        for seen in sorted(ours.keys() & theirs.keys())
    ]
    if not shared:
        raise NotComparableError("no evaluation at the same number of characters")
    return shared


def check_comparable(
    arms: Sequence[Arm], *, same_budget: bool = True, same_size: bool = True
) -> None:
    """Checks that arms share data, budget, evaluation and size.

    Raises:
      NotComparableError: they do not; the message names what differs.
    """
    facts: dict[str, Callable[[Mapping[str, Any]], Any]] = {
        "data": lambda summary: summary["data_sha256"],
        "context": lambda summary: summary["validation"]["context"],
        "evaluated bytes": lambda summary: summary["validation"]["bytes"],
        "evaluation stride": lambda summary: summary["validation"]["stride"],
    }
    if same_budget:
        facts["budget"] = lambda summary: summary["characters"]
    for what, of in facts.items():
        found: dict[Any, str] = {}
        for arm in arms:
            for run in arm.runs:
                found.setdefault(of(run.summary), run.path.name)
        if len(found) > 1:
            listed = ", ".join(f"{name} {value}" for value, name in found.items())
            raise NotComparableError(f"different {what}: {listed}")
    sizes = {arm.name: parameters(arm) for arm in arms}
    if same_size and max(sizes.values()) > (1 + MATCHED) * min(sizes.values()):
        listed = ", ".join(f"{name} {value:,}" for name, value in sizes.items())
        raise NotComparableError(
            f"different numbers of parameters: {listed}; train one again with another "
            f"config.model.feedforward_width (configs/text.py:transformer takes that of its FSN, "
            f"config.match)"
        )


def parameters(arm: Arm) -> int:
    """Returns the number of parameters of an arm."""
    return int(arm.runs[0].summary["parameters"])


def characters(arm: Arm) -> int:
    """Returns the number of characters seen in training."""
    return int(arm.runs[0].summary["characters"])


def wanted(arms: Mapping[str, Arm], names: Sequence[str]) -> list[Arm]:
    """Returns the arms of these names, with their finished runs.

    Raises:
      NotRunError: an arm is not among the results.
    """
    found = []
    for name in names:
        runs = tuple(run for run in arms[name].runs if run.summary) if name in arms else ()
        if not runs:
            raise NotRunError(name)
        found.append(Arm(name, runs))
    return found


def decide(apart: float, error: float | None) -> tuple[Direction, str]:
    """Judges a difference that should be below zero; gives the reason if undecided."""
    if error is None:
        return "undecided", "one seed"
    if abs(apart) <= STANDARD_ERRORS * error:
        return "undecided", NOISE
    return ("holds" if apart < 0 else "fails"), ""


def below(arms: Sequence[Arm]) -> Verdict:
    """Tests whether the first arm ends below the second."""
    one, other = losses_at_end(arms)
    apart, error = difference(one, other)
    direction, reason = decide(apart, error)
    return Verdict(direction, f"{one}, {other}: {signed(apart, error)}", reason)


def below_throughout(arms: Sequence[Arm]) -> Verdict:
    """Tests whether the first arm is below the second at every evaluation that they share.

    It fails if the first arm is above by more than the noise at the end or at two successive
    evaluations: among the many evaluations of a run, a single one is above by chance too often.
    """
    apart = [difference(*losses) for _, *losses in shared_evaluations(*arms)]
    ahead = sum(found < 0 for found, _ in apart)
    above = [decide(*found)[0] == "fails" for found in apart]
    twice = any(map(all, itertools.pairwise(above)))
    end = below(arms)
    text = f"{end.measured}; below at {ahead} of {len(apart)} evaluations"
    if twice or end.direction == "fails":
        return Verdict("fails", text)
    if ahead < len(apart):
        return Verdict("undecided", text, end.reason or "above at some, within the noise")
    return Verdict(end.direction, text, end.reason)


def every_seed_below(arms: Sequence[Arm]) -> Verdict:
    """Tests whether every seed of the first arm ends below the mean of the second."""
    one, other = losses_at_end(arms)
    count = sum(value < other.mean for value in one.values)
    text = f"{one}, {other}: {count} of {len(one.values)} seeds below"
    if len(one.values) < 2:
        return Verdict("undecided", text, "one seed")
    return Verdict("holds" if count == len(one.values) else "fails", text)


def _bounded(apart: float, error: float | None, within: float) -> tuple[Direction, str]:
    """Judges whether a difference, with its noise, is within a bound; see ``decide``."""
    if error is None:
        return "undecided", "one seed"
    noise = STANDARD_ERRORS * error
    if abs(apart) + noise <= within:
        return "holds", ""
    return ("fails", "") if abs(apart) - noise > within else ("undecided", NOISE)


def tracks(arms: Sequence[Arm], *, within: float) -> Verdict:
    """Tests whether the first arm ends within a bound of the second, noise included."""
    one, other = losses_at_end(arms)
    apart, error = difference(one, other)
    text = f"{one}, {other}: {signed(apart, error)}, to be within {within}"
    direction, reason = _bounded(apart, error, within)
    return Verdict(direction, text, reason)


def early_only(arms: Sequence[Arm], *, within: float) -> Verdict:
    """Tests whether the first arm is below at the first shared evaluation and level at the end.

    Args:
      arms: two arms.
      within: largest difference in BPC, noise included, that counts as level.
    """
    first, *starts = shared_evaluations(*arms)[0]
    start, start_error = difference(*starts)
    losses = losses_at_end(arms)
    end, end_error = difference(*losses)
    text = (
        f"{losses[0]}, {losses[1]}: {signed(start, start_error)} at {first / 1e6:.3g}M characters, "
        f"{signed(end, end_error)} at the end, to be within {within}"
    )
    parts = dict((decide(start, start_error), _bounded(end, end_error, within)))
    direction = next(found for found in DIRECTIONS if found in parts)
    return Verdict(direction, text, parts[direction])


def copy_depth(table: Mapping[str, Any], *, full: str, base: str) -> Verdict:
    """Tests whether the base layer is behind at every depth and the FSN ahead from depth 4 on.

    The base layer must also be behind most on far copies.

    Args:
      table: the JSON of ``python -m train copy_depth``, with differences to the transformer.
      full: name of the FSN's arm.
      base: name of the base layer's arm.
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
        f"{distance} {events}": find_cell(rows[base], events, distance, "all")
        for events in ("copy", "other")
        for distance in ("near", "far")
    }
    kinds = {kind: cell for kind, cell in kinds.items() if cell["n"]}
    worst = max(kinds, key=lambda kind: kinds[kind]["mean"])
    far = kinds.get("far copy")
    elsewhere = [cell for kind, cell in kinds.items() if kind != "far copy"]
    parts = {
        "base behind": [cell["low"] > 0 for cell in behind],
        "FSN ahead": [cell["high"] < 0 for cell in ahead],
        "worst on far copies": [far is not None and far["low"] > c["high"] for c in elsewhere],
    }
    against = (
        any(cell["high"] < 0 for cell in behind)
        or any(cell["low"] > 0 for cell in ahead)
        or any(far is not None and far["high"] < cell["low"] for cell in elsewhere)
    )
    text = (
        f"95% intervals: base behind the transformer at {sum(parts['base behind'])} of "
        f"{len(behind)} depths, most on {worst} events ({kinds[worst]['mean']:+.3f}); FSN ahead at "
        f"{sum(parts['FSN ahead'])} of {len(ahead)} depths from four on ("
        + ", ".join(f"{cell['bucket']}: {cell['mean']:+.3f}" for cell in ahead)
        + ")"
    )
    if any(len(table["arms"][arm]["runs"]) < 2 for arm in (full, base, table["reference"])):
        return Verdict("undecided", text, "one seed")
    if against:
        return Verdict("fails", text)
    if all(map(all, parts.values())):
        return Verdict("holds", text)
    return Verdict("undecided", text, "some intervals overlap")


def ladder(pairs: Mapping[str, Sequence[Arm]], *, rungs: int) -> Verdict:
    """Tests whether the first arm of each rung is below the second.

    Args:
      pairs: the two arms of each rung that has been run.
      rungs: number of rungs that the claim needs.
    """
    apart = {}
    for rung, arms in pairs.items():
        check_comparable(arms)
        apart[rung] = difference(*losses_at_end(arms))
    text = ", ".join(f"{rung} {signed(*found)}" for rung, found in apart.items())
    decided = dict(decide(*found) for found in apart.values())
    if "fails" in decided:
        return Verdict("fails", text)
    if len(apart) < rungs:
        return Verdict("undecided", text, f"{len(apart)} of {rungs} rungs")
    direction = next(found for found in DIRECTIONS if found in decided)
    return Verdict(direction, text, decided[direction])


def readings(page: Mapping[str, Any]) -> Verdict:
    """Tests whether every kernel coefficient of every layer has a finite strength and angle.

    Args:
      page: the JSON of ``python -m train readings``.
    """
    layers = page["layers"]
    every = [
        strength
        for layer in layers
        for coefficient in layer["coefficients"]
        for strength, angle in zip(coefficient["strength"], coefficient["angle"], strict=True)
        if math.isfinite(strength) and math.isfinite(angle)
    ]
    read, total = len(every), sum(map(abs, every))
    repelling = sum(-strength for strength in every if strength < 0) / (total or 1.0)
    text = (
        f"{read} of {page['kernel_coefficients']} coefficients of {len(layers)} layers read; "
        f"{repelling:.0%} of their strength is repulsive"
    )
    return Verdict("holds" if read == page["kernel_coefficients"] else "fails", text)
