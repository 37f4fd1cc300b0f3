"""The ledger: judged from records, written as a page, and in agreement with this repository."""

import json
import runpy
import shutil
import tomllib
from pathlib import Path

import pytest
from small_runs import write_record

from train.__main__ import PROGRAMS
from train.analysis import claims, verdicts
from train.analysis.records import recorded_arms
from train.errors import UserError
from train.flags import load_config, parse_config

ROOT = Path(__file__).resolve().parent.parent
LEDGER = tomllib.loads((ROOT / "docs" / "claims.toml").read_text(encoding="utf-8"))
CLAIM = {
    "id": "X1", "says": "one is below the other", "published": "1 against 2", "expects": "below",
    "parameters": 1000, "characters": 10**6,
}  # fmt: skip
EVIDENCE = {"test": "below", "arms": ["one", "other"], "commands": ["python -m train"]}


def test_the_page_agrees_with_the_results():
    """If this fails: python -m train claims, then commit what it writes."""
    claims.program(["claims", f"--root={ROOT}", "--check"])


def test_the_ledger_has_every_claim_and_every_test_exists():
    assert [claim["id"] for claim in LEDGER["claim"]] == [f"C{i}" for i in range(1, 10)]
    used = {e["test"] for claim in LEDGER["claim"] for e in claim["evidence"]}
    assert all(callable(getattr(verdicts, test)) for test in used)
    assert {*claims.PAIRS, *claims.BOUNDED} <= set(dir(verdicts))


def test_its_arms_are_those_of_configs():
    of_options = {"enwik8_transformer_50_epochs", "enwik8_projected_one_head_pocket"}
    names = of_options | {
        load_config(f"{file}:{arm}").name
        for file in (ROOT / "configs").glob("[!_]*.py")
        for arm in runpy.run_path(str(file)).get("ARMS", ())
    }
    for claim in LEDGER["claim"]:
        for evidence in claim["evidence"]:
            arms = [a.format(rung=r) for a in evidence["arms"] for r in evidence.get("rungs", "-")]
            assert set(arms) <= names, claim["id"]
    for table in LEDGER["table"]:
        assert {table["reference"], *table["arms"]} <= names
    # No ablation is left out of its table.
    ablations = {name for name in names if name.startswith("ablation_")}
    shown = {n for table in LEDGER["table"] for n in (table["reference"], *table["arms"])}
    assert ablations <= shown


def test_a_form_is_named_where_it_is_not_the_published_one():
    for claim in LEDGER["claim"]:
        assert "form" not in claim["evidence"][0], claim["id"]
        for evidence in claim["evidence"]:
            arms = [arm.partition("_")[2] for arm in evidence["arms"]]
            of_projected = any("projected" in arm for arm in arms) or arms[0] in (
                "fsn", "base", "modes",  # of configs/ablations.py
            )  # fmt: skip
            assert of_projected == evidence.get("form", "").startswith("projected form"), evidence


def test_its_commands_make_the_arms_they_stand_beside():
    for claim in LEDGER["claim"]:
        for evidence in claim["evidence"]:
            for command in evidence["commands"]:
                python, m, train, *arguments = command.split()
                assert (python, m, train) == ("python", "-m", "train")
                if arguments[0].startswith("--config="):
                    assert parse_config(["train", *arguments]).name in evidence["arms"]
                else:
                    assert arguments[0] in PROGRAMS
                if "table" in evidence:
                    assert command.endswith(f"--output=results/{evidence['table']}")


def judge(evidence, results):
    return claims.judge(CLAIM, evidence, recorded_arms(results), results)


def records(results, low=2.0, seeds=2, **facts):
    for seed in range(seeds):
        write_record(results, "one", seed=seed, curve=(3.0, low + seed / 100), **facts)
        write_record(results, "other", seed=seed, curve=(3.0, 2.5 + seed / 100), **facts)


@pytest.mark.parametrize(
    ("made", "status", "reason"),
    [
        ({}, "holds", ""),
        ({"low": 3.0}, "fails", ""),
        ({"seeds": 1}, "not comparable", "undecided: one seed"),
        ({"seeds": 0}, "not yet run", "no record of one"),
        (
            {"parameters": 10},
            "not comparable",
            "10 of 1k parameters; at this scale: holds",
        ),
        (
            {"characters": 10**5, "low": 3.0},
            "not comparable",
            "100k of 1M characters; at this scale: fails",
        ),
    ],
)
def test_a_status_is_computed_from_the_records(tmp_path, made, status, reason):
    records(tmp_path, **made)
    row = judge(EVIDENCE, tmp_path)
    assert (row.status, row.reason) == (status, reason)


def test_arms_of_different_data_are_not_compared(tmp_path):
    write_record(tmp_path, "one")
    write_record(tmp_path, "other", sha256="0000")
    row = judge(EVIDENCE, tmp_path)
    assert row.status == "not comparable" and "different data" in row.reason


