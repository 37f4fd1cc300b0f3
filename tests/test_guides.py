"""README and the guides: every command line is understood."""

import re
import shlex
from pathlib import Path

import pytest

from train import __main__ as front
from train import evaluate, inspect, ladder, main
from train.analysis import compare
from train.data import prepare

ROOT = Path(__file__).resolve().parent.parent
GUIDES = (
    "README.md",
    "docs/cloud_tpu.md",
    "docs/commands.md",
    "docs/data.md",
    "docs/extend.md",
    "docs/gpu.md",
    "docs/reliability.md",
    "docs/results.md",
)
COMMAND = re.compile(r"python -m train ([^\n;&#\"|>]*)")


def commands():
    """The arguments of every `python -m train` in a shell block of the guides."""
    for page in GUIDES:
        for block in re.findall(
            r"```sh\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL
        ):
            for arguments in COMMAND.findall(block.replace("\\\n", " ")):
                yield pytest.param(arguments, id=f"{Path(page).stem}:{arguments.strip()[:60]}")


class UnderstoodError(Exception):
    """Raised in place of the first thing that a program does after it has read its arguments."""


@pytest.mark.parametrize("arguments", [*commands()])
def test_a_command_of_the_guides_is_understood(arguments, monkeypatch):
    def stop(*_, **__):
        raise UnderstoodError

    for module in (main, evaluate):
        monkeypatch.setattr(module, "start_jax", stop)
    monkeypatch.setattr(inspect, "open_experiment_corpus", stop)
    monkeypatch.setattr(ladder, "run_all", stop)
    monkeypatch.setattr(compare, "read_arms", stop)
    monkeypatch.setattr(prepare, "open_corpus", stop)
    monkeypatch.chdir(ROOT)
    given = shlex.split(arguments.replace("--process_id=I", "--process_id=1"))
    with pytest.raises(UnderstoodError):
        front.program(["it", *given])


def test_there_are_commands_in_each_guide():
    found = [param.id.partition(":")[0] for param in commands()]
    assert {*found} == {Path(page).stem for page in GUIDES}


def test_the_page_of_commands_lists_every_program():
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    listed, _ = page.split("## Other programs")
    assert {*re.findall(r"^\| `([a-z_]+)[ `]", listed, re.MULTILINE)} == {*front.PROGRAMS}
