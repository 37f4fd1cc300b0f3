"""The command line of a run: ``--config=FILE[:ARGUMENT] --config.FIELD=VALUE ...``, options."""

import difflib
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from train.config import ExperimentConfig
from train.errors import UserError
from train.processes import Joining
from train.program import Arguments
from train.run import flatten

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
