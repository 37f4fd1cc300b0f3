"""Runs are grouped into arms by name, and an arm's runs differ in their seed alone."""

import json

import pytest
from small_runs import write_evaluation, write_record

from train.analysis.records import (
    mean_and_deviation,
    read_arms,
    read_run,
    recorded_arms,
    reference_arm,
)
from train.errors import UserError


def write_run(folder, name, *, seed=0, bpc=(3.0, 2.0), sha256="da7a", **settings):
    folder.mkdir(parents=True)
    model = {"architecture": "fsn", "width": 8, **settings}
    data = {"name": "enwik8", "context": 8}
    config = {"name": name, "seed": seed, "run_dir": "", "model": model, "data": data}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    start = {"command": [], "git": {"commit": None, "modified": None}, "device": "an abacus"}
    start |= {"packages": {}, "data": {"name": "enwik8", "sha256": sha256}}
    (folder / "provenance.json").write_text(json.dumps([start]), encoding="utf-8")
    rows = [
        {"kind": "validation", "step": i + 1, "characters": 10 * (i + 1), "bpc": b}
        for i, b in enumerate(bpc)
    ]
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    return folder


def test_seeds_make_an_arm(tmp_path):
    folders = [
        write_run(tmp_path / "b1", "b_seed1", seed=1, bpc=(3.5,)),
        write_run(tmp_path / "a", "a"),
        write_run(tmp_path / "b0", "b_seed0"),
    ]
    arms = read_arms(folders)
    assert list(arms) == ["b", "a"]
    assert [run.seed for run in arms["b"].runs] == [0, 1]
    # Only where every seed has been evaluated.
    assert arms["b"].curve() == [(10, [3.0, 3.5])]
    assert arms["a"].curve() == [(10, [3.0]), (20, [2.0])]
    assert list(recorded_arms(tmp_path)) == ["a", "b"]


def test_one_name_for_two_settings_is_refused(tmp_path):
    one = write_run(tmp_path / "1", "a")
    other = write_run(tmp_path / "2", "a_seed1", seed=1, width=9)
    with pytest.raises(UserError, match="differ in model.width"):
        read_arms([one, other])


def test_a_setting_that_one_record_does_not_know_is_no_difference(tmp_path):
    one = write_run(tmp_path / "1", "a")
    other = write_run(tmp_path / "2", "a", seed=1, newer=9)
    assert len(read_arms([one, other])["a"].runs) == 2


def test_seeds_that_saw_different_data_are_refused(tmp_path):
    one = write_run(tmp_path / "1", "a")
    other = write_run(tmp_path / "2", "a", seed=1, sha256="0000")
    with pytest.raises(UserError, match="saw different data"):
        read_arms([one, other])


def test_the_end_is_the_last_checkpoint_at_the_runs_own_stride_and_data(tmp_path):
    folder = write_record(tmp_path, "one", whole=2.5)
    write_evaluation(folder, "evaluations.jsonl", 2.4)
    for other in ({"stride": 1}, {"step": 1}, {"context": 4}, {"data_sha256": "0000"}):
        write_evaluation(folder, "evaluations.jsonl", 1.0, **other)
        write_evaluation(folder, "test_reads.jsonl", 1.0, **other)
    run = read_run(folder)
    assert run.whole_validation == 2.4  # read again, the newest
    assert run.test is None


def test_one_seed_twice_is_refused(tmp_path):
    with pytest.raises(UserError, match="one name and one seed"):
        read_arms([write_run(tmp_path / "1", "a"), write_run(tmp_path / "2", "a")])


def test_no_run_and_a_damaged_one(tmp_path):
    with pytest.raises(UserError, match="is not a run folder"):
        read_arms([tmp_path])
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"config.json cannot be read"):
        read_arms([tmp_path])


@pytest.mark.parametrize(
    ("name", "content", "what", "why"),
    [
        ("config.json", "[]", "config", "no name in []"),
        ("config.json", '{"name": "one"}', "config", "no seed in {'name': 'one'}"),
        ("summary.json", '{"parameters": 3}', "summary", "no steps in {'parameters': 3}"),
        ("summary.json", "[{}, {}]", "summary", "no steps in [{}, {}]"),
        ("provenance.json", "[]", "provenance", "no list of starts"),
        ("provenance.json", "{}", "provenance", "no list of starts"),
        ("provenance.json", '[{"command": []}]', "provenance", "no git.commit in"),
        ("metrics.jsonl", '{"kind": "train"}\n', "losses", "no step in"),
        ("metrics.jsonl", b"\xff\n", "losses", "can't decode"),
        ("timing.jsonl", '{"step": 1}\n', "clock", "no seconds in"),
        ("evaluations.jsonl", "3\n", "whole_validation", "no JSON object"),
        ("test_reads.jsonl", '{"step": 2}\n', "test", "no bpc in"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content, what, why):
    folder = write_record(tmp_path, "one")
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as refused:
        getattr(read_run(folder), what)
    assert str(refused.value).startswith(f"{folder / name} cannot be read (")
    assert why in str(refused.value)


def test_the_reference_is_named_or_the_only_transformer(tmp_path):
    arms = read_arms(write_record(tmp_path, name) for name in ("fsn", "transformer", "base"))
    assert reference_arm(arms) == "transformer"
    assert reference_arm(arms, "base") == "base"
    assert reference_arm({"fsn": arms["fsn"]}) == "fsn"
    two = {name: arms[name] for name in ("fsn", "base")}
    with pytest.raises(UserError, match="no transformer among fsn, base: name .*--reference=fsn"):
        reference_arm(two)
    with pytest.raises(UserError, match="--reference must be one of fsn, base; got 'fns'"):
        reference_arm(two, "fns")
    both = {name: arms["transformer"] for name in ("one", "other")}
    with pytest.raises(UserError, match="more than one transformer among one, other"):
        reference_arm(both)


def test_deviation_is_of_the_sample():
    assert mean_and_deviation([1.0, 3.0]) == pytest.approx((2.0, 2**0.5))
    assert mean_and_deviation([1.0]) == (1.0, None)


def test_the_clock_goes_at_the_median_speed(tmp_path):
    """One slow row, and rows of different lengths, as after a stop."""
    folder = write_record(tmp_path, "one", curve=(4.0, 3.0, 2.0, 1.0))
    rows = [{"step": s, "seconds": t} for s, t in ((1, 90.0), (2, 3.0), (4, 4.0))]
    (folder / "timing.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    run = read_run(folder)
    assert [run.clock[seen] for seen in run.losses["validation"]] == [3.0, 6.0, 9.0, 12.0]
    (folder / "timing.jsonl").unlink()
    assert read_run(folder).clock == {}
