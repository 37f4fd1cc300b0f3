"""A run's copy in a bucket: what it holds, resuming from it, refusing what does not fit."""

import concurrent.futures
import functools
import shutil
import threading
from pathlib import Path
from unittest import mock

import fsspec
import jax
import numpy as np
import pytest
from etils import epath
from etils.epath import backend
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from small_runs import (
    assert_equal_trees,
    rows_of,
    run_to_the_end,
    text_of,
    tiny_experiment,
    write_corpus,
)

from train import bucket, evaluate, final_evaluation, integrity, loop, mirror, preemption
from train.data.prepare import open_corpus
from train.errors import TryAgain, UserError
from train.metrics import read_rows
from train.mirror import Mirror
from train.run import create_or_resume, open_run


class FolderAsBucket(DirFileSystem):
    """gs://NAME/... kept in a folder: everything goes through etils and fsspec as it would."""

    def __init__(self, folder):
        super().__init__(str(folder), LocalFileSystem(auto_mkdir=True))
        self.folder = folder
        self.log: list[tuple[str, str]] = []  # mode and path of what is opened
        self.away_for: list[str] = []  # files with one of these in their path cannot be had

    def _join(self, path):
        return super()._join(str(path).removeprefix("gs://"))

    def open(self, path, mode="rb", **kwargs):
        if any(part in str(path) for part in self.away_for):
            raise OSError("503")
        self.log.append((mode, str(path)))
        return super().open(path, mode, **kwargs)


@pytest.fixture
def storage(tmp_path, monkeypatch):
    """A storage behind gs://."""
    files = FolderAsBucket(tmp_path / "storage")
    systems = {"gcs": files, "file": LocalFileSystem()}
    monkeypatch.setattr(
        type(backend.fsspec_backend), "_get_filesystem", lambda _, name: systems[name]
    )
    return files


@pytest.fixture(params=["gs://bucket/runs", "a folder"])
def place(request, tmp_path, storage):
    """Where copies go as a setting, and the folder in which they then are."""
    if request.param == "a folder":
        return str(tmp_path / "share"), tmp_path / "share"
    return request.param, storage.folder / "bucket" / "runs"


def tree(folder: Path) -> dict[str, bytes]:
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and file.name != "lock"
    }


def test_the_copy_is_the_run(corpus, tmp_path, place):
    setting, there = place
    experiment = tiny_experiment(corpus.folder, tmp_path / "one", mirror_dir=setting)
    run_to_the_end(experiment, corpus)
    here = tree(tmp_path / "one")
    assert tree(there / "one") == here
    assert {Path(name).parts[1] for name in here if name.startswith("checkpoints")} == {"20", "30"}


def test_another_machine_goes_on_from_the_copy_to_the_same_bits(corpus, whole, tmp_path, place):
    setting, there = place
    experiment = tiny_experiment(corpus.folder, tmp_path / "one", mirror_dir=setting)

    def stop_at_once(self, first, last):
        return last == 15

    stopped = mock.patch.object(preemption.Preemption, "reached", stop_at_once)
    with stopped, pytest.raises(TryAgain):
        run_to_the_end(experiment, corpus)
    shutil.rmtree(tmp_path / "one")  # the machine is gone

    outcome = run_to_the_end(experiment, corpus)
    assert outcome.resumed_from == 15
    assert_equal_trees(jax.device_get(outcome.state), whole[1])
    for kind in ("train", "validation"):
        assert rows_of(tmp_path / "one", kind) == rows_of(whole[0], kind)
    assert tree(there / "one") == tree(tmp_path / "one")


def test_a_copy_that_was_cut_short_is_gone_on_from(corpus, whole, tmp_path, storage, capsys):
    experiment = tiny_experiment(corpus.folder, tmp_path / "one", mirror_dir="gs://bucket/runs")
    run_to_the_end(experiment, corpus)
    shutil.rmtree(tmp_path / "one")
    newest = storage.folder / "bucket" / "runs" / "one" / "checkpoints" / "30"
    next(file for file in newest.rglob("d/*") if file.is_file()).unlink()

    outcome = run_to_the_end(experiment, corpus)
    assert outcome.resumed_from == 20
    assert "30 is damaged" in capsys.readouterr().err
    assert_equal_trees(jax.device_get(outcome.state), whole[1])
    assert tree(newest) == tree(tmp_path / "one" / "checkpoints" / "30")


