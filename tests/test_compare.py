"""Two arms compared: the table against figures worked out by hand, what counts, refusals."""

import json
import math

import pytest
from small_runs import write_evaluation, write_record

from train.analysis import compare
from train.analysis.records import read_arms
from train.errors import UserError

FSN = ((3.0, 2.40, 2.00), (3.2, 2.44, 2.02))
TRANSFORMER = ((2.9, 2.50, 2.21), (2.7, 2.54, 2.25))
FACTS = {"characters": 3_000_000}


@pytest.fixture
def records(tmp_path):
    return [
        write_record(tmp_path, arm, seed=seed, curve=curve, whole=curve[-1] + 0.1, **FACTS)
        for arm, curves in (("fsn", FSN), ("transformer", TRANSFORMER))
        for seed, curve in enumerate(curves)
    ]


def compared(folders, tmp_path, *options):
    file = tmp_path / "out.json"
    compare.program(["compare", *map(str, folders), f"--output={file}", *options])
    return json.loads(file.read_text(encoding="utf-8"))


def test_means_errors_and_what_they_decide(records, tmp_path, capsys):
    found = compared(records, tmp_path)
    assert (found["arm"], found["reference"]) == ("fsn", "transformer")
    first, second, last = found["points"]
    assert [p["characters"] for p in found["points"]] == [1_000_000, 2_000_000, 3_000_000]
    # Deviations of 0.1414 each over two seeds: errors of 0.1 each, 0.1414 together.
    assert first["difference"] == pytest.approx(0.3)
    assert first["standard_error"] == pytest.approx(math.hypot(0.1, 0.1))
    assert first["verdict"] == "above"
    assert second["difference"] == pytest.approx(-0.1)
    assert second["standard_error"] == pytest.approx(math.hypot(0.02, 0.02))
    assert last["fsn"]["mean"] == pytest.approx(2.01)
    assert last["verdict"] == found["end"] == "below"
    # The first evaluation is within the first million characters, which do not count.
    assert found["throughout"] == "below"
    assert found["crossing"] == 2_000_000
    assert found["whole_validation"]["difference"] == pytest.approx(-0.22)
    assert "test" not in found
    assert [run["record"] for run in found["runs"]["fsn"]] == ["fsn", "fsn_seed1"]
    printed = capsys.readouterr().out
    assert "2.0100 ± 0.0141" in printed
    assert "at the end (whole validation split) fsn is below" in printed
    assert printed.startswith((tmp_path / "out.txt").read_text(encoding="utf-8"))
    assert (tmp_path / "out.png").stat().st_size > 10_000


def test_the_other_way_round(records, tmp_path):
    found = compared(records, tmp_path, "--reference=fsn")
    assert (found["arm"], found["end"], found["crossing"]) == ("transformer", "above", None)


def test_equal_time_is_when_the_faster_arm_has_ended(records, tmp_path):
    # Rows of the clock: 5 s a step for the first seed, 6 s for the second.
    for folder in records[2:]:
        timing = [{"step": i, "seconds": 2.0} for i in (1, 2, 3)]
        (folder / "timing.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in timing), encoding="utf-8"
        )
    time = compared(records, tmp_path)["equal_time"]
    assert time["seconds"] == 6.0
    assert time["transformer"]["mean"] == pytest.approx(2.23)
    # A fifth of the way from the first evaluation to the second; just the first.
    assert time["fsn"]["bpc"] == pytest.approx([3.0 - 0.6 / 5, 3.2])
    assert time["verdict"] == "above"

    provenance = json.loads((records[0] / "provenance.json").read_text(encoding="utf-8"))
    provenance[0]["device"] = "another machine"
    (records[0] / "provenance.json").write_text(json.dumps(provenance), encoding="utf-8")
    assert compared(records, tmp_path)["equal_time"] is None


def test_other_runs_of_the_same_models_may_give_the_clock(records, tmp_path):
    """Steps of 5 and 6 s for the FSN, of 7 s for the transformer, whatever the runs logged."""
    clocks = [
        write_record(tmp_path / "clocks", arm, seed=seed, curve=(3.0,))
        for arm, seed in (("fsn", 0), ("fsn", 1), ("transformer", 2))
    ]
    for folder in records:
        (folder / "timing.jsonl").unlink()
    options = ["--clocks", *map(str, clocks)]
    found = compared(records, tmp_path, *options)
    assert found["seconds"] == {"fsn": 3 * 5.5, "transformer": 3 * 7.0}
    assert found["equal_time"]["fsn"]["bpc"] == pytest.approx([2.00, 2.02])
    message = "none of the runs after --clocks has the model, context and batch size of transformer"
    with pytest.raises(UserError, match=message):
        compared(records, tmp_path, *options[:-1])
    # Nor does a run of the same model count whose steps are others.
    for folder, changes in (("longer", {"context": 512}), ("larger", {"batch_size": 32})):
        clock = write_record(tmp_path / folder, "transformer", curve=(3.0,))
        for run, size in ((clock, changes), (records[2], {"batch_size": 16})):
            config = json.loads((run / "config.json").read_text(encoding="utf-8"))
            config["data"]["context"] = size.get("context", config["data"]["context"])
            config["training"] = {"batch_size": size.get("batch_size", 16)}
            (run / "config.json").write_text(json.dumps(config), encoding="utf-8")
        with pytest.raises(UserError, match=message):
            compared(records, tmp_path, *options[:-1], str(clock))


