"""``python -m train --config=configs/quickstart.py``: trains, or goes on training, a run."""

import difflib
import json
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from train.config import ExperimentConfig
from train.errors import UserError
from train.finish import finish
from train.load import open_experiment_corpus
from train.loop import check_experiment, cpu_devices, train
from train.processes import Joining, agree, first_does, loss_of_a_process, together
from train.profiling import Span
from train.program import Arguments, num_cores, run_program, start_jax
from train.run import create_or_resume, default_folder, flatten

HELP = """--profile=FIRST:LAST writes a trace of these steps to the run's folder.

Any setting of the file can be changed: --config.training.num_steps=500, for instance.
train/config.py and fsn_jax/config.py tell what each one means. The same command goes on with a run
that was interrupted.

Many processes train as one when each starts the same command with --distributed (on a Cloud TPU
slice, under SLURM or Open MPI, which tell JAX the rest), or anywhere with --coordinator=HOST:PORT
--num_processes=N --process_id=0 to N-1. The run folder must be one that all of them see.

The exit status is 0 at the end, 2 for a mistake (one line says which), 75 when the run was told to
stop or lost a process: start it again."""

_KINDS: dict[type, tuple[Callable[..., Any], str]] = {
    bool: (flags.DEFINE_boolean, "True or False"),
    int: (flags.DEFINE_integer, "a whole number"),
    float: (flags.DEFINE_float, "a number"),
    str: (flags.DEFINE_string, "a text"),
}
"""How a flag is made of a setting, and what it takes."""


def parse_config(argv: Sequence[str]) -> ExperimentConfig:
    """The experiment that ``--config=FILE[:ARGUMENT] --config.FIELD=VALUE ...`` describes.

    Raises:
      UserError: a flag, the file or a setting is wrong.
    """
    named, settings = flags.FlagValues(), flags.FlagValues()
    file = flags.DEFINE_string("config", None, "FILE[:ARGUMENT]", flag_values=named)
    try:
        others = named(list(argv), known_only=True)
        if not file.value:
            raise UserError("--config=FILE is needed, for instance --config=configs/quickstart.py")
        config = load_config(file.value)
        for name, value in flatten({"config": config.to_dict()}).items():
            if type(value) not in _KINDS:
                raise UserError(
                    f"--config={file.value}: {name} is {value!r}; a setting is a switch, a number "
                    f"or a text"
                )
            define, _ = _KINDS[type(value)]
            define(name, value, "", flag_values=settings)
        rest = settings(others)
    except flags.UnrecognizedFlagError as error:
        near = difflib.get_close_matches(error.flagname, list(settings), n=1)
        hint = f"did you mean --{near[0]}?" if near else "settings look like --config.seed=1"
        raise UserError(f"there is no setting --{error.flagname}; {hint}") from None
    except flags.IllegalFlagValueError as error:
        name, _, value = str(error).removeprefix("flag --").partition("=")
        _, kind = _KINDS[type(settings[name].default)]
        raise UserError(f"--{name} takes {kind}; got {value.partition(': ')[0]!r}") from None
    except flags.Error as error:
        raise UserError(f"{error}; settings look like --config.seed=1") from None
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}; settings look like --config.seed=1")
    config.update_from_flattened_dict(settings.flag_values_dict(), strip_prefix="config.")
    return ExperimentConfig.from_config_dict(config)


def parse_options(argv: Sequence[str]) -> tuple[Joining, str, list[str]]:
    """What a start is told beside the settings of the run.

    Returns:
      How the processes of a run find each other; the steps to trace as written; the arguments left.

    Raises:
      UserError: a flag is wrong.
    """
    p = Arguments(prog="python -m train", add_help=False, allow_abbrev=False)
    p.add_argument("--distributed", action="store_true")
    p.add_argument("--coordinator", metavar="HOST:PORT", default="")
    p.add_argument("--num_processes", type=int, default=-1)
    p.add_argument("--process_id", type=int, default=-1)
    p.add_argument("--profile", metavar="FIRST:LAST", default="")
    options, rest = p.parse_known_args(argv[1:])
    joining = Joining(
        options.distributed, options.coordinator, options.num_processes, options.process_id
    )
    return joining, options.profile, [argv[0], *rest]


def load_config(argument: str) -> ConfigDict:
    """What the function ``get_config`` of ``FILE[:ARGUMENT]`` returns.

    Raises:
      UserError: there is no such file or it fails.
    """
    file, colon, rest = argument.partition(":")
    if not Path(file).is_file():
        raise UserError(f"--config={argument}: there is no file {file}; see configs/ for some")
    try:
        get_config = runpy.run_path(file).get("get_config")
        if get_config is None:
            raise UserError(f"--config={argument}: the file has no function get_config()")
        config = get_config(rest) if colon else get_config()
    except UserError:
        raise
    except Exception as error:  # whatever it is, the file's author can mend it
        reason = error if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise UserError(f"--config={argument}: {reason}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"--config={argument}: get_config() must return what train.config.experiment(...) "
            f"gives; got {type(config).__name__}"
        )
    return config


def program(argv: Sequence[str]) -> None:
    """Parses and calls."""
    if {"-h", "--help"} & set(argv):
        print(f"{__doc__}\n{HELP}")
        return
    joining, profile, argv = parse_options(argv)
    experiment = parse_config(argv)
    span = Span.parse(profile, experiment.training.num_steps) if profile else None
    start_jax(joining, cpu_devices=cpu_devices(experiment, num_cores()))
    try:
        _train(experiment, span)
    except Exception as error:
        lost = loss_of_a_process(error)
        if lost is None:
            raise
        raise lost from error


def _train(experiment: ExperimentConfig, profile: Span | None) -> None:
    # Process 0 first, so that not all of them prepare the same corpus in the same cache.
    first = first_does(lambda: open_experiment_corpus(experiment))
    corpus = together(lambda: first or open_experiment_corpus(experiment))
    experiment = experiment.with_vocabulary(len(corpus.vocabulary))
    agree(
        settings=json.dumps(experiment.to_dict()), corpus=corpus.sha256, JAX_version=jax.__version__
    )
    check_experiment(experiment, corpus, jax.device_count())
    with create_or_resume(experiment, corpus) as run:
        if run.writes:
            shared = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
            devices = f"{jax.device_count()} device(s){shared}"
            print(f"run folder {default_folder(experiment)} · {devices}")
        outcome = train(experiment, corpus, run, show_progress=run.writes, profile=profile)
        if run.writes and outcome.resumed_from == outcome.step:
            print(f"finished before: all {outcome.step} steps are done, nothing is left to train")
        finish(experiment, corpus, run, outcome)


def main() -> None:
    """The command line."""
    sys.exit(run_program(program, sys.argv))
