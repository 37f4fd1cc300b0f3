"""The TPU and GPU guides: every command line is understood, and a run survives being copied."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import small_runs

from train import inspect, main, prepare
from train.metrics import read_rows

ROOT = Path(__file__).resolve().parent.parent
GUIDES = ("docs/cloud_tpu.md", "docs/gpu.md", "README.md")
COMMAND = re.compile(r"python -m train(\.\w+)? ([^\n;&#\"|]*)")


def commands():
    """The program and the arguments of every `python -m train` in a shell block of the guides."""
    for page in GUIDES:
        for block in re.findall(r"```sh\n(.*?)```", (ROOT / page).read_text(), re.DOTALL):
            for name, rest in COMMAND.findall(block.replace("\\\n", " ")):
                yield pytest.param(name, rest.strip(), id=f"{Path(page).stem}:{rest.strip()[:60]}")


class UnderstoodError(Exception):
    """Raised in place of the first thing that a program does after it has read its arguments."""


@pytest.mark.parametrize(("name", "arguments"), [*commands()])
def test_a_command_of_the_guides_is_understood(name, arguments, monkeypatch):
    def stop(*_, **__):
        raise UnderstoodError

    programs = {
        "": (main, main, "start_jax"),
        ".inspect": (inspect, inspect, "open_experiment_corpus"),
        ".prepare": (prepare, prepare.corpora, "open_corpus"),
    }
    module, patched, first = programs[name]
    monkeypatch.setattr(patched, first, stop)
    monkeypatch.chdir(ROOT)
    given = shlex.split(arguments.replace("--process_id=I", "--process_id=1"))
    with pytest.raises(UnderstoodError):
        module.program(["it", *given])


def test_there_are_commands_in_each_guide():
    found = [param.id.partition(":")[0] for param in commands()]
    assert {*found} == {"cloud_tpu", "gpu", "README"}


@pytest.mark.usefixtures("quick_compiles")
def test_a_run_copied_to_a_bucket_and_back_goes_on_even_from_half_a_checkpoint(tmp_path, capsys):
    """The guide's copying, with a local folder in place of the bucket."""
    corpus = small_runs.write_corpus(tmp_path / "corpus")
    runs, bucket = tmp_path / "runs", tmp_path / "bucket"

    def go_on():
        experiment = small_runs.tiny_experiment(corpus.folder, runs / "one")
        return small_runs.run_to_the_end(experiment, corpus)

    whole = go_on()
    rows = read_rows(runs / "one" / "metrics.jsonl")
    shutil.copytree(runs, bucket)
    shutil.rmtree(runs)  # the machine is gone; the newest checkpoint was still being copied
    newest = bucket / "one" / "checkpoints" / "30"
    next(file for file in newest.rglob("d/*") if file.is_file()).unlink()

    shutil.copytree(bucket, runs)
    again = go_on()
    assert again.resumed_from == 20
    assert "30 is damaged" in capsys.readouterr().err
    small_runs.assert_equal_trees(again.state, whole.state)
    assert read_rows(runs / "one" / "metrics.jsonl") == rows
