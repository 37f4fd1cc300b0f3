"""What the programs say to wrong inputs: one line, status 2, nothing compiled, nothing lost.

The table below is also a page: `pytest tests/test_bad_inputs.py --update-pages` writes
docs/errors.md, and without the option the page is compared with the table.
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
from small_runs import run_to_the_end, text_of, write_corpus

from train import __main__ as front
from train import loop
from train.data.corpus import read_corpus
from train.flags import parse_config
from train.program import run_program

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "errors.md"

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
        "fsn": FSNConfig(**SMALL, num_phases=8, score="gated", feedforward="none"),
        "transformer": TransformerConfig(**SMALL, width=8, feedforward_width=8),
    }
    if arm not in models:
        raise ValueError(f"the arm must be one of {', '.join(models)}; got {arm!r}")
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
    lock = (work / "run" / "lock").open("w", encoding="utf-8")
    lock.write("process 4242 on elsewhere")
    lock.flush()
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def other_corpus(work: Path) -> None:
    shutil.rmtree(work / "corpus")
    write_corpus(work / "corpus", train=text_of(4000, 9))


def later_corpus(work: Path) -> None:
    write_corpus(work / "later", train=text_of(4000, 9))


def checkpoints_of_another_model(work: Path) -> None:
    shutil.copytree(work / "run" / "checkpoints", work / "other" / "checkpoints")


def no_checkpoint(work: Path) -> None:
    shutil.rmtree(work / "run" / "checkpoints")


def damaged_checkpoint(work: Path) -> None:
    (work / "run" / "checkpoints" / "10" / "state" / "manifest.ocdbt").unlink()


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
    Case(
        "no config",
        "train",
        "--config=FILE is needed, for instance --config=configs/quickstart.py",
    ),
    Case(
        "a config file that is not there",
        "train --config=nowhere.py",
        "--config=nowhere.py: there is no file nowhere.py; see configs/ for some",
    ),
    Case(
        "a config file with a syntax error",
        "train --config=broken.py",
        "--config=broken.py: SyntaxError: invalid syntax (broken.py, line 1)",
        write("broken.py", "x = = 1\n"),
    ),
    Case(
        "a config file that fails",
        "train --config=broken.py",
        "--config=broken.py: NameError: name 'undefined' is not defined",
        write("broken.py", "def get_config():\n    return undefined\n"),
    ),
    Case(
        "a config file that ends the program",
        "train --config=broken.py",
        "--config=broken.py: SystemExit: 3",
        write("broken.py", "raise SystemExit(3)\n"),
    ),
    Case(
        "a config file without get_config",
        "train --config=broken.py",
        "--config=broken.py: the file has no function get_config()",
        write("broken.py", "x = 1\n"),
    ),
    Case(
        "a config function that returns nothing",
        "train --config=broken.py",
        "--config=broken.py: get_config() must return what train.config.experiment(...) "
        "gives; got NoneType",
        write("broken.py", "def get_config():\n    pass\n"),
    ),
    Case(
        "a setting that is neither switch, number nor text",
        "train --config=broken.py",
        "--config=broken.py: config.run_dir is None; a setting is a switch, a number or a text",
        write(
            "broken.py",
            "from configs import quickstart\n\ndef get_config():\n"
            "    config = quickstart.get_config().unlock()\n"
            "    config.run_dir = None\n    return config\n",
        ),
    ),
    Case(
        "an unknown arm of a config",
        "train --config=small.py:huge",
        "--config=small.py:huge: the arm must be one of fsn, transformer; got 'huge'",
    ),
    Case(
        "an unknown arm of the quickstart",
        "train --config=configs/quickstart.py:huge",
        "--config=configs/quickstart.py:huge: the arm after the colon must be one of fsn, "
        "projected, transformer; got 'huge'",
    ),
    Case(
        "a misspelled setting",
        f"{FRESH} --config.model.num_layer=2",
        "there is no setting --config.model.num_layer; did you mean --config.model.num_layers?",
    ),
    Case(
        "a misspelled flag",
        "train --confg=small.py",
        "--config=FILE is needed, for instance --config=configs/quickstart.py",
    ),
    Case(
        "a misspelled group of settings",
        f"{FRESH} --config.modle.num_layers=2",
        "there is no setting --config.modle.num_layers; did you mean --config.model.num_layers?",
    ),
    Case(
        "a setting like no other",
        f"{FRESH} --config.model.temperature=0.1",
        "there is no setting --config.model.temperature; settings look like --config.seed=1",
    ),
    Case(
        "a flag that is no setting",
        f"{FRESH} --steps=100",
        "there is no setting --steps; settings look like --config.seed=1",
    ),
    Case(
        "an argument that is no flag",
        f"{FRESH} resume",
        "unexpected argument 'resume'; settings look like --config.seed=1",
    ),
    Case(
        "a setting without a value",
        f"{FRESH} --config.seed",
        "Missing value for flag --config.seed; settings look like --config.seed=1",
    ),
    Case(
        "a word for a number",
        f"{FRESH} --config.model.num_layers=two",
        "--config.model.num_layers takes a whole number; got 'two'",
    ),
    Case(
        "a fraction for a whole number",
        f"{FRESH} --config.model.num_layers=1.5",
        "--config.model.num_layers takes a whole number; got '1.5'",
    ),
    Case(
        "a word for a switch",
        f"{FRESH} --config.model.delay=maybe",
        "--config.model.delay takes True or False; got 'maybe'",
    ),
    Case(
        "heads that do not divide the phases",
        f"{FRESH} --config.model.num_heads=3",
        "config.model.num_heads must divide the number of phases (8); got 3",
    ),
    Case(
        "a transformer's width that its heads do not divide",
        "train --config=small.py:transformer --config.run_dir=fresh --config.model.num_heads=3",
        "config.model.width must be a multiple of 2 * num_heads (rotary pairs); got "
        "width 8 and 3 heads",
    ),
    Case(
        "no layers",
        f"{FRESH} --config.model.num_layers=0",
        "config.model.num_layers must be at least 1; got 0",
    ),
    Case(
        "no harmonics",
        f"{FRESH} --config.model.num_harmonics=0",
        "config.model.num_harmonics must be at least 1; got 0",
    ),
    Case(
        "an unknown score",
        f"{FRESH} --config.model.score=dot",
        "config.model.score must be one of 'gated', 'content_gated', 'projected', 'none'; "
        "got 'dot'",
    ),
    Case(
        "an unknown architecture",
        f"{FRESH} --config.model.architecture=rnn",
        "config.model.architecture must be one of fsn, transformer; got 'rnn'",
    ),
    Case(
        "the settings of another architecture",
        f"{FRESH} --config.model.architecture=transformer",
        "config.model.delay is no setting of the architecture transformer: an arm has one "
        "architecture; choose another arm with --config=FILE:ARM",
    ),
    Case(
        "another vocabulary than the corpus has",
        f"{FRESH} --config.model.vocab_size=11",
        "config.model.vocab_size is 11, but the corpus 'text' has 12 byte values; set "
        "it to 0 to take the corpus's",
    ),
    Case(
        "a negative learning rate",
        f"{FRESH} --config.optimizer.peak_learning_rate=-1e-3",
        "config.optimizer.peak_learning_rate must be above 0; got -0.001",
    ),
    Case(
        "a learning rate that is no number",
        f"{FRESH} --config.optimizer.peak_learning_rate=nan",
        "config.optimizer.peak_learning_rate must be a finite number; got nan",
    ),
    Case(
        "a decay of moments beyond one",
        f"{FRESH} --config.optimizer.beta2=1.5",
        "config.optimizer.beta2 must be from 0 to below 1; got 1.5",
    ),
    Case(
        "a momentum of Muon beyond one",
        f"{FRESH} --config.optimizer.muon_beta=1.5",
        "config.optimizer.muon_beta must be from 0 to below 1; got 1.5",
    ),
    Case(
        "an optimizer that is not there",
        f"{FRESH} --config.optimizer.matrices=sgd",
        "config.optimizer.matrices must be one of 'adam', 'muon'; got 'sgd'",
    ),
    Case(
        "a field of values that have none",
        f"{FRESH} --config.model.values=linear --config.model.field_features",
        "config.model.field_features must be False for values='linear', which have no field",
    ),
    Case(
        "fewer than no parts",
        f"{FRESH} --config.training.accumulation_steps=-1",
        "config.training.accumulation_steps must be at least 0; got -1",
    ),
    Case(
        "a batch that does not divide into the devices",
        f"{FRESH} --config.training.batch_size=12",
        "config.training.batch_size must be a multiple of 8 devices times "
        "config.training.accumulation_steps (1); got 12",
    ),
    Case(
        "a batch of evaluation that does not",
        f"{FRESH} --config.evaluation.batch_size=12",
        "config.evaluation.batch_size must be a multiple of the 8 devices; got 12",
    ),
    Case(
        "parts that do not divide the batch",
        f"{FRESH} --config.training.accumulation_steps=3",
        "config.training.batch_size must be a multiple of accumulation_steps (3); got 16",
    ),
    Case(
        "an empty batch",
        f"{FRESH} --config.training.batch_size=0",
        "config.training.batch_size must be at least 1; got 0",
    ),
    Case(
        "rows of metrics between dispatches",
        f"{FRESH} --config.training.log_every=15",
        "config.training.log_every must be a multiple of steps_per_dispatch (10); got 15",
    ),
    Case(
        "checkpoints between dispatches",
        f"{FRESH} --config.checkpoints.every=15",
        "config.checkpoints.every must be a multiple of "
        "config.training.steps_per_dispatch (10); got 15",
    ),
    Case(
        "a context longer than the corpus",
        f"{FRESH} --config.data.context=3000",
        "config.data.context=3000 needs a training split of at least 6000 tokens, and "
        "this one has 4000: lower the context or give more text",
    ),
    Case(
        "an evaluation shorter than a context",
        f"{FRESH} --config.evaluation.num_tokens=10",
        "config.data.context=16 needs at least 17 tokens to evaluate on, and there are "
        "10: lower the context, or give more text or a larger "
        "config.evaluation.num_tokens",
    ),
    Case(
        "a stride longer than the context",
        f"{FRESH} --config.evaluation.stride=17",
        "config.evaluation.stride must be at most config.data.context (16); got 17",
    ),
    Case(
        "copy events in windows that are too long for them",
        f"{FRESH} --config.data.context=40000 --config.evaluation.copy_depth=4",
        "config.evaluation.copy_depth must be 0 for config.data.context above 32767; got 4 and "
        "40000",
    ),
    Case(
        "a negative seed",
        f"{FRESH} --config.seed=-1",
        "config.seed must be from 0 to 2**31 - 1; got -1",
    ),
    Case(
        "a name that is a path",
        f"{FRESH} --config.name=a/b",
        "config.name must be a plain folder name of letters, digits and _ . + = -; got 'a/b'",
    ),
    Case(
        "an unknown placement",
        f"{FRESH} --config.data.placement=disk",
        "config.data.placement must be one of 'resident', 'host'; got 'disk'",
    ),
    Case(
        "an unknown corpus",
        f"{FRESH} --config.data.name=enwik9",
        "config.data.name must be one of 'enwik8', 'pycode', 'codeparrot', 'text'; got 'enwik9'",
    ),
    Case(
        "codeparrot without its shards",
        f"{FRESH} --config.data.name=codeparrot --config.data.path=",
        "config.data.name=codeparrot needs a file or folder of yours: give it with "
        "--config.data.path=FILE_OR_FOLDER",
    ),
    Case(
        "characters of a corpus of bytes",
        f"{FRESH} --config.data.name=enwik8 --config.data.vocabulary=characters",
        "config.data.vocabulary=characters is for config.data.name=text; got enwik8",
    ),
    Case(
        "characters of a corpus that was prepared as bytes",
        f"{FRESH} --config.data.vocabulary=characters",
        "config.data.path=corpus was prepared as bytes, not characters: say "
        "config.data.vocabulary=bytes, or name the text itself",
    ),
    Case(
        "characters of a text that is no UTF-8",
        f"{FRESH} --config.data.path=latin.txt --config.data.vocabulary=characters",
        "latin.txt is not UTF-8 at byte 3, as config.data.vocabulary=characters needs it: convert "
        "it, or say config.data.vocabulary=bytes",
        write("latin.txt", "Ilyén".encode("latin-1")),
    ),
    Case(
        "documents of a corpus that is one text",
        f"{FRESH} --config.data.name=pycode --config.data.segments=documents",
        "config.data.segments=documents is for config.data.name=text; got pycode",
    ),
    Case(
        "documents of a text that has none",
        f"{FRESH} --config.data.segments=documents",
        "config.data.segments=documents needs several documents, and config.data.path=corpus gives "
        "one: name a folder of files or JSON lines, or say config.data.segments=none",
    ),
    Case(
        "a text that is not there",
        f"{FRESH} --config.data.path=nowhere.txt",
        "config.data.path=nowhere.txt does not exist: name a file, a folder or a pattern",
    ),
    Case(
        "an empty text",
        f"{FRESH} --config.data.path=empty.txt",
        "config.data.path=empty.txt gives 0 bytes of text, which is too little: give at "
        "least 40960, so that each of the splits can hold 2048",
        write("empty.txt", b""),
    ),
    Case(
        "a text that is too short",
        f"{FRESH} --config.data.path=short.txt",
        "config.data.path=short.txt gives 21 bytes of text, which is too little: give "
        "at least 40960, so that each of the splits can hold 2048",
        write("short.txt", b"To be, or not to be.\n"),
    ),
    Case(
        "a folder without a text",
        f"{FRESH} --config.data.path=empty",
        "config.data.path=empty is a folder with no file in it",
        empty_folder,
    ),
    Case(
        "another file in place of enwik8",
        f"{FRESH} --config.data.name=enwik8 --config.data.path=corpus/train.bin",
        "no source gave enwik8 (corpus/train.bin: holds 4000 bytes, expected 100000000); get "
        "enwik8 or enwik8.zip yourself and name it: --config.data.path=FILE (of train) "
        "or --path=FILE (of train prepare); a text of your own has the name text",
    ),
    Case(
        "a prepared corpus cut short",
        TRAIN,
        "the prepared corpus is damaged: corpus/train.bin holds 2000 bytes, not 4000; "
        "delete corpus, then start again or prepare it with `python -m train prepare`",
        cut("corpus/train.bin"),
    ),
    Case(
        "a prepared corpus altered",
        TRAIN,
        "the prepared corpus is damaged: corpus/train.bin has SHA-256 "
        "54d9f0d03eaf5830d4de33adc504a4bf7be6df9c7f1238ecf9906f8594518471; delete "
        "corpus, then start again or prepare it with `python -m train prepare`",
        write("corpus/train.bin", text_of(4000, 5)),
    ),
    Case(
        "an empty manifest",
        TRAIN,
        "the prepared corpus is damaged: corpus/manifest.json cannot be read (Expecting "
        "value: line 1 column 1 (char 0)); delete corpus, then start again or prepare it "
        "with `python -m train prepare`",
        write("corpus/manifest.json", b""),
    ),
    Case(
        "a run folder that cannot be written",
        f"{TRAIN} --config.run_dir=small.py/run",
        "cannot write to the run folder small.py/run (Not a directory); choose another "
        "with --config.run_dir=FOLDER",
    ),
    Case(
        "the home folder of nobody",
        f"{TRAIN} --config.run_dir='~nosuchuser/r'",
        "config.run_dir=~nosuchuser/r: the home folder of ~nosuchuser is not known; write the path "
        "out, or set HOME",
    ),
    Case(
        "a path that is too long",
        f"{FRESH} --config.data.path={'x' * 300}",
        f"config.data.path={'x' * 80}... cannot be reached (File name too long); name another",
    ),
    Case(
        "a file in place of the run folder",
        f"{TRAIN} --config.run_dir=small.py",
        "cannot write to the run folder small.py (File exists); choose another with "
        "--config.run_dir=FOLDER",
    ),
    Case(
        "a bucket in place of a run folder",
        f"{TRAIN} --config.run_dir=gs://bucket/run",
        "config.run_dir=gs://bucket/run is no folder of this machine: keep a copy of the run there "
        "with config.mirror_dir",
    ),
    Case(
        "a bucket in place of the cache",
        f"{TRAIN} --config.data.cache_dir=gs://bucket/cache",
        "config.data.cache_dir=gs://bucket/cache is no folder of this machine: name a corpus there "
        "with config.data.path",
    ),
    Case(
        "a bucket to prepare a corpus in",
        "train prepare --name=text --path=corpus --cache_dir=gs://bucket/cache",
        "config.data.cache_dir=gs://bucket/cache is not on this machine; name a path that is",
    ),
    Case(
        "a copy in a storage that is not known",
        f"{TRAIN} --config.mirror_dir=ftp://host/runs",
        "config.mirror_dir=ftp://host/runs: gs:// and s3:// can be reached, ftp:// cannot",
    ),
    Case(
        "a bucket with one slash",
        f"{TRAIN} --config.mirror_dir=gs:/bucket/runs",
        "gs:/bucket/runs is no path in a bucket: write gs://BUCKET/...",
    ),
    Case(
        "a run copied into itself",
        f"{TRAIN} --config.mirror_dir=run/copies",
        "config.mirror_dir=run/copies would copy the run folder run into itself; name another "
        "place",
    ),
    Case(
        "the final test of a run in a bucket",
        "train test gs://bucket/run",
        "the test split is read once and each use recorded in the run's folder; copy "
        "gs://bucket/run to this machine, and the folder back afterwards",
    ),
    Case(
        "a run folder in use",
        TRAIN,
        "the run folder run is in use by process 4242 on elsewhere; wait for it, or "
        "choose another with --config.run_dir=FOLDER; if that machine is gone, remove run/lock",
        in_use,
    ),
    Case(
        "a run folder with other settings",
        f"{TRAIN} --config.training.num_steps=20",
        "the run folder run holds a run with other settings: training.num_steps 10 -> "
        "20; give this one its own folder with --config.run_dir=FOLDER",
    ),
    Case(
        "parameters to begin with that are no exported model",
        f"{TRAIN} --config.run_dir=fresh --config.init_from=corpus",
        "config.init_from=corpus holds no exported model: name one of pretrained/, or the folder "
        "that `python -m train export RUN FOLDER` wrote",
    ),
    Case(
        "a corpus that has changed since the run began",
        TRAIN,
        "the corpus 'text' has changed since the run in run started (sha256 "
        "c7071c378052 then, 9e4f57a72767 now); restore it, or name the prepared corpus of that "
        "time with --config.data.path (--data_path after training), or train in another "
        "--config.run_dir",
        other_corpus,
    ),
    Case(
        "another corpus, where that of the run is still prepared",
        f"{TRAIN} --config.data.path=later",
        "the corpus 'text' has changed since the run in run started (sha256 "
        "c7071c378052 then, 9e4f57a72767 now); restore it, or name the prepared corpus of that "
        "time (corpus) with --config.data.path (--data_path after training), or train in another "
        "--config.run_dir",
        later_corpus,
    ),
    Case(
        "a run's config emptied",
        TRAIN,
        "run/config.json cannot be read (Expecting value: line 1 column 1 (char 0)); "
        "restore it or train in another folder",
        write("run/config.json", b""),
    ),
    Case(
        "a run's config that is no object",
        TRAIN,
        "run/config.json cannot be read (no JSON object); restore it or train in another folder",
        write("run/config.json", b"[]"),
    ),
    Case(
        "a run's provenance without its contents",
        TRAIN,
        "run/provenance.json cannot be read ('step'); restore it or train in another folder",
        write("run/provenance.json", b"[{}]"),
    ),
    Case(
        "a checkpoint of another architecture",
        "train --config=small.py:transformer --config.run_dir=other",
        "the checkpoint other/checkpoints/10 is of another model: "
        "block_0/attention/kernel_imag is (2, 2, 2, 8) there and absent in the config (19 "
        "arrays differ); use the run's own config, or another folder with "
        "--config.run_dir=FOLDER",
        checkpoints_of_another_model,
    ),
    Case(
        "a checkpoint of another optimizer",
        f"{TRAIN} --config.run_dir=other --config.optimizer.matrices=muon",
        "the checkpoint other/checkpoints/10 is of another optimizer: 1/count is () there and "
        "absent in the config (36 arrays differ); use the run's own config and the version of "
        "Optax in its provenance.json, or another folder with --config.run_dir=FOLDER",
        checkpoints_of_another_model,
    ),
    Case(
        "a run whose only checkpoint is damaged",
        TRAIN,
        "no checkpoint of the run is intact: run/checkpoints/10 is damaged (state/manifest.ocdbt "
        "is missing); restore one from a copy, or remove run to start again from the beginning",
        damaged_checkpoint,
    ),
    Case(
        "a run whose checkpoints are gone",
        TRAIN,
        "the run run has come to step 10 but run/checkpoints holds no checkpoint: restore it from "
        "a copy, or remove run to start again from the beginning",
        no_checkpoint,
    ),
    Case(
        "one of the flags of many processes",
        f"{FRESH} --num_processes=2",
        "--coordinator=HOST:PORT, --num_processes=N and --process_id=I belong together; on Cloud "
        "TPU and under SLURM leave out all three and give --distributed",
    ),
    Case(
        "a process beyond their number",
        f"{FRESH} --coordinator=host:1234 --num_processes=2 --process_id=2",
        "--process_id must be from 0 to --num_processes - 1 (1); got 2",
    ),
    Case(
        "a port that no machine has",
        f"{FRESH} --coordinator=host:99999 --num_processes=2 --process_id=1",
        "--coordinator takes HOST:PORT, the port from 1 to 65535; got 'host:99999'",
    ),
    Case(
        "a trace of steps beyond the last",
        f"{FRESH} --profile=5:50",
        "--profile takes FIRST:LAST, two steps such as 20:40, the last at most "
        "config.training.num_steps (10); got '5:50'",
    ),
    Case(
        "a trace of steps that are not two",
        f"{FRESH} --profile=all",
        "--profile takes FIRST:LAST, two steps such as 20:40, the last at most "
        "config.training.num_steps (10); got 'all'",
    ),
    Case(
        "inspecting without a config",
        "train inspect --json",
        "--config=FILE is needed, for instance --config=configs/quickstart.py",
    ),
    Case(
        "evaluating what is no run",
        "train evaluate corpus",
        "corpus is not a run folder (no config.json); train one first",
    ),
    Case(
        "evaluating without naming a run",
        "train evaluate",
        "the following arguments are required: run; see python -m train evaluate --help",
    ),
    Case(
        "evaluating a run without a checkpoint",
        "train evaluate run",
        "the run run has no checkpoint: train it as far as its first one, or, if this is a record "
        "under results/, name the run's own folder",
        no_checkpoint,
    ),
    Case(
        "a checkpoint that was not kept",
        "train evaluate run --checkpoint=7",
        "--checkpoint must be best, latest or a step among 10; got '7'",
    ),
    Case(
        "a checkpoint whose digits are no number",
        "train evaluate run --checkpoint=²",
        "--checkpoint must be best, latest or a step among 10; got '²'",
    ),
    Case(
        "evaluating an exported model",
        "train evaluate run",
        "run is an exported model, and this takes the run that it was exported from; train sample "
        "takes either",
        write("run/model.safetensors", b""),
    ),
    Case(
        "evaluating a run whose data was moved",
        "train evaluate run",
        "config.data.path=corpus does not exist: name a file, a folder or a pattern; if the data "
        "of run has moved, say --data_path",
        lambda work: shutil.move(work / "corpus", work / "other") and None,
    ),
    Case(
        "a stride of evaluation below zero",
        "train evaluate run --stride=-1",
        "--stride must be from 1 to the run's context (16), or 0 for the run's own; got -1",
    ),
    Case(
        "a stride of evaluation beyond the context",
        "train evaluate run --stride=17",
        "--stride must be from 1 to the run's context (16), or 0 for the run's own; got 17",
    ),
    Case(
        "a misspelled option",
        "train evaluate run --strid=x",
        "argument --stride: invalid int value: 'x'; see python -m train evaluate --help",
    ),
    Case(
        "the final test of what is no run",
        "train test corpus",
        "corpus is not a run folder (no config.json); train one first",
    ),
    Case(
        "the final test on another corpus",
        "train test run",
        "the corpus 'text' has changed since the run in run started (sha256 "
        "c7071c378052 then, 9e4f57a72767 now); restore it, or name the prepared corpus of that "
        "time with --config.data.path (--data_path after training), or train in another "
        "--config.run_dir",
        other_corpus,
    ),
    Case(
        "a document of a model that knows none",
        "train sample run --document",
        "--document is for a model trained with config.data.segments=documents, and run was not; "
        "leave it out",
    ),
    Case(
        "an empty prompt",
        "train sample run --prompt=",
        "--prompt must not be empty: the first character needs one before it",
    ),
    Case(
        "a byte that the corpus does not have",
        "train sample run --prompt=abcz",
        "--prompt: the text holds byte 0x7a at position 3, which does not occur in "
        "text, so the model has no token for it: remove it",
    ),
    Case(
        "an empty text to stop at",
        "train sample run --stop=",
        "--stop must not be empty: name the text that ends the sample",
    ),
    Case(
        "a text to stop at that the corpus cannot write",
        "train sample run --prompt=abc --stop=a --stop=z",
        "--stop: the text holds byte 0x7a at position 0, which does not occur in "
        "text, so the model has no token for it: remove it",
    ),
    Case(
        "a negative temperature",
        "train sample run --temperature=-1",
        "--temperature must be finite and not negative; got -1.0",
    ),
    Case(
        "drawing from no probability",
        "train sample run --top_p=0",
        "--top_p must be above 0 and at most 1; got 0.0",
    ),
    Case(
        "drawing from a negative number of tokens",
        "train sample run --top_k=-1",
        "--top_k must be from 0 to 2**31 - 1; got -1",
    ),
    Case(
        "a sample of no length",
        "train sample run --num_tokens=0",
        "--num_tokens must be at least 1; got 0",
    ),
    Case(
        "a sample's length in words",
        "train sample run --num_tokens=many",
        "argument --num_tokens: invalid int value: 'many'; see python -m train sample --help",
    ),
    Case(
        "a seed that is too large",
        "train sample run --seed=99999999999999999999",
        "--seed must be from 0 to 2**31 - 1; got 99999999999999999999",
    ),
    Case(
        "exporting to a folder that is there",
        "train export run corpus",
        "corpus is there already; remove it or name another folder",
    ),
    Case(
        "exporting to a bucket",
        "train export run gs://bucket/model",
        "the folder=gs://bucket/model is not on this machine; name a path that is",
    ),
    Case(
        "recording in a bucket",
        "train record run --results=gs://bucket/results",
        "--results=gs://bucket/results is not on this machine; name a path that is",
    ),
    Case(
        "a result in a bucket",
        "train final_losses run --output=gs://bucket/losses.json",
        "--output=gs://bucket/losses.json is not on this machine; name a path that is",
    ),
    Case(
        "a figure where no file can be made",
        "train figures run --output=/proc/curve.png",
        "--output=/proc/curve.png cannot be written (No such file or directory); name another",
    ),
    Case(
        "a result that is no JSON",
        "train final_losses run --output=losses.csv",
        "--output=losses.csv must be a file whose name ends in .json",
    ),
    Case(
        "a folder in place of a report",
        "train report run --output=page.html",
        "--output=page.html must be a file whose name ends in .html",
        lambda work: (work / "page.html").mkdir(),
    ),
    Case(
        "preparing characters of a corpus of bytes",
        "train prepare --name=enwik8 --vocabulary=characters",
        "--vocabulary=characters is for --name=text; got --name=enwik8",
    ),
    Case(
        "preparing an unknown corpus",
        "train prepare --name=enwik9",
        "config.data.name=enwik9 is not known: choose one of enwik8, pycode, codeparrot, text",
    ),
    Case(
        "preparing a text that is not there",
        "train prepare --name=text --path=nowhere.txt",
        "config.data.path=nowhere.txt does not exist: name a file, a folder or a pattern",
    ),
    Case(
        "a misspelled option of prepare",
        "train prepare --nmae=text",
        "unrecognized arguments: --nmae=text; see python -m train prepare --help",
    ),
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """The folder that the scenes start from."""
    work = tmp_path_factory.mktemp("prepared") / "work"
    write_corpus(work / "corpus")
    (work / "small.py").write_text(CONFIG, encoding="utf-8")
    (work / "configs").symlink_to(ROOT / "configs")
    with contextlib.chdir(work):
        experiment = parse_config(["train", "--config=small.py"])
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


def run_here(command: str) -> int:
    return run_program(front.program, shlex.split(command))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.about.replace(" ", "_"))
def test_a_wrong_input_is_one_line_and_costs_nothing(case, work, capfd, no_compilation):
    with contextlib.ExitStack() as stack:
        if case.scene and (held := case.scene(work)):
            stack.enter_context(held)
        before = contents(work)
        assert run_here(case.command) == 2
    printed = capfd.readouterr()
    assert printed.err.replace(f"{work}/", "") == f"error: {case.message}\n"
    after = contents(work)
    assert {file: after.get(file) for file in before} == before
    if "run_dir=fresh" in case.command:
        assert not (work / "fresh").exists()


# These leave a process in a state that others should not go on in, or show how one ends.
PROCESSES = [
    Case(
        "a damaged checkpoint",
        "train evaluate run",
        "the checkpoint run/checkpoints/10 is damaged (state/manifest.ocdbt is missing); name "
        "another with --checkpoint=STEP, or resume training, from the newest intact one",
        damaged_checkpoint,
    ),
    *(
        case
        for case in CASES
        if case.about in ("a misspelled setting", "a byte that the corpus does not have")
    ),
]


@pytest.mark.parametrize("case", PROCESSES, ids=lambda case: case.about.replace(" ", "_"))
def test_a_process_ends_with_status_2_and_one_line(case, work):
    if case.scene:
        case.scene(work)
    done = subprocess.run(
        [sys.executable, "-m", *shlex.split(case.command)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.replace(f"{work}/", "") == f"error: {case.message}\n"


def test_the_inputs_are_many_and_each_appears_once():
    assert len(CASES) >= 70
    assert len({case.about for case in CASES}) == len(CASES)


# The page

HEADING = """# Errors: wrong inputs and what the programs say

Each of these ends with status 2 and the one line shown, on stderr, after `error: `. None of them
compiles anything, starts a run, or changes a file of an earlier one. `small.py` is a config of a
tiny model, `corpus` a prepared corpus of 4,500 bytes, `run` the folder of its finished run; there
are eight devices. The table is made from the tests
(`pytest tests/test_bad_inputs.py --update-pages`), which run every line of it.

| what is wrong | `python -m` | `error: ` |
|---|---|---|
"""


def page() -> str:
    def cell(text: str) -> str:
        return text.replace("x" * 300, "xxx...").replace("|", "\\|")

    damaged, *_ = PROCESSES
    rows = (
        f"| {cell(case.about)} | `{cell(case.command)}` | {cell(case.message)} |\n"
        for case in [*CASES, damaged]
    )
    return HEADING + "".join(rows)


def test_the_page_is_the_table(pytestconfig):
    if pytestconfig.getoption("--update-pages"):
        PAGE.write_text(page(), encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == page(), (
        "write it with: pytest tests/test_bad_inputs.py --update-pages"
    )
