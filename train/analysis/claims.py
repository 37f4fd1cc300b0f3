"""``python -m train claims``: judges the paper's claims by the runs under ``results/``.

``docs/claims.toml`` says what each claim is and which runs test it; ``verdicts.py`` compares.
The outcome is written to the block between two markers in README.md, and in full to
``docs/evidence.md``. With ``--check`` nothing is written, and pages that differ are an error.
"""

import dataclasses
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.analysis import verdicts
from train.analysis.records import Arm, recorded_arms
from train.analysis.verdicts import NotComparableError, NotRunError, Status, Verdict
from train.errors import UserError
from train.files import write_atomically
from train.program import Arguments

BEGIN = "<!-- claims: written by python -m train claims from results/; do not edit -->"
END = "<!-- end of claims -->"

PAIRS = {
    "below": verdicts.below,
    "below_throughout": verdicts.below_throughout,
    "every_seed_below": verdicts.every_seed_below,
}
"""Tests that take arms alone."""

BOUNDED = {"tracks": verdicts.tracks, "early_only": verdicts.early_only}
"""Tests that take a bound in BPC as well."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of evidence, judged.

    Attributes:
      claim: of ``docs/claims.toml``.
      evidence: of it.
      status: whether the claim holds.
      scale: parameters, characters and corpus of the runs, in words; empty without runs.
      measured: the numbers, in words.
      reason: of the status.
      arms: what was found of the runs.
    """

    claim: Mapping[str, Any]
    evidence: Mapping[str, Any]
    status: Status
    scale: str
    measured: str
    reason: str
    arms: tuple[Arm, ...]


def judge(
    claim: Mapping[str, Any],
    evidence: Mapping[str, Any],
    recorded: Mapping[str, Arm],
    results: Path,
) -> Row:
    """The status of one line of evidence, from the records and the tables beside them."""
    arms: tuple[Arm, ...] = ()
    try:
        arms, verdict = _test(evidence, recorded, results)
    except NotRunError as missing:
        return Row(claim, evidence, "not yet run", "", "", f"no record of {missing}", arms)
    except NotComparableError as unlike:
        return Row(claim, evidence, "not comparable", "", "", str(unlike), arms)
    shortfall = _below_scale(claim, arms)
    status: Status
    if shortfall:
        status = "not comparable"
        what = verdict.direction + (f" ({verdict.reason})" if verdict.reason else "")
        reason = f"{shortfall}; at this scale the direction {_is(verdict)}{what}"
    elif verdict.direction == "undecided":
        status, reason = "not comparable", f"undecided: {verdict.reason}"
    else:
        status, reason = verdict.direction, ""
    return Row(claim, evidence, status, _scale(arms), verdict.measured, reason, arms)


def _is(verdict: Verdict) -> str:
    return "is " if verdict.direction == "undecided" else ""


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
        table = _table(results / evidence["table"], arms)
        return arms, verdicts.copy_depth(table, full=names[0], base=names[1])
    if test == "readings":
        return arms, verdicts.readings(_table(results / evidence["table"], arms))
    verdicts.check_comparable(arms, same_budget=evidence.get("same_budget", True))
    if test in BOUNDED:
        return arms, BOUNDED[test](arms, within=evidence["within"])
    return arms, PAIRS[test](arms)


def _table(file: Path, arms: Sequence[Arm]) -> Mapping[str, Any]:
    """What an analysis wrote, if it is of recorded runs of these arms."""
    try:
        table = json.loads(file.read_text())
        made_of = {
            arm.name: {
                (run["seed"], run["commit"], run["step"])
                for run in (table["arms"][arm.name]["runs"] if "arms" in table else [table])
            }
            for arm in arms
        }
    except FileNotFoundError:
        raise NotRunError(file.name) from None
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({error!r}); make it again") from None
    for arm in arms:
        recorded = {
            (run.seed, run.provenance[0]["git"]["commit"], run.summary["steps"]) for run in arm.runs
        }
        if not made_of[arm.name] <= recorded:
            raise NotComparableError(f"{file.name} is of other runs of {arm.name} than the records")
    return table


def _below_scale(claim: Mapping[str, Any], arms: Sequence[Arm]) -> str:
    """What the runs lack of the scale that the claim is made at; empty if nothing."""
    size = max(verdicts.parameters(arm) for arm in arms)
    seen = min(verdicts.characters(arm) for arm in arms)
    lacks = []
    if size < 0.9 * claim["parameters"]:
        lacks.append(f"{_number(size)} of {_number(claim['parameters'])} parameters")
    if seen < 0.99 * claim["characters"]:
        lacks.append(f"{_number(seen)} of {_number(claim['characters'])} characters")
    return ", ".join(lacks)


def _scale(arms: Sequence[Arm]) -> str:
    size, seen = arms[0], max(map(verdicts.characters, arms))
    return (
        f"{_number(verdicts.parameters(size))} parameters, {_number(seen)} characters of "
        f"{size.config['data']['name']}"
    )


def _number(count: float) -> str:
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g}{letter}"
    return f"{count:g}"


