"""What a user's type checker makes of the library (``py.typed``), in the strictest mode."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = """
import jax
import jax.numpy as jnp

import fsn_jax
from fsn_jax import (
    FSN, CollectiveModes, ConfigError, FrustratedAttention, FSNConfig, KuramotoAttention,
    PhasorSwiGLU,
    Transformer, TransformerConfig,
)
from fsn_jax.causal import causal_sum
from fsn_jax.coupling import coupling_function, coupling_update
from fsn_jax.generate import generate, likeliest, sample_token, stream
from fsn_jax.torus import order_parameter, phasor


def text(model: FSN | Transformer, params: dict[str, jax.Array], prompt: jax.Array) -> jax.Array:
    key = jax.random.key(0)
    for tokens in stream(model, {"params": params}, prompt, num_tokens=9, key=key, context=64):
        reveal_type(tokens)
    return generate(
        model, {"params": params}, prompt, num_tokens=9, key=key, context=64, top_k=5, stop=[[1, 2]]
    )


def sizes(config: FSNConfig | TransformerConfig) -> tuple[int, float]:
    return config.num_params(), config.flops_per_token(256)


config = FSNConfig(vocab_size=11, score="gated", num_phases=8)
theta = jnp.zeros((1, 4, 8))
kappa = jnp.ones((2, 1, 8), jnp.complex64)
weights = jnp.ones((1, 4, 4, 4)) / 4
reveal_type(config.num_delays)
reveal_type(coupling_update(theta, weights, kappa))
reveal_type(coupling_function(kappa))
reveal_type(phasor(theta).re)
reveal_type(order_parameter(theta))
reveal_type(causal_sum(weights, weights, weights, include_self=True).total)
reveal_type(likeliest(theta[0], top_k=2, top_p=0.5))
reveal_type(sample_token(theta[0], jax.random.key(0), temperature=1.0, top_k=0, top_p=1.0))
reveal_type(FrustratedAttention(num_heads=2).kappa())
modules = [KuramotoAttention(num_heads=2), CollectiveModes(num_modes=8), PhasorSwiGLU()]
name: str = fsn_jax.__version__
wrong = isinstance(ValueError(), ConfigError)
"""


@pytest.mark.slow
def test_a_strict_user_program_has_nothing_unknown(tmp_path):
    """No error, and no type that comes out as Any."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    done = subprocess.run(
        # Silent about the library itself, as it is when found among the installed packages.
        [
            sys.executable,
            "-m",
            "mypy",
            "--strict",
            "--follow-imports=silent",
            "--config-file=",
            str(program),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout
    revealed = [line for line in done.stdout.splitlines() if "Revealed type" in line]
    assert len(revealed) == PROGRAM.count("reveal_type(")
    assert [line for line in revealed if "Any" in line] == []


def test_every_public_name_is_used_in_the_program():
    import fsn_jax

    # Names of the code alone: as text, `FSN` is also a part of `FSNConfig`.
    nodes = [*ast.walk(ast.parse(PROGRAM))]
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    used |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    assert [name for name in fsn_jax.__all__ if name not in used] == []
