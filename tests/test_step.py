"""The train step: devices, placements, accumulation, collectives, donation, what is not finite."""

import collections
import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_runs import (
    ALPHABET,
    BATCH,
    CONTEXT,
    TINY_FSN,
    TINY_TRANSFORMER,
    assert_equal_trees,
    largest_difference,
    mesh_of,
    tiny_experiment,
)

from fsn_jax import FSN
from fsn_jax.hub import build_model
from train.config import OptimizerConfig
from train.data.windows import WindowOrder
from train.mesh import compiler_options, placed, replicated
from train.optimizer import make_optimizer
from train.plan import model_for, train_steps_of
from train.step import (
    TrainState,
    abstract_state,
    init_state,
    make_evaluate_rows,
    make_train_steps,
    window_loss,
)

STEPS = 5
OPTIMIZER = make_optimizer(OptimizerConfig(warmup_steps=2), 30)
TOKENS = np.random.default_rng(0).integers(0, len(ALPHABET), 4000).astype(np.uint8)
ORDER = WindowOrder(TOKENS.size, CONTEXT, BATCH, seed=0)
STARTS = ORDER.starts_of_steps(0, STEPS)
WINDOWS = TOKENS[STARTS[..., None] + np.arange(CONTEXT + 1)]

# float32 sums taken in another order differ by some 1e-7 of their size; Adam divides each by its
# own size, so that after a few steps of 1e-2 a parameter may be off by this much.
SUM_ORDER = 1e-5

MODELS = {
    "fsn": TINY_FSN,
    "transformer": TINY_TRANSFORMER,
    "bfloat16": dataclasses.replace(TINY_FSN, dtype="bfloat16"),
}


@functools.cache
def train_steps(
    model: str = "fsn",
    num_devices: int = 1,
    placement: str = "host",
    accumulation_steps: int = 1,
) -> Any:
    return make_train_steps(
        build_model(MODELS[model]),
        OPTIMIZER,
        mesh=mesh_of(num_devices),
        context=CONTEXT,
        placement=placement,
        accumulation_steps=accumulation_steps,
        log_every=10,
    )


def fresh(model: str = "fsn", num_devices: int = 1) -> TrainState:
    return init_state(build_model(MODELS[model]), OPTIMIZER, seed=0, mesh=mesh_of(num_devices))


def five_steps(**which: Any) -> TrainState:
    state = fresh(which.get("model", "fsn"), which.get("num_devices", 1))
    if which.get("placement") == "resident":
        corpus = placed(TOKENS, replicated(mesh_of(which.get("num_devices", 1))))
        batch = (corpus, STARTS)
    else:
        batch = (WINDOWS,)
    state, _ = train_steps(**which)(state, *batch)
    return state


def test_one_device_and_eight_agree():
    one, eight = five_steps(), five_steps(num_devices=8)
    assert largest_difference(one, eight) <= SUM_ORDER
    assert largest_difference(one.params, fresh().params) > 1e-3


@pytest.mark.parametrize("layout", ["replicated", "sharded"])
def test_muon_is_the_same_on_one_device_and_eight(layout):
    """Its stacks of matrices lie elsewhere than the gradients that they are made of."""

    def two_steps(num_devices: int) -> TrainState:
        model, placed = build_model(TINY_FSN), {"mesh": mesh_of(num_devices), "layout": layout}
        config = OptimizerConfig(matrices="muon", warmup_steps=0)
        optimizer = make_optimizer(config, 30, mesh=placed["mesh"])
        steps = make_train_steps(
            model, optimizer, **placed, context=CONTEXT, placement="host", log_every=10
        )
        return steps(init_state(model, optimizer, seed=0, **placed), WINDOWS[:2])[0]

    one, eight = two_steps(1), two_steps(8)
    assert largest_difference(one, eight) <= 10 * SUM_ORDER  # the iteration triples what is small
    assert largest_difference(one.params, fresh().params) > 1e-3


