"""``python -m train claims``: judges the paper's claims by the runs under ``results/``.

``docs/claims.toml`` says what each claim is and which runs test it; ``verdicts.py`` compares.
The outcome is written to ``docs/evidence.md``. With ``--check`` nothing is written, and a page that
differs is an error.
"""

import dataclasses
import json
import textwrap
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from train.analysis import verdicts
from train.analysis.records import Arm, arm_of, recorded_arms
from train.analysis.verdicts import NotComparableError, NotRunError, Status, Verdict
from train.errors import UserError
from train.files import user_path, write_atomically, writing
from train.program import Arguments

WIDTH = 118
"""Characters in a line of prose."""

PAIRS = {
    "below": verdicts.below,
    "below_throughout": verdicts.below_throughout,
    "every_seed_below": verdicts.every_seed_below,
}
"""Tests that take only arms."""

BOUNDED = {"tracks": verdicts.tracks, "early_only": verdicts.early_only}
"""Tests that take arms and a bound in BPC."""


READING = (
    "**Not comparable** means that the runs are smaller or shorter than the claim's, or of other "
    'data; the column "at that scale" says what they show at their own.',
    "Losses are validation bits per character (BPC); ± is the standard deviation over seeds, or "
    "where it says s.e. the standard error of a difference.",
    "A comparison is decided if both arms have two seeds or more and their means are more than "
    f"{verdicts.STANDARD_ERRORS:g} standard errors apart; only then the direction holds or fails.",
    "Differences are of means over all seeds of each arm; where [results.md](results.md) compares "
    "runs of the same seed they can differ.",
    "Evidence is of the published form (`fsn_*`) unless it names another; the projected form is "
    "`projected_*`. C9 reads one trained model.",
    "Commands with `--config` alone make seed 0; seed N needs `--config.seed=N "
    "--config.name=NAME_seedN`. `copy_depth` reads seeds 1 and up.",
)
"""How to read the page."""


@dataclasses.dataclass(frozen=True)
class Row:
    """The verdict on one piece of evidence for a claim.

    Attributes:
      claim: the claim's table in ``docs/claims.toml``.
      evidence: the piece of evidence in that table.
      status: whether the claim holds.
      reason: why the status is what it is; may be empty.
      scale: parameters, characters and corpus of the runs, as text; empty without runs.
      there: whether it holds at the scale of the runs, as text; empty without runs.
      measured: the measured numbers, as text.
      arms: the recorded arms.
    """

    claim: Mapping[str, Any]
    evidence: Mapping[str, Any]
    status: Status
    reason: str
    scale: str = ""
    there: str = ""
    measured: str = ""
    arms: tuple[Arm, ...] = ()


def judge(
    claim: Mapping[str, Any],
    evidence: Mapping[str, Any],
    recorded: Mapping[str, Arm],
    results: Path,
) -> Row:
    """Judges one piece of evidence by the records and the tables of the analyses."""
    try:
        arms, verdict = _test(evidence, recorded, results)
    except NotRunError as missing:
        return Row(claim, evidence, "not yet run", f"no record of {missing}")
    except NotComparableError as unlike:
        return Row(claim, evidence, "not comparable", str(unlike))
    there = verdict.direction + (f" ({verdict.reason})" if verdict.reason else "")
    status: Status
    if shortfall := _below_scale(claim, arms):
        status, reason = "not comparable", f"{shortfall}; at this scale: {there}"
    elif verdict.direction == "undecided":
        status, reason = "not comparable", f"undecided: {verdict.reason}"
    else:
        status, reason = verdict.direction, ""
    return Row(claim, evidence, status, reason, _scale(arms), there, verdict.measured, arms)


def _test(
    evidence: Mapping[str, Any], recorded: Mapping[str, Arm], results: Path
) -> tuple[tuple[Arm, ...], Verdict]:
    test, names = evidence["test"], evidence["arms"]
    if test == "ladder":
        pairs = {}
        for rung in evidence["rungs"]:
            try:
                pairs[rung] = verdicts.wanted(recorded, [n.format(rung=rung) for n in names])
            except NotRunError:
                continue
        if not pairs:
            raise NotRunError("any rung")
        arms = tuple(arm for pair in pairs.values() for arm in pair)
        return arms, verdicts.ladder(pairs, rungs=len(evidence["rungs"]))
    arms = tuple(verdicts.wanted(recorded, names))
    if test == "copy_depth":
        verdicts.check_comparable(arms)
        table, arms = _table(results / evidence["table"], arms)
        return arms, verdicts.copy_depth(table, full=names[0], base=names[1])
    if test == "readings":
        table, arms = _table(results / evidence["table"], arms)
        return arms, verdicts.readings(table)
    verdicts.check_comparable(arms, same_budget=evidence.get("same_budget", True))
    if test in BOUNDED:
        return arms, BOUNDED[test](arms, within=evidence["within"])
    return arms, PAIRS[test](arms)