def test_a_run_that_ended_before_its_first_checkpoint_begins_anew(corpus, whole, tmp_path, storage):
    experiment = tiny_experiment(corpus.folder, tmp_path / "one", mirror_dir="gs://bucket/runs")
    failing = mock.patch.object(loop.Checkpoints, "save", side_effect=RuntimeError("struck"))
    with failing, pytest.raises(RuntimeError, match="struck"):
        run_to_the_end(experiment, corpus)
    assert rows_of(tmp_path / "one", "train")
    shutil.rmtree(tmp_path / "one")
    outcome = run_to_the_end(experiment, corpus)
    assert_equal_trees(jax.device_get(outcome.state), whole[1])


@pytest.mark.parametrize("copy_is_whole", [True, False])
def test_a_damaged_checkpoint_is_replaced_by_its_copy(
    corpus, tmp_path, storage, capsys, copy_is_whole
):
    experiment = tiny_experiment(corpus.folder, tmp_path / "one", mirror_dir="gs://bucket/runs")
    run_to_the_end(experiment, corpus)
    before = tree(tmp_path / "one")
    copy = storage.folder / "bucket" / "runs" / "one"
    for folder in (tmp_path / "one", copy)[: 1 if copy_is_whole else 2]:
        (folder / "checkpoints" / "30" / "state" / "manifest.ocdbt").unlink()
    assert run_to_the_end(experiment, corpus).resumed_from == (30 if copy_is_whole else 20)
    assert ("is replaced by its copy gs://" in capsys.readouterr().err) == copy_is_whole
    assert not (tmp_path / "one" / "fetched_checkpoints").exists()
    if copy_is_whole:
        assert tree(tmp_path / "one") == tree(copy) == before


def test_a_checkpoint_made_again_takes_the_place_of_its_copy(corpus, tmp_path, storage):
    """Files of equal length need not be equal: those that list hashes and random names."""
    experiment = tiny_experiment(corpus.folder, tmp_path / "one", mirror_dir="gs://bucket/runs")
    run_to_the_end(experiment, corpus)
    there = storage.folder / "bucket" / "runs" / "one" / "checkpoints" / "30"
    for name in ("hashes.json", integrity.STEP_METADATA):
        file = there / name
        file.write_bytes(file.read_bytes().replace(b"1", b"2"))
    assert integrity.damage(there) is not None
    run_to_the_end(experiment, corpus)
    assert integrity.damage(there) is None
    assert tree(there) == tree(tmp_path / "one" / "checkpoints" / "30")


def test_a_copy_that_is_not_whole_is_never_taken_for_one(corpus, tmp_path, storage):
    """Wherever the copying of a checkpoint ends."""
    experiment = tiny_experiment(corpus.folder, tmp_path / "one", mirror_dir="gs://bucket/runs")
    run_to_the_end(experiment, corpus)
    here = tmp_path / "one" / "checkpoints" / "30"
    for number, missing in enumerate(sorted(tree(here))):
        there = tmp_path / str(number)
        storage.away_for[:] = [missing]
        with pytest.raises(OSError, match="503"):
            bucket.copy_folder(
                epath.Path("gs://bucket/runs/one/checkpoints/30"),
                epath.Path(there),
                marker=integrity.STEP_METADATA,
            )
        assert integrity.damage(there) is not None


def test_a_fetch_that_was_cut_short_is_made_again(corpus, tmp_path, storage):
    experiment = tiny_experiment(corpus.folder, tmp_path / "one", mirror_dir="gs://bucket/runs")
    run_to_the_end(experiment, corpus)
    before = tree(tmp_path / "one")
    shutil.rmtree(tmp_path / "one")
    storage.away_for.append("checkpoints/30/state")
    with pytest.raises(UserError, match=r"mirror_dir=gs://.*503"):
        create_or_resume(experiment, corpus)
    storage.away_for.clear()
    assert tree(tmp_path / "one").keys() < before.keys()
    assert run_to_the_end(experiment, corpus).resumed_from == 30
    assert tree(tmp_path / "one") == before