def test_dropout_resumes_bit_for_bit():
    """Five steps in one call, or two and three; another seed draws other masks, none draws none."""
    model = build_model(dataclasses.replace(TINY_FSN, dropout=0.2))

    def run(seed: int | None, *calls: Any) -> TrainState:
        steps = make_train_steps(
            model,
            OPTIMIZER,
            mesh=mesh_of(2),
            context=CONTEXT,
            placement="host",
            log_every=10,
            dropout_seed=seed,
        )
        state = fresh(num_devices=2)
        for windows in calls:
            state, _ = steps(state, windows)
        return state

    whole = run(3, WINDOWS)
    assert_equal_trees(run(3, WINDOWS[:2], WINDOWS[2:]), whole)
    assert largest_difference(run(4, WINDOWS), whole) > 1e-3
    without = run(None, WINDOWS)
    assert largest_difference(without, whole) > 1e-3
    assert_equal_trees(without, five_steps(num_devices=2))
    # A run with the setting drops, by its own seed: the model and the steps of the loop.
    experiment = tiny_experiment(
        Path("corpus"), Path("run"), seed=3, model__dropout=0.2, data__placement="host"
    )
    of_run = model_for(experiment, mesh_of(2))
    planned = train_steps_of(experiment, of_run, OPTIMIZER, mesh_of(2))
    assert_equal_trees(planned(fresh(num_devices=2), WINDOWS)[0], whole)


class Masked(nn.Module):
    """Logits whose gradient is zero where the dropout of a row is: the first token names its row.

    Two classes, of which the second is right.
    """

    rows: int

    @nn.compact
    def __call__(self, tokens: jax.Array, deterministic: bool = True) -> jax.Array:
        gains = self.param("gains", nn.initializers.zeros, (self.rows, 32), jnp.float32)
        kept = nn.Dropout(0.5)(gains[tokens[:, 0]], deterministic=deterministic)
        return jnp.stack([jnp.zeros(len(tokens)), kept.sum(-1)], axis=-1)[:, None]


def test_every_step_device_and_part_of_a_batch_draws_a_mask_of_its_own():
    """Two devices with two parts of two rows each: no row has the mask of another, or of before."""
    rows, mesh = 8, mesh_of(2)
    model, optimizer = Masked(rows), optax.sgd(1.0)
    step = make_train_steps(
        model,
        optimizer,
        mesh=mesh,
        context=1,
        placement="host",
        accumulation_steps=2,
        log_every=10,
        dropout_seed=0,
    )
    state = init_state(model, optimizer, seed=0, mesh=mesh)
    windows = np.stack([np.arange(rows), np.ones(rows)], axis=-1).astype(np.uint8)[None]
    masks = []
    for _ in range(2):
        before = np.array(state.params["gains"])
        state, _ = step(state, windows)
        masks.append(np.asarray(state.params["gains"]) != before)
    # By chance two of them are alike once in 2**32 / 120 times.
    assert len({mask.tobytes() for mask in np.concatenate(masks)}) == 2 * rows


@pytest.mark.slow
def test_the_two_placements_agree_bit_for_bit():
    assert_equal_trees(five_steps(num_devices=8, placement="resident"), five_steps(num_devices=8))


@pytest.mark.parametrize(("num_devices", "accumulation_steps"), [(8, 2), (1, 4)])
def test_accumulation_changes_no_more_than_the_order_of_sums(num_devices, accumulation_steps):
    parts = five_steps(num_devices=num_devices, accumulation_steps=accumulation_steps)
    assert largest_difference(five_steps(), parts) <= SUM_ORDER


