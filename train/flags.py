"""Parses the command line of a run: ``--config=FILE[:ARGUMENT] --config.FIELD=VALUE ...``."""

import contextlib
import difflib
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import flags
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from train.config import ExperimentConfig
from train.errors import UserError
from train.files import user_path
from train.preemption import end_with_stdin
from train.processes import Joining
from train.program import Arguments

_KINDS: dict[type, tuple[Callable[..., Any], str]] = {
    bool: (flags.DEFINE_boolean, "True or False"),
    int: (flags.DEFINE_integer, "a whole number"),
    float: (flags.DEFINE_float, "a number"),
    str: (flags.DEFINE_string, "a text"),
}
"""For each type of setting: the absl function that defines its flag, and what it accepts."""


def parse_config(argv: Sequence[str]) -> ExperimentConfig:
    """Returns the settings that ``--config=FILE[:ARGUMENT] --config.FIELD=VALUE ...`` describe.

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
        for name, value in flatten_dict({"config": config.to_dict()}, sep=".").items():
            if type(value) not in _KINDS:
                raise UserError(
                    f"--config={file.value}: {name} is {value!r}; a setting is a switch, a number "
                    f"or a text"
                )
            define, _ = _KINDS[type(value)]
            define(name, value, "", flag_values=settings)
        rest = settings(others)
    except flags.UnrecognizedFlagError as error:
        raise UserError(
            f"there is no setting --{error.flagname}; {_hint(error.flagname, list(settings))}"
        ) from None
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


def _hint(name: str, settings: Sequence[str]) -> str:
    """Suggests a setting by the last part of the name, since the other parts are long."""
    by_last: dict[str, list[str]] = {}
    for setting in settings:
        by_last.setdefault(setting.rpartition(".")[2], []).append(setting)
    near = difflib.get_close_matches(name.rpartition(".")[2], by_last, n=1, cutoff=0.75)
    if not near:
        return "settings look like --config.seed=1"
    (best,) = difflib.get_close_matches(name, by_last[near[0]], n=1, cutoff=0)
    return f"did you mean --{best}?"


def parse_options(argv: Sequence[str]) -> tuple[Joining, str, list[str]]:
    """Parses the options that are not settings of the run.

    Returns:
      How the processes of a run find each other; the steps to trace, as text; the other arguments.

    Raises:
      UserError: a flag is wrong.
    """
    p = Arguments(prog="python -m train", add_help=False, allow_abbrev=False)
    p.add_argument("--distributed", action="store_true")
    p.add_argument("--coordinator", metavar="HOST:PORT", default="")
    p.add_argument("--num_processes", type=int, default=-1)
    p.add_argument("--process_id", type=int, default=-1)
    p.add_argument("--profile", metavar="FIRST:LAST", default="")
    p.add_argument("--end_with_stdin", action="store_true")  # for runs that another program starts
    options, rest = p.parse_known_args(argv[1:])
    joining = Joining(
        options.distributed, options.coordinator, options.num_processes, options.process_id
    )
    if options.end_with_stdin:
        end_with_stdin()
    return joining, options.profile, [argv[0], *rest]


@contextlib.contextmanager
def config_file(argument: str) -> Iterator[dict[str, Any]]:
    """Yields the names that the file of ``FILE[:ARGUMENT]`` defines.

    In the file ``from configs import ...`` finds the files beside it, from any working folder.

    Raises:
      UserError: there is no such file, or it fails, or what is done with its names.
    """
    file = argument.partition(":")[0]
    path = user_path("--config", file)
    if not path.is_file():
        raise UserError(f"--config={file}: there is no file {file}; see configs/ for some")
    before = [*sys.path]
    sys.path.insert(0, str(path.resolve().parent.parent))
    try:
        yield runpy.run_path(str(path))
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # whatever it is, the file's author can mend it
        reason = error if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise UserError(f"--config={argument}: {reason}") from error
    finally:
        sys.path[:] = before


def load_config(argument: str) -> ConfigDict:
    """Returns what the function ``get_config`` of ``FILE[:ARGUMENT]`` returns.

    Raises:
      UserError: the file does not exist or fails.
    """
    _, colon, rest = argument.partition(":")
    with config_file(argument) as names:
        get_config = names.get("get_config")
        if get_config is None:
            raise UserError(f"--config={argument}: the file has no function get_config()")
        config = get_config(rest) if colon else get_config()
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"--config={argument}: get_config() must return what train.config.experiment(...) "
            f"gives; got {type(config).__name__}"
        )
    return config