def test_files_are_copied_once(corpus, tmp_path, storage):
    experiment = tiny_experiment(corpus.folder, tmp_path / "one", mirror_dir="gs://bucket/runs")
    run_to_the_end(experiment, corpus)
    written = [path for mode, path in storage.log if "w" in mode]
    in_checkpoints = [path for path in written if "/checkpoints/" in path]
    assert len(in_checkpoints) == len(set(in_checkpoints)) > 0
    storage.log.clear()
    run_to_the_end(experiment, corpus)  # finished before
    assert not [path for mode, path in storage.log if "w" in mode and "/checkpoints/" in path]


def test_training_goes_on_while_the_storage_is_away(corpus, tmp_path, storage, capsys):
    experiment = tiny_experiment(corpus.folder, tmp_path / "one", mirror_dir="gs://bucket/runs")
    storage.away_for.append("/checkpoints/")
    with pytest.raises(UserError, match=r"config.mirror_dir=gs://bucket/runs/one .*503"):
        run_to_the_end(experiment, corpus)
    storage.away_for.clear()
    assert "warning: the copy of the run is behind" in capsys.readouterr().err
    assert open_run(tmp_path / "one").checkpoints.joinpath("30").is_dir()
    assert run_to_the_end(experiment, corpus).resumed_from == 30
    assert tree(storage.folder / "bucket" / "runs" / "one") == tree(tmp_path / "one")


def test_a_failure_of_the_run_is_reported_before_one_of_its_copy(corpus, tmp_path, storage, capsys):
    experiment = tiny_experiment(corpus.folder, tmp_path / "one", mirror_dir="gs://bucket/runs")
    failing = mock.patch.object(loop, "Metrics", side_effect=UserError("no room"))
    storage.away_for.append("provenance.json")
    with failing, pytest.raises(UserError, match="no room"):
        run_to_the_end(experiment, corpus)
    assert "503" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_refused_before_any_step(corpus, tmp_path):
    (tmp_path / "file").touch()
    experiment = tiny_experiment(
        corpus.folder, tmp_path / "one", mirror_dir=str(tmp_path / "file" / "runs")
    )
    with pytest.raises(UserError, match=r"mirror_dir=.*Not a directory"):
        create_or_resume(experiment, corpus)


class SlowCopy:
    """Copies files, and waits within each until it is told to go on."""

    def __init__(self):
        self.names, self.copy = [], bucket.copy_file
        self.entered, self.go_on = threading.Event(), threading.Event()

    def __call__(self, source, target):
        self.names.append(source.name)
        self.entered.set()
        assert self.go_on.wait(10)
        self.copy(source, target)


def test_copies_do_not_overtake_each_other(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "metrics.jsonl").write_text("1", encoding="utf-8")
    (tmp_path / "one" / "config.json").write_text("{}", encoding="utf-8")
    made = Mirror(tmp_path / "one", str(tmp_path / "share"))
    slowly = SlowCopy()
    with mock.patch.object(mirror, "copy_file", slowly):
        made.push_behind()
        assert slowly.entered.wait(10)
        made.push_behind()  # left out: one is under way
        threading.Timer(0.1, slowly.go_on.set).start()
        made.push()  # waits for it
    assert slowly.names == ["metrics.jsonl", "config.json"]
    assert (tmp_path / "share" / "one" / "metrics.jsonl").read_text(encoding="utf-8") == "1"


@pytest.mark.parametrize("under_way", [True, False])
def test_a_storage_that_blocks_does_not_keep_a_run_that_must_end(
    tmp_path, monkeypatch, capsys, under_way
):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "config.json").write_text("{}", encoding="utf-8")
    made = Mirror(tmp_path / "one", str(tmp_path / "share"))
    slowly = SlowCopy()
    monkeypatch.setattr(mirror, "copy_file", slowly)
    monkeypatch.setattr(mirror, "WAITING_SECONDS", 0.2)
    if under_way:
        made.push_behind()
        assert slowly.entered.wait(10)
    made.push(or_warn=True)
    said = "cannot be read or written (an update is not done after 0 s)"
    assert capsys.readouterr().err == (
        f"warning: the copy of the run is behind: config.mirror_dir={made.place} {said}; check "
        f"its name, the network and the rights of this machine\n"
    )
    with pytest.raises(UserError, match="an update is not done after"):
        made.push()
    assert slowly.names == ["config.json"]  # no second update beside the first
    slowly.go_on.set()
    made.push()
    assert (tmp_path / "share" / "one" / "config.json").is_file()


