"""``python -m train ladder --config=configs/ladder.py``: trains every arm of a config file.

Each arm is a process of its own, ``python -m train --config=FILE:ARM``, on all devices. Finished
arms are skipped, interrupted ones resume from their checkpoints, failed ones are reported while the
others go on. Then ``train final_losses`` tabulates and draws the final losses. The same command
again runs what is left. ``--config.FIELD=VALUE`` is passed to every arm. ``--at_once=2`` trains two
side by side, each on half of the machine's GPUs, or of a CPU's cores.
"""

import functools
import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from train.analysis import final_losses
from train.config import ExperimentConfig
from train.errors import (
    EXIT_INTERRUPTED,
    EXIT_TRY_AGAIN,
    EXIT_USER_ERROR,
    TryAgain,
    UserError,
)
from train.files import check_json_output
from train.flags import config_file, parse_config
from train.interruption import interruptions
from train.program import Arguments
from train.run import default_folder, open_run
from train.run_files import SUMMARY
from train.tables import text_table

CUDA_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
"""Packages without one of which JAX sees no GPU."""


class Job(NamedTuple):
    """One run to train.

    Attributes:
      arguments: arguments of ``python -m train``.
      experiment: the settings that the arguments describe.
    """

    arguments: tuple[str, ...]
    experiment: ExperimentConfig

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.experiment.name


def plan(file: str, arms: Sequence[str], seeds: Sequence[int], changes: Sequence[str]) -> list[Job]:
    """Returns the runs of a config file, all checked before the first one starts.

    Raises:
      UserError: the file has no such arm, a setting is wrong or names the seed, or two runs share
        a folder.
    """
    path, _, arm = file.rpartition(":")
    if path.endswith(".py"):
        raise UserError(f"--config={file} names an arm; write --config={path} --arms={arm}")
    with config_file(file) as names:
        known = names.get("ARMS", ())
    if not known:
        raise UserError(f"--config={file}: the file has no ARMS, a list of what to train")
    for change in changes:
        if change.partition("=")[0] == "--config.seed":
            raise UserError(f"{change} is for one run; write --seeds with the seeds of the ladder")
    for arm in arms:
        if arm not in known:
            raise UserError(f"--arms must be among {', '.join(known)}; got {arm!r}")
    jobs = []
    for arm in arms or known:
        for seed in seeds:
            arguments = [f"--config={file}:{arm}", *changes, f"--config.seed={seed}"]
            experiment = parse_config(["train", *arguments])
            if seed:
                arguments.append(f"--config.name={experiment.name}_seed{seed}")
                experiment = parse_config(["train", *arguments])
            jobs.append(Job(tuple(arguments), experiment))
    by_folder: dict[Path, str] = {}
    for job in jobs:
        folder = default_folder(job.experiment)
        if folder in by_folder:
            raise UserError(
                f"{by_folder[folder]} and {job.name} would both be the run {folder}; name each arm "
                f"and seed once, and leave config.name and config.run_dir to the file"
            )
        by_folder[folder] = job.name
    return jobs


def refuse_different_data(jobs: Sequence[Job]) -> None:
    """Raises UserError if the runs are of several corpora, whose losses make no table."""
    names: dict[tuple[str, ...], str] = {}
    for job in jobs:
        data = job.experiment.data
        names.setdefault((data.name, data.path, data.vocabulary), job.name)
    if len(names) > 1:
        one, other, *_ = names.values()
        raise UserError(
            f"{one} and {other} are of different data, so that their losses make no table; name "
            f"the arms of one corpus with --arms"
        )


def plan_text(jobs: Sequence[Job]) -> str:
    """Formats a table of the runs with sizes and budgets.

    Where the corpus decides the vocabulary, sizes are those at the config's.
    """
    rows: list[Sequence[str]] = [("run", "parameters", "steps", "characters", "training FLOPs")]
    for job in jobs:
        experiment = job.experiment
        if experiment.vocabulary_from_corpus or experiment.match:
            experiment = experiment.with_vocabulary(experiment.model.vocab_size)
        model, data = experiment.model, experiment.data
        steps = experiment.training.num_steps
        characters = steps * experiment.characters_per_step
        flops = characters * model.flops_per_token(data.context)
        counts = (f"{count:,}" for count in (model.num_params(), steps, characters))
        rows.append((job.name, *counts, f"{flops:.2e}"))
    return text_table(rows)