def test_bfloat16_follows_float32():
    """Parameters and tally stay float32; the loss is off by what 8 bits of mantissa leave."""
    exact, rough = five_steps(), five_steps(model="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(rough.params)} == {jnp.dtype("float32")}
    assert rough.tally.loss.dtype == jnp.float32
    loss, expected = float(rough.tally.loss) / STEPS, float(exact.tally.loss) / STEPS
    assert loss != expected
    assert loss == pytest.approx(expected, rel=1e-2)


def test_the_step_follows_the_gradient_of_the_mean_loss():
    """Against the optimizer applied outside, to the gradient of the plain loss of the batch."""
    model, state = build_model(TINY_FSN), fresh()

    @jax.jit
    def plain_step(params: Any, opt_state: Any, windows: Any) -> Any:
        loss, gradient = jax.value_and_grad(
            lambda params: window_loss(model, params, windows).mean()
        )(params)
        changes, opt_state = OPTIMIZER.update(gradient, opt_state, params)
        norm = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(gradient)))
        return jax.tree.map(jnp.add, params, changes), opt_state, loss, norm

    params, opt_state, losses, norms = state.params, state.opt_state, [], []
    for windows in WINDOWS:
        params, opt_state, loss, norm = plain_step(params, opt_state, windows)
        losses.append(float(loss))
        norms.append(float(norm))
    done = five_steps()
    assert largest_difference(done.params, params) <= SUM_ORDER
    assert float(done.tally.loss) == pytest.approx(sum(losses), rel=1e-6)
    assert float(done.tally.grad_norm) == pytest.approx(sum(norms), rel=1e-4)  # before clipping
    assert (int(done.step), int(done.tally.steps), int(done.tally.skipped)) == (STEPS, STEPS, 0)


def test_steps_in_one_dispatch_equal_as_many_dispatches():
    state = fresh()
    for windows in WINDOWS:
        state, _ = train_steps()(state, windows[None])
    assert largest_difference(five_steps(), state) <= SUM_ORDER


COLLECTIVE = re.compile(
    r" (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast|"
    r"ragged-all-to-all)(?:-start)?\("
)


def collectives(compiled: Any) -> collections.Counter[str]:
    return collections.Counter(COLLECTIVE.findall(compiled.as_text()))


@pytest.mark.parametrize(
    ("model", "accumulation_steps"), [("fsn", 1), ("fsn", 2), ("transformer", 1)]
)
def test_one_all_reduce_is_the_only_collective(model, accumulation_steps):
    step = train_steps(model=model, num_devices=8, accumulation_steps=accumulation_steps)
    assert collectives(step.lower(fresh(model, 8), WINDOWS).compile()) == {"all-reduce": 1}


def test_the_count_of_collectives_sees_them():
    """A control: two reductions that depend on each other, and a gather, are counted."""
    mesh = mesh_of(8)

    def local(x: jax.Array) -> jax.Array:
        once = jax.lax.psum(x, "data")
        twice = jax.lax.psum(jnp.sin(once * x), "data")
        return jax.lax.all_gather(twice * x, "data", tiled=True)

    P = jax.sharding.PartitionSpec
    mapped = jax.shard_map(local, mesh=mesh, in_specs=P("data"), out_specs=P(), check_vma=False)
    compiled = jax.jit(mapped).lower(jnp.ones(8)).compile()
    assert collectives(compiled) == {"all-reduce": 2, "all-gather": 1}


@pytest.mark.parametrize("placement", ["resident", "host"])
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_the_whole_step_lowers_for_an_accelerator(platform, placement):
    """Optimizer, accumulation and all-reduce included, on a machine that need not have one."""
    state = abstract_state(build_model(TINY_FSN), OPTIMIZER, mesh=mesh_of(1))
    batch = (TOKENS, STARTS) if placement == "resident" else (WINDOWS,)
    step = train_steps(placement=placement, accumulation_steps=4)
    exported = jax.export.export(step, platforms=[platform])(state, *batch)
    assert exported.platforms == (platform,)
    after, _ = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    assert jax.tree.map(lambda leaf: leaf.shape, after) == jax.tree.map(
        lambda leaf: leaf.shape, state
    )
    for operation in ("dot_general", "all_reduce", "while"):
        assert f"stablehlo.{operation}" in exported.mlir_module()


def test_the_state_is_donated_and_the_tally_outlives_it():
    state, step = fresh(), train_steps()
    second, tally = step(state, WINDOWS)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    third, _ = step(second, WINDOWS)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(second))
    assert int(tally.steps) == STEPS
    assert int(third.step) == 2 * STEPS


def test_the_tally_begins_anew_after_each_row():
    state, step = fresh(), train_steps()
    sums = []
    for _ in range(3):
        state, tally = step(state, WINDOWS)
        sums.append(int(tally.steps))
    assert sums == [5, 10, 5]  # rows are written every 10


