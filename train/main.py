"""``python -m train --config=configs/quickstart.py``: trains, or goes on training, a run."""

import re
import sys
from collections.abc import Sequence

import jax
from absl import flags
from ml_collections import config_flags

from train.config import ExperimentConfig
from train.errors import UserError
from train.finish import finish
from train.load import open_experiment_corpus
from train.loop import train
from train.program import run_program, use_compilation_cache
from train.run import create_or_resume, default_folder


def parse_config(argv: Sequence[str]) -> ExperimentConfig:
    """The experiment that ``--config=FILE[:ARGUMENT] --config.FIELD=VALUE ...`` describes.

    Raises:
      UserError: a flag, the file or a setting is wrong.
    """
    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file(
        "config", None, "FILE[:ARGUMENT] under configs/", flag_values=values
    )
    try:
        rest = values(list(argv))
        chosen = config.value
    except OSError as error:
        missing = re.search(r"No such file or directory: '(.*)'", str(error))
        reason = f"{missing[1]} does not exist" if missing else str(error)
        raise UserError(f"--config names a file that cannot be read: {reason}") from None
    except (AttributeError, KeyError) as error:
        raise UserError(f"there is no such setting: {error.args[0]}") from None
    except (flags.Error, SyntaxError, ImportError, TypeError, ValueError) as error:
        raise UserError(str(error)) from None
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}; settings look like --config.seed=1")
    if chosen is None:
        raise UserError("--config=FILE is needed, for instance --config=configs/quickstart.py")
    return ExperimentConfig.from_config_dict(chosen)


def program(argv: Sequence[str]) -> None:
    """Parses and calls."""
    experiment = parse_config(argv)
    corpus = open_experiment_corpus(experiment)
    experiment = experiment.with_vocabulary(len(corpus.vocabulary))
    use_compilation_cache()
    run = create_or_resume(experiment, corpus)
    try:
        print(f"run folder {default_folder(experiment)} · {jax.device_count()} device(s)")
        outcome = train(experiment, corpus, run)
        finish(experiment, corpus, run, outcome)
    finally:
        run.close()


def main() -> None:
    """The command line."""
    sys.exit(run_program(program, sys.argv))
