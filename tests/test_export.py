"""The training computation lowers for accelerators that this machine need not have."""

import cases
import jax
import jax.export
import jax.numpy as jnp
import pytest

from fsn_jax import FSN, Transformer

MODELS = {
    "fsn": lambda dtype: FSN(cases.fsn_config(dtype=dtype)),
    "fsn_modes": lambda dtype: FSN(
        cases.fsn_config(
            dtype=dtype, score="content_gated", feedforward="collective_modes", remat=True
        )
    ),
    "transformer": lambda dtype: Transformer(cases.transformer_config(dtype=dtype)),
}


def gradient(model):
    def loss(params, tokens):
        log_probability = jax.nn.log_softmax(model.apply({"params": params}, tokens)[:, :-1])
        return -jnp.take_along_axis(log_probability, tokens[:, 1:, None], axis=-1).mean()

    return jax.jit(jax.value_and_grad(loss))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("dtype", "platform"), [("float32", "tpu"), ("bfloat16", "cuda")])
def test_forward_and_backward_lower(dtype, platform, name):
    tokens = cases.tokens(2, 8)
    model = MODELS[name](dtype)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    exported = jax.export.export(gradient(model), platforms=[platform])(params, tokens)
    assert exported.platforms == (platform,)
    results = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    assert jax.tree.map(lambda x: x.shape, results[1]) == jax.tree.map(lambda x: x.shape, params)
    assert "stablehlo.dot_general" in exported.mlir_module()