def test_no_checkpoint_of_a_copy_is_newer_than_its_logs(tmp_path):
    """Of a run that saves, and removes what is old, while its logs are copied."""
    here, there = tmp_path / "one", tmp_path / "share" / "one"

    def save(step):
        with (here / "metrics.jsonl").open("a", encoding="utf-8") as log:
            log.write(f"{step}\n")
        (here / "checkpoints" / str(step)).mkdir(parents=True)
        (here / "checkpoints" / str(step) / integrity.STEP_METADATA).write_text(
            str(step), encoding="utf-8"
        )

    here.mkdir()
    (here / "config.json").write_text("{}", encoding="utf-8")
    save(10)
    made = Mirror(here, str(tmp_path / "share"))
    made.push()
    copied = bucket.copy_file

    def train_on(source, target):
        copied(source, target)
        if source.name == "metrics.jsonl":
            save(20)
            shutil.rmtree(here / "checkpoints" / "10")

    with (here / "metrics.jsonl").open("a", encoding="utf-8") as log:
        log.write("15\n")
    with mock.patch.object(mirror, "copy_file", train_on):
        made.push()
    assert (there / "metrics.jsonl").read_text(encoding="utf-8") == "10\n15\n"
    assert [folder.name for folder in (there / "checkpoints").iterdir()] == ["10"]
    made.push()
    assert (there / "metrics.jsonl").read_text(encoding="utf-8") == "10\n15\n20\n"
    assert [folder.name for folder in (there / "checkpoints").iterdir()] == ["20"]


def test_a_copy_of_another_run_and_one_ahead_are_refused(corpus, tmp_path, storage):
    def start(**changes):
        return create_or_resume(tiny_experiment(corpus.folder, tmp_path / "one", **changes), corpus)

    mirrored = {"mirror_dir": "gs://bucket/runs"}
    run_to_the_end(tiny_experiment(corpus.folder, tmp_path / "one", **mirrored), corpus)
    (tmp_path / "one").rename(tmp_path / "first")
    said = "is the copy of a run with other settings: seed 0 -> 1; give"
    with pytest.raises(UserError, match=said):
        start(seed=1, **mirrored)
    assert not tree(tmp_path / "one")
    shutil.rmtree(tmp_path / "one")

    shutil.copytree(tmp_path / "first", tmp_path / "one")
    shutil.rmtree(tmp_path / "one" / "checkpoints" / "30")
    with pytest.raises(UserError, match=r"at step 30, ahead of .*one at 20; remove"):
        start(**mirrored)

    starts = tmp_path / "one" / "provenance.json"
    starts.write_text(
        starts.read_text(encoding="utf-8").replace('"time": "2', '"time": "3', 1), encoding="utf-8"
    )
    with pytest.raises(UserError, match="a copy of another run"):
        start(**mirrored)
    starts.write_text("[{}]", encoding="utf-8")
    with pytest.raises(UserError, match=r"provenance\.json cannot be read \('time'\); restore"):
        start(**mirrored)


def test_checkpoints_of_something_else_are_not_touched(corpus, tmp_path, storage):
    """A folder with checkpoints and no config.json is no copy, and no place for one."""
    foreign = storage.folder / "bucket" / "runs" / "one" / "checkpoints" / "1000" / "state"
    foreign.mkdir(parents=True)
    (foreign / "weights").write_bytes(b"mine")
    experiment = tiny_experiment(corpus.folder, tmp_path / "one", mirror_dir="gs://bucket/runs")
    with pytest.raises(UserError, match="runs/one holds checkpoints that are not a copy of .*one"):
        run_to_the_end(experiment, corpus)
    assert (foreign / "weights").read_bytes() == b"mine"


