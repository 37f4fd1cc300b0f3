"""``python -m train --config=FILE[:ARM]`` trains; ``python -m train NAME ...`` runs a program."""

import importlib
import importlib.util
import sys

if not __package__:  # python train
    print("error: write python -m train, in the folder that holds train/", file=sys.stderr)
    sys.exit(2)

from train import streams
from train.interruption import interruptions

EXTRA_PACKAGES = (
    *("absl", "etils", "flatbuffers", "grain", "matplotlib", "ml_collections", "optax", "orbax"),
    *("tensorboard", "tensorflow_datasets", "tqdm"),
)
"""What the programs import beside what the library does: the extra ``train``."""

if __name__ == "__main__":  # before the other imports, which take seconds
    streams.mend()
    interruptions.listen()
    if missing := [name for name in EXTRA_PACKAGES if importlib.util.find_spec(name) is None]:
        print(
            f"error: the programs need packages that are not installed ({', '.join(missing)}): "
            f"pip install -e '.[train]' in this folder, or make setup",
            file=sys.stderr,
        )
        sys.exit(2)

import difflib  # noqa: E402
from collections.abc import Sequence  # noqa: E402
from typing import NamedTuple  # noqa: E402

from train.errors import UserError  # noqa: E402
from train.program import run_program  # noqa: E402


class Entry(NamedTuple):
    """A program of the command line.

    Attributes:
      module: the module whose ``program(argv)`` runs it.
      about: what it does, in one line.
    """

    module: str
    about: str


PROGRAMS = {
    "prepare": Entry("train.data.prepare", "prepares a corpus, for a machine without a network"),
    "inspect": Entry("train.inspect", "parameters, FLOPs, memory and first batch, untrained"),
    "ladder": Entry("train.ladder", "trains every arm and seed of a config file"),
    "evaluate": Entry("train.evaluate", "loss over the whole validation split"),
    "test": Entry("train.final_evaluation", "loss on the test split, read once and recorded"),
    "sample": Entry("train.sample", "text from a trained model"),
    "export": Entry("train.export", "a trained model in the Hugging Face hub's layout"),
    "record": Entry("train.record", "copies the evidence of finished runs to results/"),
    "compare": Entry("train.analysis.compare", "two arms over their seeds, with standard errors"),
    "final_losses": Entry("train.analysis.final_losses", "final losses of arms, or against size"),
    "copy_depth": Entry("train.analysis.copy_depth", "loss by copy depth"),
    "heads": Entry("train.analysis.heads", "what the attention heads of models attend to"),
    "readings": Entry("train.analysis.readings", "the coupling of a trained FSN, layer by layer"),
    "figures": Entry("train.analysis.figures", "loss curves of runs"),
    "report": Entry("train.analysis.report", "one interactive HTML page of runs"),
    "claims": Entry("train.analysis.claims", "judges the paper's claims by the recorded runs"),
}

HELP = """\
python -m train --config=FILE[:ARM] [--config.FIELD=VALUE ...] [OPTION ...]
  trains a run, or resumes an interrupted one
python -m train NAME ...
  runs another program; python -m train NAME --help describes it

{programs}

Training, for instance: python -m train --config=configs/quickstart.py

Any setting of the file can be changed: --config.training.num_steps=500, for instance.
train/settings.py explains them, fsn_jax/fields.py and fsn_jax/config.py those of the model,
train/config.py those of the run itself.
--profile=FIRST:LAST writes a trace of these steps to the run's folder.

Several processes train as one if each starts the same command with --distributed (on a Cloud TPU
slice, under SLURM or Open MPI), or anywhere with --coordinator=HOST:PORT --num_processes=N
--process_id=0 to N-1. All of them must see the run folder.

The exit status is 0 at the end, 2 for a mistake (one line says which), 75 after SIGTERM or the loss
of a process, 130 after Ctrl-C: start the same command again. A run finishes and saves its step on
SIGTERM and Ctrl-C; a second Ctrl-C ends it at once."""


def program(argv: Sequence[str]) -> None:
    """Runs the program that ``argv[1]`` names, or trains if that is an option.

    Each program's module is imported only when it runs.

    Raises:
      UserError: there is no such program, or the program raises one.
    """
    name = argv[1] if len(argv) > 1 else ""
    if name in PROGRAMS:
        _run(PROGRAMS[name].module, [f"train {name}", *argv[2:]])
    elif name and not name.startswith("-"):
        near = difflib.get_close_matches(name, PROGRAMS, n=1)
        hint = f"did you mean {near[0]}?" if near else "python -m train --help lists them"
        raise UserError(f"there is no program {name!r}; {hint}")
    elif {"-h", "--help"} & {*argv}:
        width = max(map(len, PROGRAMS))
        listed = (f"  {name:{width}}  {entry.about}" for name, entry in PROGRAMS.items())
        print(HELP.format(programs="\n".join(listed)))
    else:
        _run("train.main", argv)


def _run(module: str, argv: Sequence[str]) -> None:
    program = importlib.import_module(module).program
    interruptions.begin()
    program(argv)


if __name__ == "__main__":
    sys.exit(run_program(program, sys.argv))
