"""What the programs say to wrong inputs: one line, status 2, nothing compiled, nothing lost.

The table below is also a page: `pytest tests/test_bad_inputs.py --update-pages` writes
docs/bad_inputs.md, and without the option the page is compared with the table.
"""

import contextlib
import dataclasses
import fcntl
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from runs import run_to_the_end, text_of, write_corpus

from train import evaluate, final_test, loop, main, prepare, sample
from train.corpus import read_corpus
from train.program import run_program

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "bad_inputs.md"

CONFIG = '''"""A config file as a user would write it."""

from fsn_jax import FSNConfig, TransformerConfig
from train.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    OptimizerConfig,
    TrainingConfig,
    experiment,
)

SMALL = {"vocab_size": 12, "num_layers": 1, "num_heads": 2}


def get_config(arm="fsn"):
    models = {
        "fsn": FSNConfig(**SMALL, num_phases=8, score="static", feedforward="none"),
        "transformer": TransformerConfig(**SMALL, width=8, feedforward_width=8),
    }
    config = experiment(
        "small",
        model=models[arm],
        data=DataConfig(name="text", path="corpus", context=16),
        optimizer=OptimizerConfig(warmup_steps=3),
        training=TrainingConfig(batch_size=16, num_steps=10, log_every=10),
        evaluation=EvaluationConfig(every=10, batch_size=8),
        checkpoints=CheckpointConfig(every=10),
    )
    config.run_dir = "run"
    return config
'''

# Scenes: what is wrong in the folder that the command runs in. It holds the config file above as
# small.py, a prepared corpus, the finished run of that config, and the project's configs/.


def write(name: str, content: bytes | str) -> Callable[[Path], None]:
    def scene(work: Path) -> None:
        content_bytes = content.encode() if isinstance(content, str) else content
        (work / name).write_bytes(content_bytes)

    return scene


