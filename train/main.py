"""``python -m train --config=configs/quickstart.py``: trains or resumes a run."""

import json
import traceback
from collections.abc import Sequence

import jax

from train.config import ExperimentConfig
from train.data.corpus import Corpus
from train.finish import finish
from train.flags import parse_config, parse_options
from train.init_from import check_init_from
from train.interruption import interruptions
from train.load import open_experiment_corpus
from train.loop import Outcome, train
from train.plan import check_experiment, cpu_devices
from train.processes import agree, first_does, loss_of_a_process, together
from train.profiling import TracedSteps
from train.program import num_cores, start_jax
from train.run import RunFolder, create_or_resume, default_folder


def program(argv: Sequence[str]) -> None:
    """Runs the program with the arguments of its command line."""
    joining, profile, argv = parse_options(argv)
    experiment = parse_config(argv)
    traced = TracedSteps.parse(profile, experiment.training.num_steps) if profile else None
    start_jax(joining, cpu_devices=cpu_devices(experiment, num_cores()))
    try:
        _train(experiment, traced)
    except Exception as error:
        lost = loss_of_a_process(error)
        if lost is None:
            raise
        traceback.print_exc()  # the line says little of the reason
        raise lost from error


def _train(experiment: ExperimentConfig, profile: TracedSteps | None) -> None:
    # Process 0 first, so that not all of them prepare the same corpus in the same cache.
    first = first_does(lambda: open_experiment_corpus(experiment))
    corpus = together(lambda: first or open_experiment_corpus(experiment))
    experiment = experiment.with_vocabulary(len(corpus.vocabulary))
    agree(
        settings=json.dumps(experiment.to_dict()), corpus=corpus.sha256, JAX_version=jax.__version__
    )
    check_experiment(experiment, corpus, jax.device_count())
    together(lambda: _check_beginning(experiment, corpus))
    interruptions.kept = RunFolder(default_folder(experiment)).kept
    with create_or_resume(experiment, corpus) as run:
        if run.writes:
            shared = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
            devices = f"{jax.device_count()} device(s){shared}"
            print(f"run folder {default_folder(experiment)} · {devices}")
        outcome = train(experiment, corpus, run, profile=profile)
        if run.writes and (line := ending(experiment, outcome)):
            print(line)
        finish(experiment, corpus, run, outcome)


def _check_beginning(experiment: ExperimentConfig, corpus: Corpus) -> None:
    """Checks what a run begins with, unless a checkpoint, here or in its copy, is all it needs."""
    begun = RunFolder(default_folder(experiment)).has_begun
    if not (begun or experiment.mirror_dir):
        check_init_from(experiment, corpus.vocabulary)


def ending(experiment: ExperimentConfig, outcome: Outcome) -> str:
    """Returns a line on how a run ended; empty if there is nothing to say."""
    training, before = experiment.training, outcome.resumed_from == outcome.step
    if outcome.ended_early:
        return (
            f"ended {'before, ' if before else ''}at step {outcome.step} of {training.num_steps}: "
            f"no new lowest validation loss in {training.patience} evaluations; to train on, start "
            f"it with a higher --config.training.patience, or 0"
        )
    if before:
        return f"finished before: all {outcome.step} steps are done, nothing is left to train"
    return ""
