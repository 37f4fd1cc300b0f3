"""What is timed: a program that does one known piece of work at each call."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.flax_attention import FlaxTransformer
from fsn_jax import TransformerConfig
from fsn_jax.config import TRAINING_FLOPS_FACTOR
from fsn_jax.fields import Implementation
from fsn_jax.generate import CHUNK, stream
from fsn_jax.hub import build_model
from train.config import ExperimentConfig
from train.errors import UserError
from train.mesh import by_step_and_row, data_mesh, replicated
from train.optimizer import make_optimizer
from train.plan import cpu_devices, train_steps_of
from train.step import init_state

CORPUS_BYTES = 1_000_000


@dataclasses.dataclass
class Contender:
    """A program to time, with its size and cost.

    Attributes:
      name: name of the contender.
      seconds: runs the program once and returns the seconds of one unit of work: a step, a forward
        pass, or a character.
      params: number of parameters.
      flops: FLOPs of one unit of work, by the model's own count; 0 without a count.
      compile_seconds: seconds of compilation; 0 if nothing is compiled.
      memory_bytes: scratch memory and results of the compiled program, by the compiler's count; 0
        without a count.
    """

    name: str
    seconds: Callable[[], float]
    params: int
    flops: float = 0.0
    compile_seconds: float = 0.0
    memory_bytes: int = 0


def _model(name: str, experiment: ExperimentConfig) -> nn.Module:
    implementation: Implementation = "reference" if name == "fsn-reference" else "auto"
    config = dataclasses.replace(
        experiment.model, implementation=implementation, remat=name == "fsn-remat"
    )
    if name == "flax":
        if not isinstance(config, TransformerConfig):
            raise UserError("the flax peer is a transformer")
        return FlaxTransformer(config)
    return build_model(config)


def _compiled(function: Any, *arguments: Any) -> tuple[Any, float, int]:
    began = time.perf_counter()
    compiled = function.lower(*arguments).compile()
    seconds = time.perf_counter() - began
    memory = compiled.memory_analysis()
    used = memory.temp_size_in_bytes + memory.output_size_in_bytes if memory else 0
    return compiled, seconds, used


def _tokens(experiment: ExperimentConfig, *shape: int) -> jax.Array:
    draw = np.random.default_rng(0).integers(0, experiment.model.vocab_size, shape)
    return jnp.asarray(draw, jnp.int32)


def train_contender(name: str, experiment: ExperimentConfig, steps: int) -> Contender:
    """Builds the train step on random text, with ``steps`` steps in a dispatch."""
    model = _model(name, experiment)
    mesh = data_mesh(jax.devices()[: cpu_devices(experiment, jax.device_count())])
    optimizer = make_optimizer(experiment.optimizer, experiment.training.num_steps, mesh=mesh)
    context, batch_size = experiment.data.context, experiment.training.batch_size
    program = train_steps_of(experiment, model, optimizer, mesh)
    corpus = jax.device_put(_tokens(experiment, CORPUS_BYTES).astype(jnp.uint8), replicated(mesh))
    starts = jax.device_put(
        np.random.default_rng(1).integers(
            0, CORPUS_BYTES - context - 1, (steps, batch_size), np.int32
        ),
        by_step_and_row(mesh),
    )
    state = init_state(model, optimizer, seed=0, mesh=mesh)
    params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    compiled, compile_seconds, memory = _compiled(program, state, corpus, starts)

    def seconds() -> float:
        nonlocal state
        began = time.perf_counter()
        state, tally = compiled(state, corpus, starts)
        jax.block_until_ready((state, tally))
        return (time.perf_counter() - began) / steps

    return Contender(
        name=name,
        seconds=seconds,
        params=params,
        flops=experiment.model.flops_per_token(context) * context * batch_size,
        compile_seconds=compile_seconds,
        memory_bytes=memory,
    )


def forward_contender(name: str, experiment: ExperimentConfig, steps: int) -> Contender:
    """Builds a forward pass: the logits of one batch a call."""
    del steps
    model = _model(name, experiment)
    batch = _tokens(experiment, experiment.training.batch_size, experiment.data.context)
    variables = jax.jit(model.init)(jax.random.key(0), batch[:, :2])
    compiled, compile_seconds, memory = _compiled(jax.jit(model.apply), variables, batch)

    def seconds() -> float:
        began = time.perf_counter()
        jax.block_until_ready(compiled(variables, batch))
        return time.perf_counter() - began

    return Contender(
        name=name,
        seconds=seconds,
        params=sum(leaf.size for leaf in jax.tree.leaves(variables)),
        flops=experiment.model.flops_per_token(experiment.data.context)
        * batch.size
        / TRAINING_FLOPS_FACTOR,
        compile_seconds=compile_seconds,
        memory_bytes=memory,
    )


def sample_contender(name: str, experiment: ExperimentConfig, steps: int) -> Contender:
    """Builds cached sampling of one character at position L, with a cache just long enough."""
    chunks = max(2, steps)
    model = build_model(experiment.model)
    prompt = _tokens(experiment, 1, experiment.data.context)
    variables = jax.jit(model.init)(jax.random.key(0), prompt[:, :2])

    def seconds() -> float:
        drawn = stream(
            model,
            variables,
            prompt,
            num_tokens=(1 + chunks) * CHUNK,
            key=jax.random.key(0),
            context=prompt.shape[1] + (1 + chunks) * CHUNK,
        )
        jax.block_until_ready(next(drawn))  # the prompt is read here
        began = time.perf_counter()
        jax.block_until_ready(list(drawn))
        return (time.perf_counter() - began) / (chunks * CHUNK)

    return Contender(name, seconds, params=sum(leaf.size for leaf in jax.tree.leaves(variables)))


MEASURES: dict[str, Callable[[str, ExperimentConfig, int], Contender]] = {
    "train": train_contender,
    "forward": forward_contender,
    "sample": sample_contender,
}