def test_a_table_must_be_there_readable_and_of_the_recorded_runs(tmp_path):
    for seed in (0, 3):
        write_record(tmp_path, "one", seed=seed)
    evidence = {"test": "readings", "arms": ["one"], "table": "read.json", "commands": []}
    row = judge(evidence, tmp_path)
    assert (row.status, row.reason) == ("not yet run", "no record of read.json")
    coefficient = {"strength": [0.5], "angle": [0.0]}
    page = {
        "name": "one_seed0",
        "kernel_coefficients": 1,
        "layers": [{"coefficients": [coefficient]}],
    }
    run = {"seed": 0, "commit": "c0ffee", "step": 2}
    for other, status in (
        ({}, "holds"),
        ({"name": "other_seed0"}, "not comparable"),
        ({"seed": 1}, "not comparable"),
        ({"commit": "decaf"}, "not comparable"),
        ({"step": 1}, "not comparable"),
    ):
        full = {**page, **run, **other}
        (tmp_path / "read.json").write_text(json.dumps(full), encoding="utf-8")
        row = judge(evidence, tmp_path)
        assert row.status == status
        if status == "holds":  # the page shows the run that was read alone
            assert [record.seed for record in row.arms[0].runs] == [0]
    (tmp_path / "read.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=r"read.json cannot be read"):
        judge(evidence, tmp_path)


def test_a_ladder_is_judged_by_the_rungs_that_were_run(tmp_path):
    evidence = {
        "test": "ladder", "arms": ["fsn_{rung}", "transformer_{rung}"], "rungs": ["1m", "2m"],
        "commands": [],
    }  # fmt: skip
    assert judge(evidence, tmp_path).reason == "no record of any rung"
    for rung, status in (("1m", "not comparable"), ("2m", "holds")):
        size = {"parameters": 1000 if rung == "1m" else 2000, "characters": 10**6 * int(rung[0])}
        for seed in range(2):
            write_record(tmp_path, f"fsn_{rung}", seed=seed, curve=(2.0 + seed / 100,), **size)
        assert judge(evidence, tmp_path).status in ("not yet run", "not comparable")
        for seed in range(2):
            write_record(
                tmp_path, f"transformer_{rung}", seed=seed, curve=(2.1 + seed / 100,), **size
            )
        assert judge(evidence, tmp_path).status == status
    # The size and the budget are of one rung, the largest.
    assert judge(evidence, tmp_path).scale == "2k parameters, 2M characters of enwik8"


@pytest.fixture
def repository(tmp_path):
    """The real ledger, and records of two of its arms."""
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "claims.toml", tmp_path / "docs")
    for seed in range(2):
        for arm, low in (("fsn", 2.0), ("transformer", 2.5)):
            curve, commits = (3.0 + low, low + seed / 100), ("c0ffee", "decaf", "c0ffee")[seed:]
            name = f"enwik8_{arm}_pocket_long"
            write_record(tmp_path / "results", name, seed=seed, curve=curve, commits=commits)
    return tmp_path


def test_the_page_is_written_and_a_change_of_either_side_is_noticed(repository, capsys):
    check = ["claims", f"--root={repository}", "--check"]
    with pytest.raises(UserError, match=r"evidence.md and results/ disagree"):
        claims.program(check)
    claims.program(["claims", f"--root={repository}"])
    claims.program(check)
    assert "agrees with results/" in capsys.readouterr().out
    page = repository / "docs" / "evidence.md"
    text = page.read_text(encoding="utf-8")
    summary = {row[3:5]: row for row in text.splitlines() if row.startswith("| [C")}
    assert [*summary] == [f"C{i}" for i in range(1, 10)]
    scale = "1k parameters, 1M characters of enwik8"
    assert summary["C1"].endswith(f"| published form | {scale} | holds | not comparable |")
    assert sum(row.endswith("| not yet run |") for row in summary.values()) == 8
    assert "Not yet run: `enwik8_projected_pocket_long`, " in text
    assert text.count("| c0ffee; decaf | 1 x abacus | da7a | 1,000 |") == 2
    # What is missing beside what there is: the same claim at its own size.
    first, _ = text.split("\n## C2\n")
    assert "**not yet run**: no record of enwik8_fsn_1m." in first
    assert "at 2 of 2 evaluations" in first.replace("\n", " ")
    assert "| `enwik8_transformer_pocket_long` | 2 | 1,000 | 1,000,000 | 2.5050 ± 0.0071" in text
    assert "+0.5000 ± 0.0071 (s.e.)" in text

    page.write_text(text.replace("2.0050", "1.9050"), encoding="utf-8")
    with pytest.raises(UserError, match=r"evidence.md and results/ disagree"):
        claims.program(check)
    page.write_text(text, encoding="utf-8")
    shutil.rmtree(repository / "results" / "enwik8_fsn_pocket_long_seed1")
    with pytest.raises(UserError, match="disagree"):
        claims.program(check)


def test_a_folder_without_a_ledger_is_a_mistake(tmp_path):
    with pytest.raises(UserError, match=r"run in the repository"):
        claims.program(["claims", f"--root={tmp_path}"])
