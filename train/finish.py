"""Writes what a finished run leaves: a summary, the loss curve, a sample of text."""

import json
import math
import shlex
import sys
from typing import Any

from fsn_jax.generate import NotFiniteError
from train.analysis.figures import loss_curve
from train.config import ExperimentConfig
from train.data.corpus import Corpus
from train.errors import UserError
from train.files import write_atomically
from train.load import pretrained
from train.loop import Outcome
from train.mesh import on_host
from train.metrics import read_rows
from train.run import RunFolder
from train.run_files import SAMPLE, SUMMARY, TIMING

SAMPLE_LENGTH = 400


def finish(experiment: ExperimentConfig, corpus: Corpus, run: RunFolder, outcome: Outcome) -> None:
    """Writes ``summary.json``, ``loss.png`` and ``sample.txt`` and prints their paths.

    Every process of the run calls this; only the one that writes the run writes the files.

    Raises:
      UserError: the log has no evaluation, or is damaged.
    """
    params = on_host(outcome.state.params)
    if not run.writes:
        return
    rows = [row for row in read_rows(run.metrics) if row["step"] <= outcome.step]
    validation = [row for row in rows if row["kind"] == "validation"]
    if not validation:
        raise UserError(
            f"{run.metrics} has no evaluation of a run that has come to step {outcome.step}; "
            f"restore it from a copy"
        )
    last = validation[-1]
    best = min(validation, key=lambda row: row["loss"] if math.isfinite(row["loss"]) else math.inf)
    timing = read_rows(run.path / TIMING)
    seconds = sum(row["seconds"] for row in timing)
    trained_characters = outcome.step * experiment.characters_per_step
    summary = {
        "steps": outcome.step,
        "parameters": experiment.model.num_params(),
        "characters": trained_characters,
        "training_flops": trained_characters
        * experiment.model.flops_per_token(experiment.data.context),
        "seconds": round(seconds, 1),
        "characters_per_second": round(trained_characters / max(seconds, 1e-9)),
        "validation": {
            "bpc": last["bpc"],
            "best_bpc": best["bpc"],
            "best_step": best["step"],
            "bytes": last["bytes"],
            "context": experiment.data.context,
            "stride": experiment.evaluation_stride,
        },
        "ended_early": outcome.ended_early,
        "data_sha256": corpus.sha256,
    }
    loss_curve([run.path], run.path / "loss.png")
    text = _sample(experiment, corpus, params)
    (run.path / SAMPLE).write_bytes(text)
    # Last: a run with a summary has ended, and has everything.
    write_atomically(run.path / SUMMARY, json.dumps(summary, indent=2) + "\n")

    print(
        f"\nvalidation {last['bpc']:.4f} BPC on {last['bytes']:,} bytes (context "
        f"{experiment.data.context}, stride {experiment.evaluation_stride}), best "
        f"{best['bpc']:.4f} at step {best['step']}; {experiment.model.num_params():,} parameters, "
        f"{trained_characters:,} characters in {seconds / 60:.1f} min"
    )
    print(f"\n{text.decode(errors='replace')}\n")
    _print_what_next(run, _prompt(corpus), early=outcome.ended_early)


def _print_what_next(run: RunFolder, prompt: str, *, early: bool) -> None:
    """Prints commands for a finished run."""
    print(f"curve     {run.path / 'loss.png'}")
    folder = shlex.quote(str(run.path))
    # A run that ended early has gone past its best; the tables compare the ends of whole schedules.
    which = "" if early else " --checkpoint=latest"
    print(f"evaluate  python -m train evaluate {folder}{which}     (the whole split)")
    print(f"sample    python -m train sample {folder} --prompt {shlex.quote(prompt)}")
    print(f"watch     tensorboard --logdir {shlex.quote(str(run.path.parent))}")


def _prompt(corpus: Corpus) -> str:
    """Returns a prompt of characters in the corpus, for the command that is shown."""
    values = corpus.vocabulary.values.tolist()
    shown = [chr(value) for value in values if 32 < value < 127]
    return "The " if {*b"The "} <= {*values} or not shown else shown[0]


def _sample(experiment: ExperimentConfig, corpus: Corpus, params: Any) -> bytes:
    trained = pretrained(experiment, params, corpus.vocabulary)
    prompt = corpus.vocabulary.decode(corpus.tokens("validation", stop=64))
    chunks = trained.stream(prompt, num_tokens=SAMPLE_LENGTH, seed=experiment.seed, temperature=0.8)
    try:
        return prompt + b"".join(chunks)
    except NotFiniteError as error:
        print(f"warning: the sample is its prompt alone: {error}", file=sys.stderr)
        return prompt