def test_any_budget_compares_a_shorter_run_at_its_own_end(records, tmp_path):
    shorter = [
        write_record(
            tmp_path, "shorter", seed=seed, curve=curve, whole=2.2 + seed / 10, characters=2_000_000
        )
        for seed, curve in enumerate(((2.8, 2.1), (2.8, 2.2)))
    ]
    folders = [*shorter, *records[2:]]
    with pytest.raises(compare.UserError, match="different budget: shorter 2000000"):
        compared(folders, tmp_path)
    for folder, seconds in zip(folders, (3.0, 5.0, 2.0, 2.0), strict=True):
        row = {"step": 1, "seconds": seconds}
        (folder / "timing.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    found = compared(folders, tmp_path, "--any_budget")
    assert [p["characters"] for p in found["points"]] == [1_000_000, 2_000_000]
    # 2.25 against 2.33 at the end of each.
    assert found["whole_validation"]["difference"] == pytest.approx(-0.08)
    assert found["end"] == "undecided"
    assert found["seconds"] == {"shorter": 8.0, "transformer": 6.0}


def test_one_seed_decides_nothing(records, tmp_path):
    found = compared([records[0], records[2]], tmp_path)
    assert found["end"] == found["throughout"] == "undecided"
    assert found["points"][-1]["standard_error"] is None


@pytest.mark.parametrize(
    ("second", "last", "throughout"),
    [
        (2.3, 2.0, "below"),
        (2.7, 2.0, "mixed"),
        (2.3, 2.4, "mixed"),
        (2.5, 2.4, "mixed"),  # once undecided, once above
        (2.5, 2.0, "undecided"),
        (2.7, 2.4, "above"),
    ],
)
def test_throughout_is_what_every_later_evaluation_says(tmp_path, second, last, throughout):
    """Against 2.5 and 2.2; seeds 0.04 apart in each arm, so that 0.2 is more than enough."""
    for arm, curve in (("fsn", (2.0, second, last)), ("transformer", (3.0, 2.5, 2.2))):
        for seed in (0, 1):
            moved = [bpc + 0.04 * seed for bpc in curve]
            write_record(tmp_path, arm, seed=seed, curve=moved, **FACTS)
    arms = read_arms(sorted(tmp_path.iterdir()))
    assert compare.compare(arms["fsn"], arms["transformer"])["throughout"] == throughout


def test_test_reads_are_compared_when_every_run_has_one(records, tmp_path):
    for folder, bpc in zip(records, (2.0, 2.1, 2.4, 2.5), strict=True):
        write_evaluation(folder, "test_reads.jsonl", bpc)
    assert compared(records, tmp_path)["test"]["difference"] == pytest.approx(-0.4)


@pytest.mark.parametrize(
    ("choose", "options", "message"),
    [
        (slice(0, 2), (), "name the runs of two arms; these are of fsn"),
        (slice(0, 4), ("--reference=x",), "--reference must be one of fsn, transformer; got 'x'"),
        (slice(0, 4), ("--output=x.txt",), "must be a file whose name ends in .json"),
        (slice(0, 4), ("--output=/proc/none/x.json",), "folder /proc/none cannot be made"),
        (slice(0, 4), ("--output=/dev/null/x.json",), "folder /dev/null cannot be made"),
    ],
)
def test_wrong_inputs_are_one_line(records, tmp_path, choose, options, message):
    with pytest.raises(compare.UserError, match=message):
        compared(records[choose], tmp_path, *options)


def test_arms_of_other_data_or_unfinished_are_refused(records, tmp_path):
    other = write_record(tmp_path, "transformer_of_code", sha256="c0de", **FACTS)
    with pytest.raises(compare.UserError, match="cannot be compared: different data"):
        compared([records[0], other], tmp_path)
    (records[0] / "summary.json").unlink()
    with pytest.raises(compare.UserError, match="is not finished"):
        compared(records, tmp_path)


@pytest.mark.parametrize("beside", ["out.txt", "out.png"])
def test_a_folder_in_the_way_of_a_result_is_reported_first(records, tmp_path, beside):
    (tmp_path / beside).mkdir()
    with pytest.raises(compare.UserError, match=f"{beside} beside it is a folder; name another"):
        compared(records, tmp_path)
    assert not (tmp_path / "out.json").exists()