def readme_block(rows: Sequence[Row]) -> str:
    """The table of the README: each claim's evidence that has been run, or that none has."""
    lines = [BEGIN, "| claim | expected here | measured | status |", "|---|---|---|---|"]
    by_claim: dict[str, list[Row]] = {}
    for row in rows:
        by_claim.setdefault(row.claim["id"], []).append(row)
    for of_claim in by_claim.values():
        done = [row for row in of_claim if row.status != "not yet run"]
        left = "; ".join(row.reason for row in of_claim if row.status == "not yet run")
        for index, row in enumerate(done or of_claim[:1]):
            claim = row.claim
            said = f"**{claim['id']}** {claim['says']} ({claim['published']})"
            expected = claim["expects"]
            if index:
                said, expected = f"**{claim['id']}**, further evidence", ""
            measured = f"{row.measured} ({row.scale})" if row.measured else ""
            status = f"**{row.status}**" + (f": {row.reason}" if row.reason else "")
            if left and done and row is done[-1]:
                status += f". Not yet run: {left}"
            lines.append(f"| {said} | {expected} | {measured} | {status} |")
    return "\n".join([*lines, END])


def evidence_page(
    ledger: Mapping[str, Any], rows: Sequence[Row], recorded: Mapping[str, Arm]
) -> str:
    """``docs/evidence.md``: every line of evidence with its runs, and the tables of arms."""
    parts = [
        "# Evidence\n",
        "Written by `python -m train claims` from [claims.toml](claims.toml) and the records under "
        "[results/](../results/): do not edit. Losses are validation BPC; ± is the standard "
        "deviation over seeds, or where it says s.e. the standard error of a difference. A "
        "comparison is decided where both arms have two seeds or more and their means are more "
        f"than {verdicts.STANDARD_ERRORS:g} standard errors apart.\n",
    ]
    for claim in ledger["claim"]:
        scale = f"{_number(claim['parameters'])} parameters"
        if claim["characters"]:
            scale += f", {_number(claim['characters'])} characters"
        parts.append(
            f"## {claim['id']}: {claim['says']}\n\nThe paper: {claim['published']} ({scale}). "
            f"Expected here: {claim['expects']}.\n"
        )
        for row in rows:
            if row.claim["id"] == claim["id"]:
                parts.append(_row_text(row))
    for table in ledger.get("table", []):
        parts.append(f"## {table['title']}\n\n{_arms_table(table, recorded)}\n")
    return "\n".join(parts)


def _row_text(row: Row) -> str:
    lines = [
        f"* **{row.status}**"
        + (f": {row.reason}" if row.reason else "")
        + (f". {row.measured} ({row.scale})" if row.measured else "")
    ]
    lines += [f"  * `{command}`" for command in row.evidence["commands"]]
    for arm in row.arms:
        first = arm.runs[0]
        start = first.provenance[0]
        records = ", ".join(f"[{r.path.name}](../results/{r.path.name})" for r in arm.runs)
        lines.append(
            f"  * {records}: commit {str(start['git']['commit'])[:12]}, {start['device']}, "
            f"data {start['data']['sha256'][:12]}, {verdicts.parameters(arm):,} parameters, "
            f"{verdicts.characters(arm):,} characters, context {arm.config['data']['context']}"
        )
    return "\n".join(lines) + "\n"


def _arms_table(table: Mapping[str, Any], recorded: Mapping[str, Arm]) -> str:
    lines = [
        "| arm | n | parameters | characters | BPC | difference | note |",
        "|---|---|---|---|---|---|---|",
    ]
    names = [table["reference"], *table["arms"]]
    for name in names:
        try:
            (arm,) = verdicts.wanted(recorded, [name])
        except NotRunError:
            lines.append(f"| `{name}` | 0 | | | | | not yet run |")
            continue
        (alone,) = verdicts.final_losses([arm])
        apart, note = "", ""
        if name != table["reference"]:
            try:
                arms = verdicts.wanted(recorded, [name, table["reference"]])
                verdicts.check_comparable(arms, same_size=False)
                alone, reference = verdicts.final_losses(arms)
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
    return "\n".join(lines)


def replace_block(page: str, block: str, name: str = "README.md") -> str:
    """The page with the text between the markers, and the markers, exchanged.

    Raises:
      UserError: it does not have both markers, once, in their order.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise UserError(f"{name} must hold the lines {BEGIN!r} and {END!r} once, in this order")
    before, rest = page.split(BEGIN)
    return before + block + rest.split(END)[1]


def pages(root: Path) -> dict[Path, str]:
    """What each page should say, by its path.

    Raises:
      UserError: the ledger or a record cannot be read.
    """
    source = root / "docs" / "claims.toml"
    try:
        ledger = tomllib.loads(source.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{source} cannot be read ({error}); run in the repository") from None
    results = root / "results"
    recorded = recorded_arms(results)
    rows = [
        judge(claim, evidence, recorded, results)
        for claim in ledger["claim"]
        for evidence in claim["evidence"]
    ]
    readme = root / "README.md"
    return {
        readme: replace_block(readme.read_text(), readme_block(rows)),
        root / "docs" / "evidence.md": evidence_page(ledger, rows, recorded),
    }


def program(argv: Sequence[str]) -> None:
    """Parses and calls."""
    p = Arguments(prog="python -m train claims", description=__doc__)
    p.add_argument("--root", type=Path, default=Path(), help="the repository")
    p.add_argument("--check", action="store_true", help="write nothing; fail if a page differs")
    options = p.parse_args(argv[1:])
    wanted = pages(options.root)
    differ = [p for p, text in wanted.items() if not p.is_file() or p.read_text() != text]
    if options.check and differ:
        raise UserError(
            f"{', '.join(p.name for p in differ)} and results/ disagree; run "
            f"python -m train claims and commit what it writes"
        )
    for page in differ:
        write_atomically(page, wanted[page])
        print(f"wrote {page}")
    if not differ:
        print("the pages agree with results/")