def _table(file: Path, arms: Sequence[Arm]) -> tuple[Mapping[str, Any], tuple[Arm, ...]]:
    """Reads the table of an analysis; returns it and the arms with the recorded runs it is of."""
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
        made_of = {
            arm.name: {
                (run["seed"], run["commit"], run["step"])
                for run in (table["arms"][arm.name]["runs"] if "arms" in table else [table])
                if "arms" in table or arm_of(str(table["name"])) == arm.name
            }
            for arm in arms
        }
    except FileNotFoundError:
        raise NotRunError(file.name) from None
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({error!r}); make it again") from None
    of_table = []
    for arm in arms:
        recorded = {
            (run.seed, run.provenance[0]["git"]["commit"], run.summary["steps"]): run
            for run in arm.runs
        }
        if not made_of[arm.name] or not made_of[arm.name] <= recorded.keys():
            raise NotComparableError(f"{file.name} is of other runs of {arm.name} than the records")
        runs = tuple(run for key, run in recorded.items() if key in made_of[arm.name])
        of_table.append(dataclasses.replace(arm, runs=runs))
    return table, tuple(of_table)


def _below_scale(claim: Mapping[str, Any], arms: Sequence[Arm]) -> str:
    """Says how much smaller or shorter the runs are than the claim's; empty if they are not."""
    size = max(verdicts.parameters(arm) for arm in arms)
    seen = min(verdicts.characters(arm) for arm in arms)
    lacks = []
    if size < 0.9 * claim["parameters"]:
        lacks.append(f"{_number(size)} of {_number(claim['parameters'])} parameters")
    if seen < 0.99 * claim["characters"]:
        lacks.append(f"{_number(seen)} of {_number(claim['characters'])} characters")
    return ", ".join(lacks)


def _scale(arms: Sequence[Arm]) -> str:
    largest = max(arms, key=lambda arm: (verdicts.characters(arm), verdicts.parameters(arm)))
    return (
        f"{_number(verdicts.parameters(largest))} parameters, "
        f"{_number(verdicts.characters(largest))} characters of {largest.config['data']['name']}"
    )


def _number(count: float) -> str:
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{letter}"
    return f"{count:g}"


def evidence_page(
    ledger: Mapping[str, Any], rows: Sequence[Row], recorded: Mapping[str, Arm]
) -> str:
    """Returns ``docs/evidence.md``: one line a claim, the evidence with its runs, all arms."""
    parts = [
        "# Evidence\n",
        _wrapped(_opening(rows)),
        "".join(
            textwrap.fill(f"* {item}", WIDTH, subsequent_indent="  ") + "\n" for item in READING
        ),
        _summary(ledger, rows),
    ]
    for claim in ledger["claim"]:
        scale = f"{_number(claim['parameters'])} parameters"
        if claim["characters"]:
            scale += f", {_number(claim['characters'])} characters"
        parts.append(f"## {claim['id']}\n")
        parts.append(
            _wrapped(
                f"Claim: {claim['says']}. The paper: {claim['published']} ({scale}). "
                f"Expected here: {claim['expects']}."
            )
        )
        parts += [_row_text(row) for row in rows if row.claim["id"] == claim["id"]]
    for table in ledger.get("table", []):
        parts.append(f"## {table['title']}\n\n{_arms_table(table, recorded)}\n")
    return "\n".join(parts)


def _opening(rows: Sequence[Row]) -> str:
    """Says how much is decided at the paper's scale."""
    decided = sum(row.status in ("holds", "fails") for row in rows)
    found = f"{decided} of {len(rows)} pieces of evidence decide a claim at the paper's scale."
    if not decided:
        found = "**No claim is confirmed or refuted at the paper's scale yet.**"
    return (
        f"What the recorded runs say of each claim of the paper. {found} Written by `python -m "
        "train claims` from [claims.toml](claims.toml) and the records under "
        "[results/](../results/): do not edit."
    )


def _wrapped(text: str) -> str:
    """Wraps a paragraph."""
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False) + "\n"


