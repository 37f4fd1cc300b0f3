"""How arms end: the table by hand, which figure is drawn, refusals."""

import json

import numpy as np
import pytest
from small_runs import write_evaluation, write_record

from train.analysis import final_losses
from train.errors import UserError


def found(folders, tmp_path, *options):
    """What the command writes."""
    file = tmp_path / "out.json"
    final_losses.program(["final_losses", *map(str, folders), f"--output={file}", *options])
    assert (tmp_path / "out.png").stat().st_size > 10_000
    return json.loads(file.read_text(encoding="utf-8"))


def variants(tmp_path):
    return [
        write_record(tmp_path, name, seed=seed, curve=(3.0, end), parameters=size)
        for name, size, ends in (
            ("pre_no_delay", 1000, (2.30, 2.34)),
            ("pre_fsn", 1005, (2.00, 2.04)),
            ("pre_small", 600, (2.80,)),
            ("pre_transformer", 1001, (2.10, 2.10)),
        )
        for seed, end in enumerate(ends)
    ]


def test_a_run_evaluated_elsewhere_than_at_its_end_is_named(tmp_path, capsys):
    records = variants(tmp_path)
    write_evaluation(records[0], "evaluations.jsonl", 1.0, step=1)
    found(records, tmp_path)
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1
    assert notes[0].endswith(f"python -m train evaluate {records[0]} --checkpoint=latest")


def test_variants_show_their_difference_to_the_reference(tmp_path, capsys):
    records = variants(tmp_path)
    result = found(records, tmp_path, "--reference=pre_fsn")
    assert result["variants"]
    no_delay, fsn, small, _ = result["arms"]
    assert [row["arm"] for row in result["arms"]][:2] == ["pre_no_delay", "pre_fsn"]
    assert no_delay["bpc"] == pytest.approx(2.32) and no_delay["seeds"] == [2.30, 2.34]
    # Deviations of 0.0283 over two seeds each: errors of 0.02 each.
    assert no_delay["difference"] == pytest.approx(0.30)
    assert no_delay["standard_error"] == pytest.approx(np.hypot(0.02, 0.02))
    assert fsn["difference"] == 0.0
    assert small["difference"] == pytest.approx(0.78) and small["standard_error"] is None
    # The middle difference is 0.30 of 0.08, 0.30 and 0.78.
    assert result["edge"] == pytest.approx(2.02 + final_losses.FAR_OFF * 0.30)
    assert [run["seed"] for run in result["runs"]["pre_no_delay"]] == [0, 1]
    text = (tmp_path / "out.txt").read_text(encoding="utf-8")
    assert capsys.readouterr().out.startswith(text)
    assert "2.3200 ± 0.0283  +0.3000 ± 0.0283 (s.e.)" in text
    # Without a reference it is the first arm.
    assert found(records, tmp_path)["reference"] == "pre_no_delay"


def test_rungs_are_drawn_against_their_size(tmp_path):
    sizes = (10**3, 10**4, 10**5)
    rungs = [
        write_record(tmp_path, f"{kind}_{size}", parameters=size, curve=(9 / size**0.1,))
        for size in sizes
        for kind in ("fsn", "projected", "transformer")
    ]
    result = found(rungs, tmp_path)
    assert not result["variants"]
    assert {row["kind"] for row in result["arms"]} == {"fsn", "projected", "transformer"}
    # One rung of two sizes alike is a variant, however many rungs there are.
    extra = write_record(tmp_path, "fsn_again", parameters=10**4, curve=(2.0,))
    assert found([*rungs, extra], tmp_path)["variants"]


def test_losses_are_of_the_whole_split_where_all_were_read_on_it(tmp_path):
    one = write_record(tmp_path, "fsn", curve=(2.0,), whole=2.5)
    other = write_record(tmp_path, "transformer", curve=(2.1,), whole=2.7)
    result = found([one, other], tmp_path)
    assert [row["bpc"] for row in result["arms"]] == [2.5, 2.7]
    assert {row["evaluated"] for row in result["arms"]} == {"whole"}
    third = write_record(tmp_path, "base", curve=(2.2,))
    result = found([one, other, third], tmp_path)
    assert [row["bpc"] for row in result["arms"]] == [2.0, 2.1, 2.2]


def test_arms_of_different_data_make_no_table(tmp_path):
    same = [write_record(tmp_path, name) for name in ("fsn", "transformer")]
    other = write_record(tmp_path, "fsn_of_code", sha256="c0de")
    with pytest.raises(UserError, match="fsn and fsn_of_code saw different data"):
        final_losses.result([*same, other])


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ("", ["--reference=nobody"], "--reference must be one of pre_no_delay, .*got 'nobody'"),
        ("summary.json", [], "pre_fsn.* is not finished"),
        ("config.json", [], "pre_fsn"),
    ],
)
def test_mistakes_are_one_line(tmp_path, change, options, message):
    folders = variants(tmp_path)
    if change:
        (folders[2] / change).unlink()
    with pytest.raises(UserError, match=message):
        found(folders, tmp_path, *options)
