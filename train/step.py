"""The train step: data parallel over a mesh, several steps to a dispatch, one all-reduce each.

Parameters and moments of the optimizer are ``replicated`` on every device or ``sharded`` over the
devices, as in fully sharded data parallelism: each step then gathers the parameters, and one
reduce-scatter an array sums and shards the gradients. The losses agree up to the order of sums.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, UInt

from fsn_jax.documents import document_ids
from train.data.windows import gather_windows
from train.mesh import (
    DATA_AXIS,
    averaged,
    by_step_and_row,
    compiler_options,
    divided_axis,
    gathered,
    replicated,
    shardings,
    spec,
)
from train.packing import pack, pack_state, packs, unpack, unpack_state
from train.settings import Layout, Placement


@flax.struct.dataclass
class Tally:
    """Running sums since the last row of metrics.

    They are part of the state, so a run resumed between two rows writes the same second row.

    Attributes:
      loss: sum of the steps' losses, nats.
      grad_norm: sum of the gradients' global norms before clipping.
      steps: number of steps in the sums.
      skipped: number of steps of the whole run with a loss or gradient that was not finite.
      last_skipped: the newest skipped step, counted from 1 as in the metrics; 0 if none.
    """

    loss: Array
    grad_norm: Array
    steps: Array
    skipped: Array
    last_skipped: Array


@flax.struct.dataclass
class DispatchMetrics(Tally):
    """The metrics of a dispatch: the tally after it and the losses of its steps.

    Attributes:
      losses: float32[K], nats, of all steps of the dispatch, skipped ones included.
    """

    losses: Array


@flax.struct.dataclass
class TrainState:
    """Everything that a step reads and writes.

    Attributes:
      step: number of finished optimizer steps, int32 scalar.
      params: the model's parameters, float32.
      opt_state: the optimizer's state.
      tally: running sums for the metrics.
    """

    step: Array
    params: Any
    opt_state: Any
    tally: Tally


def init_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    *,
    seed: int,
    mesh: Mesh,
    layout: Layout = "replicated",
) -> TrainState:
    """Initialises the state directly on the mesh."""
    state: TrainState = make_init(model, optimizer, mesh, layout)(np.uint32(seed))
    return state


def make_init(
    model: nn.Module, optimizer: optax.GradientTransformation, mesh: Mesh, layout: Layout
) -> jax.stages.Wrapped:
    """Returns the compiled function from a seed, uint32, to the initial state on the mesh."""
    init = _state_maker(model, optimizer)
    return jax.jit(init, out_shardings=_state_shardings(model, optimizer, mesh, layout))


def _state_maker(
    model: nn.Module, optimizer: optax.GradientTransformation
) -> Callable[[Any], TrainState]:
    """Returns a function from the seed to the initial state."""

    def init(seed: Array) -> TrainState:
        params = model.init(jax.random.key(seed), jnp.zeros((1, 2), jnp.int32))["params"]
        tally = Tally(
            loss=jnp.zeros((), jnp.float32),
            grad_norm=jnp.zeros((), jnp.float32),
            steps=jnp.zeros((), jnp.int32),
            skipped=jnp.zeros((), jnp.int32),
            last_skipped=jnp.zeros((), jnp.int32),
        )
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), tally)

    return init


def abstract_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh,
    layout: Layout = "replicated",
) -> TrainState:
    """Returns shapes, dtypes and shardings of the state without computing it."""
    shapes = jax.eval_shape(_state_maker(model, optimizer), np.uint32(0))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings(shapes, mesh, layout),
    )


def _state_shardings(
    model: nn.Module, optimizer: optax.GradientTransformation, mesh: Mesh, layout: Layout
) -> Any:
    """Returns the shardings of the state: one for all of it where the layout allows."""
    if layout == "replicated":
        return replicated(mesh)
    like = abstract_state(model, optimizer, mesh=mesh, layout=layout)
    return jax.tree.map(lambda leaf: leaf.sharding, like)


def window_loss(
    model: nn.Module,
    params: Any,
    windows: Int[Array, "B L1"] | UInt[Array, "B L1"],
    dropout_key: Array | None = None,
    *,
    separator: int | None = None,
) -> Float[Array, "B L"]:
    """Computes the cross entropy in nats of each token after a window's first, float32.

    With a ``separator`` a token sees nothing before the last of them, see ``document_ids``.
    """
    tokens = windows.astype(jnp.int32)
    options: dict[str, Any] = {}
    if dropout_key is not None:
        options = {"deterministic": False, "rngs": {"dropout": dropout_key}}
    if separator is not None:
        options["segment_ids"] = document_ids(tokens[:, :-1], separator)
    logits: Any = model.apply({"params": params}, tokens[:, :-1], **options)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])


WindowLoss = Callable[[Any, Array, Array | None], Array]
"""A function of parameters, windows and a key of the dropout, see ``window_loss``."""


def _mean_gradient(
    losses: WindowLoss, params: Any, windows: Array, accumulation_steps: int, key: Array | None
) -> tuple[Array, Any]:
    """Computes loss and gradient of this device's windows in ``accumulation_steps`` equal parts.

    Each part draws its dropout from a key split from ``key``; without a key there is none.
    """

    def loss(params: Any, part: Array, key: Array | None) -> Array:
        return losses(params, part, key).mean()

    if accumulation_steps == 1:
        return jax.value_and_grad(loss)(params, windows, key)
    parts = windows.reshape(accumulation_steps, -1, windows.shape[-1])
    keys = None if key is None else jax.random.split(key, accumulation_steps)

    def add(total: Any, part: tuple[Array, Array | None]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(params, *part)), None

    zero = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params))
    total, _ = jax.lax.scan(add, zero, (parts, keys))
    return jax.tree.map(lambda x: x / accumulation_steps, total)


Gradient = Callable[[Any, Array, Array], tuple[Array, Any]]
"""A function of parameters, windows and the step that returns the mean loss and its gradient."""


def _make_gradient(
    losses: WindowLoss,
    mesh: Mesh,
    layout: Layout,
    accumulation_steps: int,
    dropout_seed: int | None,
) -> Gradient:
    """Returns a function of the loss and gradient of a batch over all devices."""

    def divided(leaf: Array) -> int | None:
        return divided_axis(leaf.shape, mesh.size, layout)

    def loss_and_gradient(params: Any, windows: Array, step: Array) -> tuple[Array, Any]:
        # Each device differentiates its own share and one all-reduce of the whole tree follows,
        # also with accumulation, where the compiler's own partitioning would reduce once a part.
        axes = [divided(leaf) for leaf in jax.tree.leaves(params)]
        specs = jax.tree.map(lambda leaf: spec(leaf, mesh, layout), params)

        def local(params: Any, windows: Array, step: Array) -> tuple[Array, Any]:
            key = None
            if dropout_seed is not None:
                key = jax.random.fold_in(jax.random.key(dropout_seed), step)
                key = jax.random.fold_in(key, jax.lax.axis_index(DATA_AXIS))
            whole = gathered(params, axes)
            mean = _mean_gradient(losses, whole, windows, accumulation_steps, key)
            return averaged(mean, [None, *axes])

        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(specs, P(DATA_AXIS), P()),
            out_specs=(P(), specs),
            check_vma=False,
        )(params, windows, step)

    return loss_and_gradient


def _make_step(
    optimizer: optax.GradientTransformation, loss_and_gradient: Gradient, log_every: int
) -> Callable[[TrainState, Array], tuple[TrainState, Array]]:
    """Returns a function of one optimizer step, which skips a batch that is not finite."""

    def one_step(state: TrainState, windows: Array) -> tuple[TrainState, Array]:
        loss, gradient = loss_and_gradient(state.params, windows, state.step)
        grad_norm = optax.tree.norm(gradient)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, opt_state),
            (state.params, state.opt_state),
        )
        fresh = state.step % log_every == 0
        tally = Tally(
            loss=jnp.where(fresh, 0.0, state.tally.loss) + jnp.where(finite, loss, 0.0),
            grad_norm=jnp.where(fresh, 0.0, state.tally.grad_norm)
            + jnp.where(finite, grad_norm, 0.0),
            steps=jnp.where(fresh, 0, state.tally.steps) + finite,
            skipped=state.tally.skipped + ~finite,
            last_skipped=jnp.where(finite, state.tally.last_skipped, state.step + 1),
        )
        return TrainState(state.step + 1, params, opt_state, tally), loss

    return one_step


def _of_packed(gradient: Gradient, like: Any) -> Gradient:
    """Returns a function of packed parameters that returns a packed gradient."""

    def loss_and_gradient(params: Any, windows: Array, step: Array) -> tuple[Array, Any]:
        loss, tree = gradient(unpack(params, like), windows, step)
        # The barrier has the optimizer read packed arrays, and not each array of the tree.
        return loss, jax.lax.optimization_barrier(pack(tree))

    return loss_and_gradient


def make_train_steps(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh,
    context: int,
    placement: Placement,
    accumulation_steps: int = 1,
    log_every: int,
    layout: Layout = "replicated",
    dropout_seed: int | None = None,
    separator: int | None = None,
) -> jax.stages.Wrapped:
    """Compiles K steps into one call, which donates its input state.

    With a ``dropout_seed`` the model drops out; each step and device draws from a key of its own,
    made of the seed and the step, so that a resumed run draws what an uninterrupted one does.
    ``separator`` is that of ``window_loss``.

    Returns:
      For ``resident``: ``(state, corpus unsigned[n], starts int32[K, B]) -> (state, report)``;
      windows are gathered inside. For ``host``: ``(state, windows unsigned[K, B, L + 1]) -> (state,
      report)``. The ``DispatchMetrics`` is a copy, so it stays valid when the state is donated.
    """
    losses = functools.partial(window_loss, model, separator=separator)
    gradient = _make_gradient(losses, mesh, layout, accumulation_steps, dropout_seed)

    def train_steps(state: TrainState, *inputs: Array) -> tuple[TrainState, DispatchMetrics]:
        given, of_params = state, gradient
        if packs(mesh, layout):
            state, of_params = pack_state(state, optimizer), _of_packed(gradient, given.params)
        one_step = _make_step(optimizer, of_params, log_every)

        def resident_step(state: TrainState, starts: Array) -> tuple[TrainState, Array]:
            return one_step(state, gather_windows(inputs[0], starts, context))

        step = resident_step if placement == "resident" else one_step
        state, losses = jax.lax.scan(step, state, inputs[-1])
        if packs(mesh, layout):
            state = unpack_state(state, given)
        return state, DispatchMetrics(**vars(state.tally), losses=losses)

    everywhere, by_rows = replicated(mesh), by_step_and_row(mesh)
    of_state = _state_shardings(model, optimizer, mesh, layout)
    of_inputs = (everywhere, by_rows) if placement == "resident" else (by_rows,)
    return jax.jit(
        train_steps,
        in_shardings=(of_state, *of_inputs),
        out_shardings=(of_state, everywhere),
        donate_argnums=0,
        compiler_options=compiler_options(mesh),
    )


@functools.cache
def make_window_losses(
    model: nn.Module, *, mesh: Mesh, separator: int | None = None
) -> jax.stages.Wrapped:
    """Compiles ``(params, windows unsigned[B, L + 1]) -> float32[B, L]``: nats per token.

    ``separator`` is that of ``window_loss``. Made once, so that the seeds of an arm share it.
    """
    losses = jax.shard_map(
        functools.partial(window_loss, model, separator=separator),
        mesh=mesh,
        in_specs=(P(), P(DATA_AXIS)),
        out_specs=P(DATA_AXIS),
        check_vma=False,
    )
    by_row = NamedSharding(mesh, P(DATA_AXIS))
    return jax.jit(
        losses,
        in_shardings=(None, by_row),
        out_shardings=replicated(mesh),
        compiler_options=compiler_options(mesh),
    )


def make_evaluate_rows(
    model: nn.Module, *, mesh: Mesh, separator: int | None = None
) -> jax.stages.Wrapped:
    """Compiles ``(params, windows unsigned[B, L + 1], masks bool[B, C, L]) -> float32[B, C]``.

    The result is each window's cross entropy in nats, summed over the tokens of each mask;
    ``separator`` is that of ``window_loss``.
    """

    def local(params: Any, windows: Array, masks: Array) -> Array:
        losses = window_loss(model, params, windows, separator=separator)[:, None]
        return jnp.where(masks, losses, 0.0).sum(axis=-1)

    rows = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P(), P(DATA_AXIS), P(DATA_AXIS)),
        out_specs=P(DATA_AXIS),
        check_vma=False,
    )
    by_row = NamedSharding(mesh, P(DATA_AXIS))
    return jax.jit(
        rows,
        in_shardings=(None, by_row, by_row),  # the parameters as they lie
        # Where one process sees all rows, devices have nothing to send each other.
        out_shardings=by_row if jax.process_count() == 1 else replicated(mesh),
        compiler_options=compiler_options(mesh),
    )