def _summary(ledger: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """Returns a table of the verdicts, one line for each piece of evidence that there is."""
    lines = [
        "| claim | evidence of | measured at | at that scale | verdict on the claim |",
        "|---|---|---|---|---|",
    ]
    for claim in ledger["claim"]:
        of_claim = [row for row in rows if row.claim["id"] == claim["id"]]
        done = [row for row in of_claim if row.status != "not yet run"]
        if all("form" in row.evidence for row in done):
            # The published form comes first, even if not yet run.
            done = [of_claim[0], *done]
        name = f"[{claim['id']}](#{claim['id'].lower()}) {claim['says']}"
        for row in done:
            about = ", ".join([row.evidence.get("form", "published form"), *_part(row)])
            there = row.there or row.reason
            lines.append(f"| {name} | {about} | {row.scale} | {there} | {row.status} |")
            name = ""
    return "\n".join(lines) + "\n"


def _part(row: Row) -> list[str]:
    """Returns the part of the claim that the evidence is of, if it is not of all of it."""
    return [str(row.evidence["part"])] if "part" in row.evidence else []


def _verdict_text(row: Row) -> str:
    """Returns status, what it is of if not of the whole claim and published form, and reason."""
    about = [*([row.evidence["form"]] if "form" in row.evidence else []), *_part(row)]
    text = f"**{row.status}**" + (f" ({', '.join(about)})" if about else "")
    return text + (f": {row.reason}" if row.reason else "")


def _row_text(row: Row) -> str:
    """Returns one piece of evidence: verdict, commands that repeat it, records."""
    verdict = f"{_verdict_text(row)}."
    if row.measured:
        verdict += f" {row.measured} ({row.scale})."
    parts = [_wrapped(verdict), "```sh", *row.evidence["commands"], "```", ""]
    if row.arms:
        parts += [
            "| records | commit | device | data | parameters | characters | context |",
            "|---|---|---|---|---|---|---|",
            *map(_records_line, row.arms),
            "",
        ]
    return "\n".join(parts)


def _records_line(arm: Arm) -> str:
    """Returns a line of a table of records, with what all starts of all runs had."""
    starts = [start for run in arm.runs for start in run.provenance]
    records = ", ".join(f"[{run.path.name}](../results/{run.path.name})" for run in arm.runs)
    commits = _each_once(str(start["git"]["commit"])[:12] for start in starts)
    devices = _each_once(str(start["device"]) for start in starts)
    data = _each_once(str(start["data"]["sha256"])[:12] for start in starts)
    return (
        f"| {records} | {commits} | {devices} | {data} | {verdicts.parameters(arm):,} | "
        f"{verdicts.characters(arm):,} | {arm.config['data']['context']} |"
    )


def _each_once(values: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(values))


def _arms_table(table: Mapping[str, Any], recorded: Mapping[str, Arm]) -> str:
    lines = []
    header = [
        "| arm | n | parameters | characters | BPC | difference | note |",
        "|---|---|---|---|---|---|---|",
    ]
    missing = []
    for name in [table["reference"], *table["arms"]]:
        try:
            (arm,) = verdicts.wanted(recorded, [name])
        except NotRunError:
            missing.append(f"`{name}`")
            continue
        (alone,) = verdicts.losses_at_end([arm])
        apart, note = "", ""
        if name != table["reference"]:
            try:
                arms = verdicts.wanted(recorded, [name, table["reference"]])
                verdicts.check_comparable(arms, same_size=False)
                alone, reference = verdicts.losses_at_end(arms)
                apart = verdicts.signed(*verdicts.difference(alone, reference))
                sizes = [verdicts.parameters(a) for a in arms]
                if abs(sizes[0] - sizes[1]) > verdicts.MATCHED * sizes[1]:
                    note = "not of the same size"
            except NotRunError:
                note = "no record of the reference"
            except NotComparableError as unlike:
                note = f"not comparable: {unlike}"
        spread = "" if alone.deviation is None else f" ± {alone.deviation:.4f}"
        part = "whole split" if alone.whole_split else "slice"
        lines.append(
            f"| `{name}` | {len(alone.values)} | {verdicts.parameters(arm):,} | "
            f"{verdicts.characters(arm):,} | {alone.mean:.4f}{spread} ({part}) | {apart} | {note} |"
        )
    parts = ["\n".join([*header, *lines])] if lines else []
    if missing:
        parts.append(_wrapped(f"Not yet run: {', '.join(missing)}.").rstrip())
    return "\n\n".join(parts)


def page_of(root: Path) -> str:
    """Returns ``docs/evidence.md`` as the ledger and the records make it.

    Raises:
      UserError: the ledger or a record cannot be read.
    """
    source = root / "docs" / "claims.toml"
    try:
        ledger = tomllib.loads(source.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{source} cannot be read ({error}); run in the repository") from None
    results = root / "results"
    recorded = recorded_arms(results)
    rows = [
        judge(claim, evidence, recorded, results)
        for claim in ledger["claim"]
        for evidence in claim["evidence"]
    ]
    return evidence_page(ledger, rows, recorded)


def program(argv: Sequence[str]) -> None:
    """Runs the program with the arguments of its command line."""
    p = Arguments(prog="python -m train claims", description=__doc__)
    p.add_argument("--root", default=".", help="the repository")
    p.add_argument("--check", action="store_true", help="write nothing; fail if the page differs")
    options = p.parse_args(argv[1:])
    root = user_path("--root", options.root)
    page, text = root / "docs" / "evidence.md", page_of(root)
    if page.is_file() and page.read_text(encoding="utf-8") == text:
        print(f"{page} agrees with results/")
        return
    if options.check:
        raise UserError(
            f"{page.name} and results/ disagree; run python -m train claims and commit what it "
            "writes"
        )
    with writing("--root", root):
        write_atomically(page, text)
    print(f"wrote {page}")