def test_the_copy_of_a_run_that_trains_on_has_no_summary(tmp_path):
    """A run with a summary has ended."""
    folder, there = tmp_path / "one", tmp_path / "copies" / "one"
    folder.mkdir()
    for name in ("config.json", "summary.json"):
        (folder / name).write_text("{}", encoding="utf-8")
    copy = Mirror(folder, str(tmp_path / "copies"))
    copy.push()
    assert (there / "summary.json").is_file()
    (folder / "summary.json").unlink()
    copy.push()
    assert not (there / "summary.json").exists()


def test_a_run_begun_anew_in_its_bucket_replaces_the_one_that_was_fetched(
    finished_arms, tmp_path, storage
):
    there = storage.folder / "bucket" / "fsn"
    shutil.copytree(finished_arms["fsn"], there)
    here = mirror.fetched_run("gs://bucket/fsn", tmp_path)
    starts = there / "provenance.json"
    starts.write_text(
        starts.read_text(encoding="utf-8").replace('"time": "2', '"time": "3', 1), encoding="utf-8"
    )
    for gone in ("summary.json", "sample.txt"):
        (there / gone).unlink()
    shutil.rmtree(there / "checkpoints" / "30")
    assert mirror.fetched_run("gs://bucket/fsn", tmp_path) == here
    assert tree(here) == tree(there)


@pytest.mark.parametrize("inside", ["one", "one/copies"])
def test_a_run_is_not_copied_into_itself(tmp_path, inside):
    parent = tmp_path / inside if inside != "one" else tmp_path
    with pytest.raises(UserError, match="into itself"):
        Mirror(tmp_path / "one", str(parent))


def test_a_run_is_not_copied_into_a_folder_around_it(tmp_path):
    folder = tmp_path / "one" / "runs" / "one"
    folder.mkdir(parents=True)
    with pytest.raises(UserError, match="into a folder around it; name another place"):
        Mirror(folder, str(tmp_path))


def test_without_the_package_of_a_storage_the_line_names_it(tmp_path):
    with mock.patch.object(fsspec, "filesystem", side_effect=ImportError("Install gcsfs")):
        backend.fsspec_backend._get_filesystem.cache_clear()
        with pytest.raises(UserError, match=r"Install gcsfs.*: pip install gcsfs"):
            Mirror(tmp_path / "one", "gs://bucket/runs").fetch()


def test_a_corpus_in_a_bucket_is_copied_into_the_cache_once(corpus, tmp_path, storage):
    kept = storage.folder / "bucket" / "data" / "text"
    shutil.copytree(corpus.folder, kept)
    (kept / "dataset").mkdir(exist_ok=True)
    (kept / "dataset" / "all_texts_again").write_bytes(b"x")
    options = {
        "name": "text",
        "path": "gs://bucket/data/text",
        "cache_dir": str(tmp_path / "cache"),
    }
    found = open_corpus(**options)
    assert found.sha256 == corpus.sha256
    assert tmp_path / "cache" in found.folder.parents
    assert not (found.folder / "dataset").exists()
    storage.log.clear()
    assert open_corpus(**options).folder == found.folder
    assert [Path(path).name for _, path in storage.log] == ["manifest.json"]

    with pytest.raises(UserError, match=r"data.path=gs://bucket/nothing holds no manifest.json"):
        open_corpus(name="text", path="gs://bucket/nothing", cache_dir=str(tmp_path / "cache"))


def test_a_corpus_that_changes_in_its_bucket_leaves_open_files_alone(corpus, tmp_path, storage):
    there = storage.folder / "bucket" / "text"
    shutil.copytree(corpus.folder, there)
    options = {"name": "text", "path": "gs://bucket/text", "cache_dir": str(tmp_path / "cache")}
    tokens = open_corpus(**options).split("train")
    before = tokens.copy()
    shutil.rmtree(there)
    write_corpus(there, train=text_of(4000, 9))
    assert open_corpus(**options).sha256 != corpus.sha256
    np.testing.assert_array_equal(tokens, before)