def is_finished(job: Job) -> bool:
    """Whether the run has finished with the same settings."""
    folder = default_folder(job.experiment)
    if not (folder / SUMMARY).is_file():
        return False
    trained, wanted = open_run(folder).read_config(), job.experiment
    if wanted.vocabulary_from_corpus or wanted.match:
        wanted = wanted.with_vocabulary(trained.model.vocab_size)
    return trained.to_dict() == wanted.to_dict()


class Share(NamedTuple):
    """The part of a machine that a run may use.

    Attributes:
      cores: as ``taskset`` takes them; empty for all.
      gpus: as CUDA_VISIBLE_DEVICES takes them; empty for all.
    """

    cores: str = ""
    gpus: str = ""


def train_one(job: Job, share: Share, log: Path | None) -> int:
    """Trains one run in a process of its own and returns its exit status.

    Args:
      job: the run.
      share: what of the machine it may use.
      log: file for its output; None for the terminal.
    """
    command = [sys.executable, "-m", "train", *job.arguments, "--end_with_stdin"]
    if share.cores:
        command = ["taskset", "--cpu-list", share.cores, *command]
    chosen = {"CUDA_VISIBLE_DEVICES": share.gpus} if share.gpus else {}
    run = functools.partial(
        subprocess.run, command, stdin=_lifeline(), env={**os.environ, **chosen}
    )
    if log is None:
        return run().returncode
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        return run(stdout=file, stderr=subprocess.STDOUT).returncode


@functools.cache
def _lifeline() -> int:
    """Returns the read end of a pipe that closes when this process ends, however it does."""
    readable, _ = os.pipe()
    return readable


def shares_of_machine(at_once: int) -> list[Share]:
    """Divides the GPUs, or a CPU's cores, equally among the runs side by side.

    Raises:
      UserError: there are too few of them, or the system cannot bind a process to cores.
    """
    if at_once == 1:
        return [Share()]
    if find_spec("libtpu") and not _on_cpu():
        raise UserError(
            "--at_once must be 1 on a TPU, whose chips the first process holds; "
            "JAX_PLATFORMS=cpu trains on the CPU"
        )
    gpus = visible_gpus()
    if not gpus and shutil.which("taskset") is None:
        raise UserError("--at_once needs Linux's taskset, which keeps each run to its own cores")
    units = gpus or [str(core) for core in sorted(os.sched_getaffinity(0))]
    if not 1 <= at_once <= len(units):
        kind = "GPUs (JAX_PLATFORMS=cpu: cores)" if gpus else "cores"
        raise UserError(f"--at_once must be from 1 to the {len(units)} {kind} here; got {at_once}")
    each = len(units) // at_once
    parts = [",".join(units[i * each : (i + 1) * each]) for i in range(at_once)]
    return [Share(gpus=part) if gpus else Share(cores=part) for part in parts]


def visible_gpus() -> list[str]:
    """Returns the GPUs that a run would see, as CUDA_VISIBLE_DEVICES names them."""
    if _on_cpu() or not any(map(find_spec, CUDA_PLUGINS)):
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:  # CUDA reads it up to the first that there is not
        return list(itertools.takewhile(lambda gpu: gpu not in ("", "-1"), named.split(",")))
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True)
    return found.stdout.split() if found.returncode == 0 else []


def _on_cpu() -> bool:
    return os.environ.get("JAX_PLATFORMS") == "cpu"


def reason_of(status: int, log: Path | None) -> str:
    """Returns why a run failed: its status, and an error in the last line of its log."""
    why = f"signal {-status}" if status < 0 else f"exit status {status}"
    text = log.read_text(errors="replace", encoding="utf-8") if log and log.is_file() else ""
    said = [line for line in text.split("\n") if line.strip()][-1:]
    if status == EXIT_USER_ERROR and said and said[0].startswith("error: "):
        why += f": {said[0].removeprefix('error: ')}"
    return why


