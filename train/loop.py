"""The training loop: dispatch, log, evaluate, save. It resumes from the newest checkpoint.

All processes of a run execute it in step. The one that opened the run's folder for writing
(``run.writes``) keeps the records.
"""

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from train.checkpoint import Checkpoints
from train.config import ExperimentConfig
from train.data.corpus import Corpus
from train.data.windows import WindowOrder, host_batches
from train.errors import UserError
from train.evaluate import Evaluator
from train.files import write_atomically
from train.init_from import begin
from train.mesh import by_step_and_row, data_mesh, placed, replicated
from train.metrics import Metrics, Unwritten, warn_of_missing_rows
from train.optimizer import learning_rate, make_optimizer
from train.patience import Patience
from train.plan import check_experiment, model_for, train_steps_of, window_order
from train.preemption import Preemption
from train.processes import first_does
from train.profiling import Profiler, TracedSteps
from train.provenance import write_provenance
from train.run import RunFolder, refuse_lost_checkpoints
from train.run_files import PARAMETERS, SUMMARY
from train.step import (
    DispatchMetrics,
    TrainState,
    abstract_state,
    init_state,
    make_evaluate_rows,
)
from train.tables import parameter_table, parameters_of


class DivergedError(UserError):
    """More steps than allowed had a loss or gradient that is not finite."""

    everywhere = True


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of a training run.

    Attributes:
      state: train state after the last step.
      step: the last step.
      resumed_from: the step at which this start began.
      ended_early: whether the validation loss had stopped falling (``training.patience``).
    """

    state: TrainState
    step: int
    resumed_from: int
    ended_early: bool


def train(
    experiment: ExperimentConfig,
    corpus: Corpus,
    run: RunFolder,
    *,
    show_progress: bool = True,
    mesh: jax.sharding.Mesh | None = None,
    profile: TracedSteps | None = None,
) -> Outcome:
    """Trains or resumes a run.

    Args:
      experiment: the settings.
      corpus: the data.
      run: the open run folder.
      show_progress: whether to show a progress bar.
      mesh: the devices to train on; all devices if None.
      profile: steps to trace.

    Raises:
      UserError: the settings do not fit the corpus or the devices, the checkpoint is of another
        model, or no checkpoint is intact.
      DivergedError: the loss or gradient stopped being finite.
      TryAgain: SIGTERM or Ctrl-C came; the last step is saved.
    """
    with Preemption() as preemption:
        return _train(
            experiment, corpus, run, preemption, mesh or data_mesh(), show_progress, profile
        )


def _train(
    experiment: ExperimentConfig,
    corpus: Corpus,
    run: RunFolder,
    preemption: Preemption,
    mesh: jax.sharding.Mesh,
    show_progress: bool,
    profile: TracedSteps | None,
) -> Outcome:
    num_steps = experiment.training.num_steps
    check_experiment(experiment, corpus, mesh.size)
    model = model_for(experiment, mesh)
    optimizer = make_optimizer(experiment.optimizer, num_steps, mesh=mesh)
    separator = experiment.data.separator(corpus.vocabulary)
    train_steps = train_steps_of(experiment, model, optimizer, mesh, separator=separator)
    first_does(lambda: refuse_lost_checkpoints(run, experiment))
    with Checkpoints(run.checkpoints, experiment.checkpoints) as checkpoints:
        placement: dict[str, Any] = {"mesh": mesh, "layout": experiment.training.layout}
        restored = checkpoints.restore_latest(abstract_state(model, optimizer, **placement))
        weights_sha256 = ""
        if restored:
            start, state = restored
            _warn_of_missing_rows(experiment, run, start)
        else:
            start, state = 0, init_state(model, optimizer, seed=experiment.seed, **placement)
            if experiment.init_from:
                begun = begin(experiment, corpus.vocabulary, state.params)
                state = dataclasses.replace(state, params=begun.params)
                weights_sha256 = begun.weights_sha256
                if run.writes:
                    new = ", ".join(begun.new_tokens) or "none"
                    print(f"begins with {experiment.init_from}; tokens new to it: {new}")
            if run.writes:
                table = parameter_table(parameters_of(state.params))
                write_atomically(run.path / PARAMETERS, table)
        patience = Patience.of_log(experiment.training.patience, run.metrics, step=start)
        step = start
        if start < num_steps and not patience.is_over:
            begun_before = run.has_begun
            path = model.config.implementation
            write_provenance(
                run, corpus, resume_step=start, implementation=path, init_from=weights_sha256
            )
            if run.writes:  # of an early end, after which it now trains on
                (run.path / SUMMARY).unlink(missing_ok=True)
            loop = _Loop(
                experiment, corpus, run, checkpoints, patience, model, mesh, start, show_progress
            )
            if start:
                loop.metrics.say(f"resuming from the checkpoint of step {start}")
                if profile and start >= profile.last:
                    loop.metrics.say("the steps of --profile are done before it: no trace")
            elif begun_before:
                loop.metrics.say(
                    "no checkpoint of the run was saved before: it begins again at step 0"
                )
            step, state = loop.run(train_steps, state, preemption, Profiler(run.path, profile))
        return Outcome(state, step, resumed_from=start, ended_early=step < num_steps)


def _warn_of_missing_rows(experiment: ExperimentConfig, run: RunFolder, step: int) -> None:
    every = {"train": experiment.training.log_every, "validation": experiment.evaluation.every}
    if run.writes:
        warn_of_missing_rows(run.metrics, step, every)


class _Loop:
    """The steps of one start of a run, with their rows of metrics, evaluations and checkpoints."""

    def __init__(
        self,
        experiment: ExperimentConfig,
        corpus: Corpus,
        run: RunFolder,
        checkpoints: Checkpoints,
        patience: Patience,
        model: nn.Module,
        mesh: jax.sharding.Mesh,
        start: int,
        show_progress: bool,
    ):
        self.experiment, self.corpus, self.run_folder = experiment, corpus, run
        self.checkpoints, self.patience, self.mesh, self.start = checkpoints, patience, mesh, start
        self.order = window_order(experiment, corpus)
        # Of all steps at once: a rate computed later would wait for the dispatch under way.
        steps = jnp.arange(experiment.training.num_steps)
        rate = learning_rate(experiment.optimizer, experiment.training.num_steps)
        self.rates = jax.device_get(jax.jit(jax.vmap(rate))(steps))
        limit = experiment.evaluation.num_tokens or None
        validation = corpus.tokens("validation", stop=limit)
        self.validation_bytes = corpus.vocabulary.num_bytes(validation[1:])
        separator = experiment.data.separator(corpus.vocabulary)
        rows = make_evaluate_rows(model, mesh=mesh, separator=separator)
        self.evaluate = Evaluator(experiment, rows, mesh, validation, separator=separator)
        self.pending: tuple[int, DispatchMetrics] | None = None
        self.metrics: Metrics | Unwritten = Unwritten()
        if run.writes:
            self.metrics = Metrics(
                run.path,
                resume_step=start,
                num_steps=experiment.training.num_steps,
                characters_per_step=experiment.characters_per_step,
                show_progress=show_progress,
            )

    def run(
        self,
        train_steps: jax.stages.Wrapped,
        state: TrainState,
        preemption: Preemption,
        profiler: Profiler,
    ) -> tuple[int, TrainState]:
        """Trains to the end and returns the last step and the state after it."""
        training = self.experiment.training
        step = self.start
        try:
            batches = _batches(self.experiment, self.corpus, self.mesh, self.order, self.start)
            for step, batch in batches:
                # The order below is fixed: a checkpoint must come after every row of its step is
                # written, so that a resumed run finds them all and repeats none.
                before = step - training.steps_per_dispatch
                with profiler.dispatch(before, step):
                    state, dispatched = train_steps(state, *batch)
                if trace := profiler.after(step, dispatched):
                    self.metrics.say(f"trace of the steps up to {step} in {trace}")
                self._flush()
                self.pending = (step, dispatched)
                last = step == training.num_steps
                stopping = preemption.reached(before, step)
                self._evaluate_and_save(state, step, last=last, stopping=stopping)
                if self.patience.is_over:
                    break
                if stopping and not last:
                    self.checkpoints.wait()
                    raise preemption.stopped(step)
            self.checkpoints.wait()
        finally:
            profiler.close()
            self.metrics.close()
        return step, state

    def _evaluate_and_save(
        self, state: TrainState, step: int, *, last: bool, stopping: bool
    ) -> None:
        """Evaluates and saves if one of them is due at this step.

        A run that may end early also saves each new lowest loss, and where it ends.
        """
        evaluating = last or step % self.experiment.evaluation.every == 0
        saving = last or stopping or step % self.experiment.checkpoints.every == 0
        if not (evaluating or saving):
            return
        self._flush()
        self.metrics.timing(step)  # what a resumed run goes on from, and its last step, is timed
        paused = time.perf_counter()
        loss = None
        if evaluating:
            evaluated = self.evaluate(state.params)
            loss = evaluated.mean
            self.metrics.validation(step, evaluated, num_bytes=self.validation_bytes)
            lowest = self.patience.add(loss)
            saving |= self.patience.is_over or (lowest and self.patience.limit > 0)
        if saving:
            self.metrics.sync()  # or a loss of power could take rows that no resumed run repeats
            self.checkpoints.save(state, step, loss)
            self.run_folder.saved()
        self.metrics.leave_out(time.perf_counter() - paused)

    def _flush(self) -> None:
        """Writes the rows of the newest dispatch, once the next one is on its way."""
        if self.pending is None:
            return
        (step, dispatched), self.pending = self.pending, None
        tally = jax.device_get(dispatched)
        skipped = int(tally.skipped)
        training = self.experiment.training
        if skipped > training.skipped_limit:
            self.checkpoints.wait()
            raise self._diverged(int(tally.last_skipped))
        self.metrics.losses(step - len(tally.losses), tally.losses)
        if step % training.log_every and step != training.num_steps:
            return
        steps = int(tally.steps)
        if steps == 0:  # all were skipped, so there is no mean
            return
        self.metrics.train(
            step,
            epoch=round(self.order.epoch(step), 6),
            loss=float(tally.loss) / steps,
            grad_norm=float(tally.grad_norm) / steps,
            learning_rate=float(self.rates[step - 1 - skipped]),  # it waits for skipped steps
            skipped=skipped,
        )

    def _diverged(self, step: int) -> DivergedError:
        saved = self.checkpoints.latest()
        where = (
            f"the checkpoint of step {saved} is good" if saved else "no checkpoint was saved yet"
        )
        return DivergedError(
            f"the loss or its gradient was not finite at step {step}; {where}; lower "
            f"config.optimizer.peak_learning_rate or config.optimizer.clip_norm in another "
            f"--config.run_dir, or skip such steps with a higher "
            f"config.training.skipped_limit"
        )


def _batches(
    experiment: ExperimentConfig,
    corpus: Corpus,
    mesh: jax.sharding.Mesh,
    order: WindowOrder,
    start: int,
) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """Yields the last step of each dispatch and the inputs of ``train_steps`` after the state."""
    training = experiment.training
    per_dispatch = training.steps_per_dispatch
    ends = range(start + per_dispatch, training.num_steps + 1, per_dispatch)
    by_rows = by_step_and_row(mesh)
    if experiment.data.placement == "resident":
        tokens = placed(corpus.tokens("train"), replicated(mesh))
        for end in ends:
            starts = order.starts_of_steps(end - per_dispatch, per_dispatch)
            yield end, (tokens, placed(starts, by_rows))
        return
    # Bytes from the file: this process reads its own rows of each batch and nothing else.
    of_bytes = corpus.vocabulary.unit == "bytes"
    batches = host_batches(
        corpus.split("train") if of_bytes else corpus.tokens("train"),
        order,
        start_step=start,
        num_steps=training.num_steps - start,
        table=corpus.vocabulary.table if of_bytes else None,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    whole = (per_dispatch, training.batch_size, experiment.data.context + 1)
    for end in ends:
        rows = np.stack([next(batches) for _ in range(per_dispatch)])
        yield end, (jax.make_array_from_process_local_data(by_rows, rows, whole),)