def test_two_processes_do_not_copy_into_the_cache_at_once(corpus, tmp_path, storage, monkeypatch):
    """Two threads: their locks are of files that each has opened."""
    shutil.copytree(corpus.folder, storage.folder / "bucket" / "text")
    slowly = SlowCopy()
    monkeypatch.setattr(bucket, "copy_file", slowly)
    arguments = ("gs://bucket/text", tmp_path / "cache")
    fetch = functools.partial(bucket.fetched, *arguments, setting="x", marker="manifest.json")
    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(fetch)
        assert slowly.entered.wait(10)
        second = pool.submit(fetch)
        threading.Timer(0.2, slowly.go_on.set).start()
        assert first.result() == second.result()
    assert sorted(slowly.names) == sorted(file.name for file in corpus.folder.iterdir())


def test_a_log_that_is_being_read_is_not_written_over(finished_arms, tmp_path, storage):
    there = storage.folder / "bucket" / "fsn"
    shutil.copytree(finished_arms["fsn"], there)
    here = mirror.fetched_run("gs://bucket/fsn", tmp_path)
    before = (here / "metrics.jsonl").read_text(encoding="utf-8")
    with (here / "metrics.jsonl").open(encoding="utf-8") as log:
        (there / "metrics.jsonl").write_text("", encoding="utf-8")
        assert mirror.fetched_run("gs://bucket/fsn", tmp_path) == here
        assert log.read() == before
    assert (here / "metrics.jsonl").read_text(encoding="utf-8") == ""


def test_a_run_in_a_bucket_is_read(finished_arms, tmp_path, storage, monkeypatch):
    monkeypatch.setenv("FSN_JAX_CACHE", str(tmp_path / "cache"))
    folder = finished_arms["fsn"]
    shutil.copytree(folder, storage.folder / "bucket" / "fsn")
    run = open_run("gs://bucket/fsn")
    assert read_rows(run.metrics) == read_rows(folder / "metrics.jsonl")
    assert tmp_path / "cache" in run.path.parents


def test_an_evaluation_of_a_run_in_a_bucket_is_added_to_the_run_there(
    finished_arms, tmp_path, storage, monkeypatch, capsys
):
    monkeypatch.setenv("FSN_JAX_CACHE", str(tmp_path / "cache"))
    there = storage.folder / "bucket" / "fsn"
    shutil.copytree(finished_arms["fsn"], there)
    bpcs = iter([2.5, 2.25, 2.0])

    def evaluated(trained, tokens, *, stride):
        bpc = next(bpcs)
        return evaluate.Evaluation(trained.step, bpc, bpc, len(tokens) - 1, 16, stride, 0.1)

    monkeypatch.setattr(evaluate, "evaluate", evaluated)
    for stride in (4, 8):
        evaluate.program(["evaluate", "gs://bucket/fsn", f"--stride={stride}"])
    assert [row["bpc"] for row in read_rows(there / "evaluations.jsonl")] == [2.5, 2.25]

    # Of a bucket that can be read alone, the result is printed.
    monkeypatch.setattr(mirror, "copy_file", mock.Mock(side_effect=PermissionError("read only")))
    monkeypatch.setattr(mirror, "_copy_run", lambda source, target, copy_log: None)
    with pytest.raises(UserError, match="the run=gs://bucket/fsn cannot be .*read only"):
        evaluate.program(["evaluate", "gs://bucket/fsn"])
    assert "validation 2.0000 BPC" in capsys.readouterr().out