def cut(name: str) -> Callable[[Path], None]:
    """Leaves the first half of a file."""

    def scene(work: Path) -> None:
        content = (work / name).read_bytes()
        (work / name).write_bytes(content[: len(content) // 2])

    return scene


def in_use(work: Path) -> Any:
    lock = (work / "run" / "lock").open("w")
    lock.write("process 4242 on elsewhere")
    lock.flush()
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def other_corpus(work: Path) -> None:
    shutil.rmtree(work / "corpus")
    write_corpus(work / "corpus", train=text_of(4000, 9))


def checkpoints_of_another_model(work: Path) -> None:
    shutil.copytree(work / "run" / "checkpoints", work / "other" / "checkpoints")


def no_checkpoint(work: Path) -> None:
    shutil.rmtree(work / "run" / "checkpoints")


def damaged_checkpoint(work: Path) -> None:
    for file in (work / "run" / "checkpoints").rglob("*"):
        if file.is_file() and file.stat().st_size > 500 and "metadata" not in file.name.lower():
            file.write_bytes(file.read_bytes()[:100])


def empty_folder(work: Path) -> None:
    (work / "empty").mkdir()


@dataclasses.dataclass(frozen=True)
class Case:
    """A command and the line it must print.

    Attributes:
      about: what is wrong, in words.
      command: after `python -m`.
      message: after `error: `.
      scene: makes the folder wrong, if the command alone is not; what it returns is closed later.
    """

    about: str
    command: str
    message: str
    scene: Callable[[Path], Any] | None = None


TRAIN = "train --config=small.py"
FRESH = f"{TRAIN} --config.run_dir=fresh"

CASES = [
    Case("no config", "train", ""),
    Case("a config file that is not there", "train --config=nowhere.py", ""),
    Case("a config file with a syntax error", "train --config=broken.py", "", write("broken.py", "x = = 1\n")),
    Case("a config file that fails", "train --config=broken.py", "", write("broken.py", "def get_config():\n    return undefined\n")),
    Case("a config file without get_config", "train --config=broken.py", "", write("broken.py", "x = 1\n")),
    Case("a config function that returns nothing", "train --config=broken.py", "", write("broken.py", "def get_config():\n    pass\n")),
    Case("an unknown arm of a config", "train --config=configs/enwik8.py:huge", ""),
    Case("an arm where there are none", "train --config=configs/quickstart.py:huge", ""),
    Case("a misspelled setting", f"{FRESH} --config.model.num_layer=2", ""),
    Case("a misspelled flag", "train --confg=small.py", ""),
    Case("a flag that is no setting", f"{FRESH} --steps=100", ""),
    Case("an argument that is no flag", f"{FRESH} resume", ""),
    Case("a setting without a value", f"{FRESH} --config.seed", ""),
    Case("a word for a number", f"{FRESH} --config.model.num_layers=two", ""),
    Case("a fraction for a whole number", f"{FRESH} --config.model.num_layers=1.5", ""),
    Case("a word for a switch", f"{FRESH} --config.model.delay=maybe", ""),
    Case("heads that do not divide the phases", f"{FRESH} --config.model.num_heads=3", ""),
    Case("a transformer's width that its heads do not divide", "train --config=small.py:transformer --config.run_dir=fresh --config.model.num_heads=3", ""),
    Case("no layers", f"{FRESH} --config.model.num_layers=0", ""),
    Case("no harmonics", f"{FRESH} --config.model.num_harmonics=0", ""),
    Case("an unknown score", f"{FRESH} --config.model.score=dot", ""),
    Case("an unknown architecture", f"{FRESH} --config.model.architecture=rnn", ""),
    Case("another vocabulary than the corpus has", f"{FRESH} --config.model.vocab_size=11", ""),
    Case("a negative learning rate", f"{FRESH} --config.optimizer.peak_learning_rate=-1e-3", ""),
    Case("a learning rate that is no number", f"{FRESH} --config.optimizer.peak_learning_rate=nan", ""),
    Case("a decay of moments beyond one", f"{FRESH} --config.optimizer.beta2=1.5", ""),
    Case("a batch that does not divide into the devices", f"{FRESH} --config.training.batch_size=12", ""),
    Case("a batch of evaluation that does not", f"{FRESH} --config.evaluation.batch_size=12", ""),
    Case("parts that do not divide the batch", f"{FRESH} --config.training.accumulation_steps=3", ""),
    Case("an empty batch", f"{FRESH} --config.training.batch_size=0", ""),
    Case("rows of metrics between dispatches", f"{FRESH} --config.training.log_every=15", ""),
    Case("checkpoints between dispatches", f"{FRESH} --config.checkpoints.every=15", ""),
    Case("a context longer than the corpus", f"{FRESH} --config.data.context=3000", ""),
    Case("an evaluation shorter than a context", f"{FRESH} --config.evaluation.num_bytes=10", ""),
    Case("a stride longer than the context", f"{FRESH} --config.evaluation.stride=17", ""),
    Case("a negative seed", f"{FRESH} --config.seed=-1", ""),
    Case("a name that is a path", f"{FRESH} --config.name=a/b", ""),
    Case("an unknown placement", f"{FRESH} --config.data.placement=disk", ""),
    Case("an unknown corpus", f"{FRESH} --config.data.name=enwik9", ""),
    Case("codeparrot without its shards", f"{FRESH} --config.data.name=codeparrot --config.data.path=", ""),
    Case("a text that is not there", f"{FRESH} --config.data.path=nowhere.txt", ""),
    Case("an empty text", f"{FRESH} --config.data.path=empty.txt", "", write("empty.txt", b"")),
    Case("a text that is too short", f"{FRESH} --config.data.path=short.txt", "", write("short.txt", b"To be, or not to be.\n")),
    Case("a folder without a text", f"{FRESH} --config.data.path=empty", "", empty_folder),
    Case("another file in place of enwik8", f"{FRESH} --config.data.name=enwik8 --config.data.path=small.py", ""),
    Case("a prepared corpus cut short", TRAIN, "", cut("corpus/train.bin")),
    Case("a prepared corpus altered", TRAIN, "", write("corpus/train.bin", text_of(4000, 5))),
    Case("a manifest cut short", TRAIN, "", cut("corpus/manifest.json")),
    Case("a run folder that cannot be written", f"{TRAIN} --config.run_dir=small.py/run", ""),
    Case("a file in place of the run folder", f"{TRAIN} --config.run_dir=small.py", ""),
    Case("a run folder in use", TRAIN, "", in_use),
    Case("a run folder with other settings", f"{TRAIN} --config.training.num_steps=20", ""),
    Case("a corpus that has changed since the run began", TRAIN, "", other_corpus),
    Case("a run's config cut short", TRAIN, "", cut("run/config.json")),
    Case("a checkpoint of another architecture", "train --config=small.py:transformer --config.run_dir=other", "", checkpoints_of_another_model),
    Case("evaluating what is no run", "train.evaluate corpus", ""),
    Case("evaluating without naming a run", "train.evaluate", ""),
    Case("evaluating a run without a checkpoint", "train.evaluate run", "", no_checkpoint),
    Case("a checkpoint that was not kept", "train.evaluate run --checkpoint=7", ""),
    Case("a damaged checkpoint", "train.evaluate run", "", damaged_checkpoint),
    Case("a stride of evaluation below zero", "train.evaluate run --stride=-1", ""),
    Case("a stride of evaluation beyond the context", "train.evaluate run --stride=17", ""),
    Case("a misspelled option", "train.evaluate run --strid=x", ""),
    Case("the final test of what is no run", "train.final_test corpus", ""),
    Case("the final test on another corpus", "train.final_test run", "", other_corpus),
    Case("an empty prompt", "train.sample run --prompt=", ""),
    Case("a byte that the corpus does not have", "train.sample run --prompt=abcz", ""),
    Case("a negative temperature", "train.sample run --temperature=-1", ""),
    Case("drawing from no probability", "train.sample run --top_p=0", ""),
    Case("drawing from a negative number of tokens", "train.sample run --top_k=-1", ""),
    Case("a sample of no length", "train.sample run --num_tokens=0", ""),
    Case("a sample's length in words", "train.sample run --num_tokens=many", ""),
    Case("a seed that is too large", "train.sample run --seed=99999999999999999999", ""),
    Case("preparing an unknown corpus", "train.prepare --name=enwik9", ""),
    Case("preparing a text that is not there", "train.prepare --name=text --path=nowhere.txt", ""),
    Case("a misspelled option of prepare", "train.prepare --nmae=text", ""),
]

PROGRAMS = {
    "train": main.program,
    "train.evaluate": evaluate.program,
    "train.final_test": final_test.program,
    "train.prepare": prepare.program,
    "train.sample": sample.program,
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """The folder that the scenes start from."""
    work = tmp_path_factory.mktemp("prepared") / "work"
    write_corpus(work / "corpus")
    (work / "small.py").write_text(CONFIG)
    (work / "configs").symlink_to(ROOT / "configs")
    with contextlib.chdir(work):
        experiment = main.parse_config(["train", "--config=small.py"])
        run_to_the_end(experiment, read_corpus(Path("corpus")))
    return work


@pytest.fixture
def work(prepared, tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "work"
    shutil.copytree(prepared, folder, symlinks=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("FSN_JAX_CACHE", str(folder / "cache"))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    return folder


@pytest.fixture
def no_compilation(monkeypatch) -> Iterator[None]:
    """Fails if anything was compiled, or a train step or a state was about to be made."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a wrong input has come as far as the train step")

    monkeypatch.setattr(loop, "init_state", refuse)
    compiled = []

    def listen(event: str, duration: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield
    jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled


def contents(folder: Path) -> dict[Path, bytes]:
    """Every file but the lock, which tells who looked last."""
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != "lock")
    return {file: file.read_bytes() for file in files}
