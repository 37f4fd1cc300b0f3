"""The train step: data parallel over a mesh, several steps to a dispatch, one all-reduce each."""

import functools
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, UInt

from fsn_jax import FSN, FSNConfig, Transformer
from train.config import ModelConfig
from train.data import gather_windows

DATA_AXIS = "data"


@flax.struct.dataclass
class Tally:
    """Running sums since the last row of metrics.

    A part of the state, so that a run resumed between two rows writes the same second row.

    Attributes:
      loss: sum of the steps' losses, nats.
      grad_norm: sum of the gradients' global norms before clipping.
      steps: how many were added.
      skipped: steps of the whole run whose loss or gradient was not finite.
      last_skipped: the newest of them, counted from 1 as in the metrics; 0 if none.
    """

    loss: Array
    grad_norm: Array
    steps: Array
    skipped: Array
    last_skipped: Array


@flax.struct.dataclass
class TrainState:
    """Everything that a step reads and writes.

    Attributes:
      step: optimizer steps done, int32 scalar.
      params: the model's parameters, float32.
      opt_state: the optimizer's state.
      tally: running sums for the metrics.
    """

    step: Array
    params: Any
    opt_state: Any
    tally: Tally


def build_model(config: ModelConfig) -> nn.Module:
    """The Flax module of a model's configuration."""
    return FSN(config) if isinstance(config, FSNConfig) else Transformer(config)


def data_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh with one axis, ``data``, over all devices."""
    devices = devices or jax.devices()
    return jax.make_mesh((len(devices),), (DATA_AXIS,), (AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds all of it."""
    return NamedSharding(mesh, P())


def init_state(
    model: nn.Module, optimizer: optax.GradientTransformation, *, seed: int, mesh: Mesh
) -> TrainState:
    """The state before the first step, born on the mesh."""

    def init(key: Array) -> TrainState:
        params = model.init(key, jnp.zeros((1, 2), jnp.int32))["params"]
        tally = Tally(
            loss=jnp.zeros((), jnp.float32),
            grad_norm=jnp.zeros((), jnp.float32),
            steps=jnp.zeros((), jnp.int32),
            skipped=jnp.zeros((), jnp.int32),
            last_skipped=jnp.zeros((), jnp.int32),
        )
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), tally)

    return jax.jit(init, out_shardings=replicated(mesh))(jax.random.key(seed))


def abstract_state(
    model: nn.Module, optimizer: optax.GradientTransformation, *, mesh: Mesh
) -> TrainState:
    """Shapes, types and placement of the state, without computing it."""
    shapes = jax.eval_shape(functools.partial(init_state, model, optimizer, seed=0, mesh=mesh))
    everywhere = replicated(mesh)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), shapes
    )


def window_loss(
    model: nn.Module, params: Any, windows: Int[Array, "B L1"] | UInt[Array, "B L1"]
) -> Float[Array, "B L"]:
    """Cross entropy in nats of each character after a window's first, float32."""
    tokens = windows.astype(jnp.int32)
    logits = model.apply({"params": params}, tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])


def _mean_gradient(
    model: nn.Module, params: Any, windows: Array, accumulation_steps: int
) -> tuple[Array, Any]:
    """Loss and gradient of this device's windows, in ``accumulation_steps`` equal parts."""

    def loss(params: Any, part: Array) -> Array:
        return window_loss(model, params, part).mean()

    if accumulation_steps == 1:
        return jax.value_and_grad(loss)(params, windows)
    parts = windows.reshape(accumulation_steps, -1, windows.shape[-1])

    def add(total: Any, part: Array) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(params, part)), None

    zero = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params))
    total, _ = jax.lax.scan(add, zero, parts)
    return jax.tree.map(lambda x: x / accumulation_steps, total)


def make_train_steps(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh,
    context: int,
    placement: Literal["resident", "host"],
    accumulation_steps: int = 1,
    log_every: int,
) -> jax.stages.Wrapped:
    """Compiles K steps into one call that consumes the state it is given.

    Returns:
      For ``resident``: ``(state, corpus unsigned[n], starts int32[K, B]) -> (state, tally)``;
      windows are gathered inside. For ``host``: ``(state, windows unsigned[K, B, L + 1]) ->
      (state, tally)``. The tally is a copy that outlives the state it is a part of.
    """

    def local(params: Any, windows: Array) -> tuple[Array, Any]:
        mean = _mean_gradient(model, params, windows, accumulation_steps)
        return jax.lax.pmean(mean, DATA_AXIS)

    # Each device differentiates its own share and one all-reduce of the whole tree follows, also
    # with accumulation, where the compiler's own partitioning would reduce once a part.
    loss_and_gradient = jax.shard_map(
        local, mesh=mesh, in_specs=(P(), P(DATA_AXIS)), out_specs=P(), check_vma=False
    )

    def one_step(state: TrainState, windows: Array) -> TrainState:
        loss, gradient = loss_and_gradient(state.params, windows)
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
        return TrainState(state.step + 1, params, opt_state, tally)

    everywhere, by_step_and_row = replicated(mesh), NamedSharding(mesh, P(None, DATA_AXIS))

    if placement == "resident":

        def resident_steps(state: TrainState, corpus: Array, starts: Array) -> Any:
            def body(state: TrainState, starts: Array) -> tuple[TrainState, None]:
                return one_step(state, gather_windows(corpus, starts, context)), None

            state, _ = jax.lax.scan(body, state, starts)
            return state, state.tally

        shardings = (everywhere, everywhere, by_step_and_row)
        return jax.jit(
            resident_steps, in_shardings=shardings, out_shardings=everywhere, donate_argnums=0
        )

    def host_steps(state: TrainState, windows: Array) -> Any:
        state, _ = jax.lax.scan(lambda s, w: (one_step(s, w), None), state, windows)
        return state, state.tally

    return jax.jit(
        host_steps,
        in_shardings=(everywhere, by_step_and_row),
        out_shardings=everywhere,
        donate_argnums=0,
    )


def make_evaluate_rows(model: nn.Module, *, mesh: Mesh) -> jax.stages.Wrapped:
    """Compiles ``(params, windows unsigned[B, L + 1], scored bool[B, L]) -> float32[B]``.

    The result is each window's cross entropy in nats, summed over its scored characters.
    """

    def local(params: Any, windows: Array, scored: Array) -> Array:
        return jnp.where(scored, window_loss(model, params, windows), 0.0).sum(axis=-1)

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
        in_shardings=(replicated(mesh), by_row, by_row),
        out_shardings=replicated(mesh),
    )