def test_results_of_several_machines_are_all_kept(corpus, tmp_path, storage, monkeypatch, capsys):
    """Of a run and of its copy: neither a restart nor an evaluation replaces rows of the other."""
    monkeypatch.setenv("FSN_JAX_CACHE", str(tmp_path / "cache"))
    experiment = tiny_experiment(corpus.folder, tmp_path / "one", mirror_dir="gs://bucket/runs")
    run_to_the_end(experiment, corpus)

    def evaluated(trained, tokens, *, stride):
        return evaluate.Evaluation(trained.step, 2.0, 2.0, len(tokens) - 1, 16, stride, 0.1)

    monkeypatch.setattr(evaluate, "evaluate", evaluated)
    here, there = (
        folder / "one" / "evaluations.jsonl"
        for folder in (tmp_path, storage.folder / "bucket" / "runs")
    )
    for run, stride in ((str(tmp_path / "one"), 4), ("gs://bucket/runs/one", 8)):
        evaluate.program(["evaluate", run, f"--stride={stride}"])
    assert [row["stride"] for row in read_rows(here)] == [4]
    assert [row["stride"] for row in read_rows(there)] == [4, 8]
    Mirror(tmp_path / "one", "gs://bucket/runs").push()  # as a restart does
    assert [row["stride"] for row in read_rows(here)] == [4, 8]
    assert there.read_bytes() == here.read_bytes()

    storage.away_for = ["evaluations"]
    evaluate.program(["evaluate", str(tmp_path / "one"), "--stride=2"])
    assert "warning: evaluations.jsonl and that of the run's copy may differ" in (
        capsys.readouterr().err
    )
    assert [row["stride"] for row in read_rows(here)] == [4, 8, 2]

    storage.away_for = []
    starts = there.with_name("provenance.json")  # now the copy is of another run
    starts.write_text(
        starts.read_text(encoding="utf-8").replace('"time": "2', '"time": "3', 1), encoding="utf-8"
    )
    before = there.read_bytes()
    evaluate.program(["evaluate", str(tmp_path / "one"), "--stride=1"])
    assert there.read_bytes() == before


def test_the_test_split_that_was_read_is_known_to_run_and_copy(
    corpus, tmp_path, storage, monkeypatch
):
    experiment = tiny_experiment(corpus.folder, tmp_path / "one", mirror_dir="gs://bucket/runs")
    run_to_the_end(experiment, corpus)
    (tmp_path / "one" / "summary.json").write_text("{}", encoding="utf-8")
    final_evaluation.program(["test", str(tmp_path / "one")])
    here, there = tmp_path / "one", storage.folder / "bucket" / "runs" / "one"
    read = (here / "test_reads.jsonl").read_bytes()
    assert (there / "test_reads.jsonl").read_bytes() == read
    # And what the copy knows is known here: it is not read again.
    (here / "test_reads.jsonl").unlink()
    monkeypatch.setattr(final_evaluation, "evaluate", None)
    final_evaluation.program(["test", str(here)])
    assert (here / "test_reads.jsonl").read_bytes() == read


def test_the_copy_itself_has_no_copy(corpus, tmp_path, capsys):
    share = tmp_path / "share"
    experiment = tiny_experiment(corpus.folder, tmp_path / "one", mirror_dir=str(share))
    run_to_the_end(experiment, corpus)
    (share / "one" / "evaluations.jsonl").touch()
    mirror.send_back(share / "one" / "evaluations.jsonl", str(share / "one"), str(share))
    assert capsys.readouterr().err == ""


def test_a_damaged_log_of_a_copy_stops_nothing(tmp_path, capsys):
    folder, there = tmp_path / "one", tmp_path / "copies" / "one"
    for place in (folder, there):
        place.mkdir(parents=True)
        (place / "config.json").write_text("{}", encoding="utf-8")
    (there / "evaluations.jsonl").write_text("no row\n{}\n", encoding="utf-8")
    (folder / "metrics.jsonl").write_text("{}\n", encoding="utf-8")
    Mirror(folder, str(tmp_path / "copies")).push()
    assert "evaluations.jsonl cannot be read (line 1" in capsys.readouterr().err
    assert (there / "metrics.jsonl").is_file()


def test_checkpoints_that_a_run_has_removed_leave_the_cache(finished_arms, tmp_path, storage):
    there = storage.folder / "bucket" / "fsn"
    shutil.copytree(finished_arms["fsn"], there)
    here = mirror.fetched_run("gs://bucket/fsn", tmp_path)
    (here / "checkpoints" / "30").rename(here / "checkpoints" / "10")  # of an earlier fetch
    shutil.rmtree(there / "checkpoints" / "20")
    mirror.fetched_run("gs://bucket/fsn", tmp_path)
    # All but the newest, which another program may be about to read.
    assert sorted(folder.name for folder in (here / "checkpoints").iterdir()) == ["20", "30"]