def run_all(jobs: Sequence[Job], at_once: int = 1) -> dict[str, str]:
    """Trains all unfinished runs; returns the failures by run.

    Args:
      jobs: the runs, in the order in which they start.
      at_once: number of runs side by side, each on its own share of the machine.

    Raises:
      KeyboardInterrupt: a run was interrupted by the user.
      TryAgain: a run received SIGTERM, as when the machine is preempted.
      UserError: see ``shares_of_machine``.
    """
    shares = shares_of_machine(at_once)
    failed: dict[str, str] = {}
    stopped: list[BaseException] = []

    def train(number: int, job: Job) -> None:
        if stopped:
            return
        head = f"[{number} of {len(jobs)}] {job.name}"
        try:
            train_or_skip(head, job)
        except (UserError, OSError) as error:  # of its folder or log
            fail(head, job, str(error))

    def fail(head: str, job: Job, reason: str) -> None:
        failed[job.name] = reason
        print(f"{head}: failed ({reason}); going on", flush=True)

    def train_or_skip(head: str, job: Job) -> None:
        if is_finished(job):
            print(f"{head}: finished before", flush=True)
            return
        folder = default_folder(job.experiment)
        log = None if at_once == 1 else folder.with_name(f"{folder.name}.log")
        output = f" > {log}" if log else ""
        print(f"{head}: python -m train {' '.join(job.arguments)}{output}", flush=True)
        share = shares.pop()
        try:
            status = train_one(job, share, log)
        finally:
            shares.append(share)
        if status in (EXIT_INTERRUPTED, -signal.SIGINT):
            stopped.append(KeyboardInterrupt())
        elif status in (EXIT_TRY_AGAIN, -signal.SIGTERM):
            line = f"{job.name} was stopped; the same command resumes it"
            stopped.append(TryAgain(line, everywhere=False))
        elif status:
            fail(head, job, reason_of(status, log))
        elif not is_finished(job):
            fail(head, job, "it ended without a summary of these settings")

    with ThreadPoolExecutor(at_once) as pool:
        try:
            list(pool.map(train, range(1, len(jobs) + 1), jobs))
        except KeyboardInterrupt as interrupt:  # it reaches the runs too: they save
            stopped.append(interrupt)
    if stopped:
        raise stopped[0]
    return failed


def program(argv: Sequence[str]) -> None:
    """Runs the program with the arguments of its command line."""
    p = Arguments(prog="python -m train ladder", description=__doc__, allow_abbrev=False)
    p.add_argument("--config", required=True, help="a file of arms, for instance configs/ladder.py")
    p.add_argument("--arms", default="", help="some of its arms, with commas between; else all")
    p.add_argument("--seeds", default="0", help="with commas between")
    p.add_argument(
        "--at_once",
        type=int,
        default=1,
        help="runs side by side, each on its share of GPUs or cores",
    )
    p.add_argument("--output", default="runs/ladder.json", help="a .json")
    p.add_argument("--plan", action="store_true", help="print sizes and budgets, train nothing")
    options, changes = p.parse_known_args(argv[1:])
    seeds = options.seeds.split(",")
    if not all(seed.isdecimal() for seed in seeds):
        raise UserError(f"--seeds must be whole numbers with commas between; got {options.seeds!r}")
    arms = [arm for arm in options.arms.split(",") if arm]
    jobs = plan(options.config, arms, [int(seed) for seed in seeds], changes)
    print(plan_text(jobs))
    if options.plan:
        return
    refuse_different_data(jobs)
    output = check_json_output(options.output)
    interruptions.kept = lambda: "the same command trains what is left"
    failed = run_all(jobs, options.at_once)
    folders = [
        default_folder(job.experiment)
        for job in jobs
        if job.name not in failed and is_finished(job)
    ]
    if folders:
        print()
        found = final_losses.result(folders)
        final_losses.write({**found, "failed": failed}, output)
    if failed:
        listed = ", ".join(f"{name} ({why})" for name, why in failed.items())
        raise UserError(
            f"{len(failed)} of {len(jobs)} runs failed: {listed}; the same command tries them again"
        )
