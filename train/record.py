"""``python -m train record RUN ...``: copies the evidence of finished runs to ``results/``.

The evidence is small and suffices to judge and repeat a run: settings, provenance, losses, speed
and summary, no checkpoints.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

from train import run_files
from train.errors import UserError
from train.files import new_folder, user_path, writing
from train.program import Arguments
from train.run import open_run

EVIDENCE = (
    run_files.CONFIG,
    run_files.PROVENANCE,
    run_files.METRICS,
    run_files.TIMING,
    run_files.SUMMARY,
    run_files.PARAMETERS,
    run_files.SAMPLE,
)
IF_THERE = (run_files.EVALUATIONS, run_files.TEST_READS)


def record(run_dir: str | Path, results: Path, *, allow_modified: bool = False) -> Path:
    """Copies one run's evidence to ``results/<name>`` and returns that folder.

    For seeds other than 0 the name ends in ``_seed<n>``.

    Raises:
      UserError: the run is not finished, is recorded already, ran on uncommitted code, or
        ``results`` cannot be written.
    """
    run = open_run(run_dir)
    run.check_finished()
    for start in run.read_provenance():
        git = start["git"]
        if not allow_modified and (git["commit"] is None or git["modified"] is not False):
            raise UserError(
                f"the run {run.path} started on code that differs from any commit; run it again "
                f"from a clean tree, or say --allow_modified"
            )
    experiment = run.read_config()
    suffix = f"_seed{experiment.seed}"
    named = experiment.seed == 0 or experiment.name.endswith(suffix)
    target = results / (experiment.name if named else experiment.name + suffix)
    if target.exists():
        raise UserError(f"{target} is there already; remove it to record the run anew")
    for name in EVIDENCE:
        if not (run.path / name).is_file():
            raise UserError(
                f"the run {run.path} has no {name}; run its training command again to write it"
            )
    with writing("--results", results), new_folder(target) as copy:
        for name in (*EVIDENCE, *IF_THERE):
            if (run.path / name).exists():
                shutil.copyfile(run.path / name, copy / name)
    return target


def program(argv: Sequence[str]) -> None:
    """Runs the program with the arguments of its command line."""
    p = Arguments(prog="python -m train record", description=__doc__)
    p.add_argument("runs", nargs="+", help="folders of finished runs")
    p.add_argument("--results", default="results")
    p.add_argument("--allow_modified", action="store_true", help="also of uncommitted code")
    options = p.parse_args(argv[1:])
    results = user_path("--results", options.results)
    for run in options.runs:
        print(record(run, results, allow_modified=options.allow_modified))