def library_sums(program: str) -> int:
    """How many calls of a compiled program hand a library a sum and no product."""
    bodies = dict(re.findall(r"^%?([\w.-]+) \([^\n]*\{\n(.*?)^\}", program, re.M | re.S))
    given = [bodies[name] for name in re.findall(r"kind=kCustom, calls=%?([\w.-]+)", program)]
    return sum(" reduce(" in body and " dot(" not in body for body in given)


def test_no_sum_of_a_step_goes_to_a_library(monkeypatch):
    """It does without the compiler option; an XLA that lacks the option compiles without."""

    def program() -> str:
        place = {"mesh": mesh_of(1)}
        model = build_model(TINY_FSN)
        steps = make_train_steps(
            model, OPTIMIZER, **place, context=CONTEXT, placement="host", log_every=10
        )
        return steps.lower(abstract_state(model, OPTIMIZER, **place), WINDOWS).compile().as_text()

    assert compiler_options(mesh_of(1))
    assert library_sums(program()) == 0
    monkeypatch.setattr("train.mesh.YNN_FOR_PRODUCTS", {"xla_cpu_a_flag_of_no_version": "1"})
    assert not compiler_options(mesh_of(1))
    assert library_sums(program()) > 0


class Poisoned(nn.Module):
    """An FSN whose loss is not finite where a batch holds the last letter of the alphabet."""

    config: Any

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        logits = FSN(self.config)(tokens)
        bad = (tokens == self.config.vocab_size - 1).any()
        return logits * jnp.where(bad, jnp.nan, 1.0)


def test_a_step_that_is_not_finite_is_counted_and_leaves_no_trace():
    model, mesh = Poisoned(TINY_FSN), mesh_of(8)
    step = make_train_steps(
        model, OPTIMIZER, mesh=mesh, context=CONTEXT, placement="host", log_every=10
    )
    clean = WINDOWS % (len(ALPHABET) - 1)
    poisoned = clean.copy()
    poisoned[2, 3, 7] = len(ALPHABET) - 1  # one character of one row, on one of the devices

    state, tally = step(init_state(model, OPTIMIZER, seed=0, mesh=mesh), poisoned)
    assert (int(tally.skipped), int(tally.last_skipped), int(tally.steps)) == (1, 3, 4)
    assert np.isfinite(float(tally.loss)) and np.isfinite(float(tally.grad_norm))

    # Without its third step the same run, whose last of five is left out instead.
    poisoned[2:] = np.roll(poisoned[2:], -1, axis=0)
    other, _ = step(init_state(model, OPTIMIZER, seed=0, mesh=mesh), poisoned)
    assert_equal_trees(state.params, other.params)
    assert_equal_trees(state.opt_state, other.opt_state)
    assert int(other.tally.last_skipped) == 5


def test_parameters_that_are_not_finite_are_left_as_they_were():
    state = fresh()
    bias = state.params["readout"]["bias"].at[0].set(jnp.nan)
    state.params["readout"]["bias"] = jax.device_put(bias, replicated(mesh_of(1)))
    before = jax.device_get((state.params, state.opt_state))
    state, tally = train_steps()(state, WINDOWS)
    assert_equal_trees((state.params, state.opt_state), before)
    assert (int(tally.skipped), int(tally.steps), float(tally.loss)) == (STEPS, 0, 0.0)


def test_rows_of_evaluation_are_sums_over_masks():
    model, params, windows = build_model(TINY_FSN), fresh(num_devices=8).params, WINDOWS[0]
    masks = np.random.default_rng(1).random((BATCH, 2, CONTEXT)) < 0.5
    losses = jax.jit(functools.partial(window_loss, model))(params, windows)
    evaluate = make_evaluate_rows(model, mesh=mesh_of(8)).lower(params, windows, masks).compile()
    expected = (np.asarray(losses)[:, None] * masks).sum(-1)
    np.testing.assert_allclose(evaluate(params, windows, masks), expected, rtol=1e-6)
    hlo = evaluate.as_text()
    assert not any(name in hlo for name in ("all-gather", "all-reduce", "collective-permute"))
