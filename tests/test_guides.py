"""The TPU and GPU guides: every command line is understood."""

import re
import shlex
from pathlib import Path

import pytest

from train import evaluate, inspect, main, prepare

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
        ".evaluate": (evaluate, evaluate, "start_jax"),
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
