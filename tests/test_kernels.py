"""The fused kernels, interpreted: against a float64 softmax, forward and backward; and lowered."""

import functools

import cases
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from fsn_jax import FrustratedAttention, kernels
from fsn_jax.causal import causal_sum
from fsn_jax.kernels import gpu, tpu

KERNELS = {"gpu": gpu, "tpu": tpu}
SMALL_BLOCK = 16
# float32 sums over at most 50 terms in another order; bfloat16 has 8 bits of mantissa, and here
# both the weights and the gradients by the scores are rounded to it on their way.
TOLERANCE = {"float32": {"rtol": 1e-4, "atol": 1e-4}, "bfloat16": {"rtol": 0.1, "atol": 0.15}}


@pytest.fixture(params=KERNELS)
def kernel(request, monkeypatch):
    """Runs one of the kernels in JAX, with small blocks."""
    chosen = KERNELS[request.param]
    monkeypatch.setattr(chosen, "BLOCK", SMALL_BLOCK)
    monkeypatch.setattr(kernels, "_by_platform", lambda run, _, *arrays: run(chosen, True, *arrays))


def exact(query, key, value, d_total, d_self, include_self):
    """Sum, self weights and all gradients in float64, from the definition of the softmax."""
    length = query.shape[2]
    scores = np.where(np.tri(length, dtype=bool), query @ key.swapaxes(2, 3), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    own = np.eye(length, dtype=bool)
    summed = weights if include_self else np.where(own, 0, weights)
    d_summed = d_total @ value.swapaxes(2, 3)
    d_weights = (d_summed if include_self else np.where(own, 0, d_summed)) + own * d_self[..., None]
    d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True))
    gradients = d_scores @ key, d_scores.swapaxes(2, 3) @ query, summed.swapaxes(2, 3) @ d_total
    return (summed @ value, np.diagonal(weights, axis1=2, axis2=3)), gradients


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(
    ("heads", "length", "score_width", "value_width", "dtype", "include_self"),
    [
        (3, 37, 6, 10, "float32", False),  # neither L nor a width is what a kernel would like
        (1, 16, 16, 16, "float32", True),  # exactly one block
        (1, 5, 0, 2, "float32", False),  # no score at all; less than a block
        (2, 50, 16, 132, "float32", False),  # wide values, whose blocks are smaller on a GPU
        (2, 33, 6, 20, "bfloat16", True),
    ],
)
def test_against_float64(heads, length, score_width, value_width, dtype, include_self):
    rng = np.random.default_rng(length)
    leading = (2, heads, length)
    arrays = [
        jnp.asarray(rng.normal(size=(*leading, w)), dtype)
        for w in (score_width, score_width, value_width)
    ]
    d_total, d_self = rng.normal(size=(*leading, value_width)), rng.normal(size=leading)

    def weighted(*arrays):
        result = causal_sum(*arrays, include_self=include_self, implementation="pallas")
        total = jnp.sum(result.total * d_total.astype(np.float32))
        return total + jnp.sum(result.self_weight * d_self.astype(np.float32)), result

    differentiated = jax.value_and_grad(weighted, argnums=(0, 1, 2), has_aux=True)
    (_, result), gradients = cases.quick_jit(differentiated)(*arrays)
    as_float64 = [np.asarray(x, np.float64) for x in arrays]
    expected = exact(*as_float64, d_total, d_self, include_self)
    for a, b in zip(jax.tree.leaves((result, gradients)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), b, **TOLERANCE[dtype])
    assert [g.dtype for g in gradients] == [x.dtype for x in arrays]


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(
    "switches",
    [
        {"num_harmonics": 5, "num_heads": 1},
        {"num_harmonics": 1, "num_heads": 3, "heads_per_phase": 3},
        {"score": "none"},
    ],
    ids=["five_harmonics_one_head", "one_harmonic_all_heads", "no_score"],
)
def test_layer_against_oracle(switches):
    """The layer with the kernel in it, and its gradients by every parameter and the phases."""
    theta = cases.angles(1, 19, 6)
    config = cases.fsn_config(
        **{"num_phases": 6, "num_heads": 2, "implementation": "pallas", **switches}
    )
    layer = FrustratedAttention(config)
    variables = cases.random_variables(layer, theta)
    weights = cases.angles(*theta.shape, seed=5)

    def library(inputs):
        update = layer.apply({"params": inputs["params"]}, inputs["theta"])
        return (weights * update).sum(), update

    def truth(inputs):
        update = oracle.frustrated_attention(inputs["params"], inputs["theta"], config)
        return float((oracle.as_float64(weights) * update).sum())

    at = {"params": variables["params"], "theta": theta}
    gradients, update = cases.quick_jit(jax.grad(library, has_aux=True))(at)
    expected = oracle.frustrated_attention(
        oracle.as_float64(at["params"]), oracle.as_float64(theta), config
    )
    np.testing.assert_allclose(update, expected, rtol=1e-5, atol=1e-5)
    cases.check_gradients(gradients, truth, oracle.as_float64(at))


@pytest.mark.parametrize(
    ("platform", "call"), [("tpu", "tpu_custom_call"), ("cuda", "__gpu$xla.gpu.triton")]
)
@pytest.mark.parametrize(
    ("length", "score_width", "value_width", "dtype"),
    [
        (192, 16, 128, "float32"),  # configs/enwik8.py:fsn_pocket
        (200, 28, 224, "bfloat16"),  # configs/enwik8.py:fsn_1m, odd length
        (64, 0, 16, "float32"),
    ],
)
def test_lowers(platform, call, length, score_width, value_width, dtype):
    """One kernel forward and two backward, for a platform that this machine need not have."""
    widths = (score_width, score_width, value_width)
    shapes = [jax.ShapeDtypeStruct((2, 4, length, w), dtype) for w in widths]

    def loss(*arrays):
        return causal_sum(*arrays, include_self=False, implementation="pallas").total.sum()

    exported = jax.export.export(
        jax.jit(jax.grad(loss, argnums=(0, 1, 2))),
        platforms=[platform],
        disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(call)],
    )(*shapes)
    assert exported.mlir_module().count(f"@{call}(") == 3


def test_a_kernel_that_fails_is_reported_and_not_used(monkeypatch):
    """As on a GPU whose compiler refuses it, or where it computes something else."""
    kernels.works.cache_clear()

    def refuses(*_, **__):
        raise NotImplementedError("no such tile")

    monkeypatch.setattr(kernels, "forward", refuses)
    with pytest.warns(UserWarning, match="fused kernel is not used.*no such tile"):
        assert not kernels.works(16, 2, 4, "float32")

    kernels.works.cache_clear()
    wrong = functools.partial(kernels.backward)
    monkeypatch.undo()
    monkeypatch.setattr(kernels, "backward", lambda *a, **_: tuple(2 * g for g in wrong(*a)))
    with pytest.warns(UserWarning, match="fused kernel is not used.*a gradient is off"):
        assert not kernels.works(16, 2, 4, "float32")

    kernels.works.cache_clear()
    monkeypatch.undo()
    assert kernels.works(16, 2, 4, "float32")
    kernels.works.cache_clear()


SHAPE = jax.ShapeDtypeStruct((8, 2, 16, 4), jnp.float32)


def auto(x):
    return causal_sum(x, x, x, include_self=False).total


@pytest.fixture
def accelerator(monkeypatch):
    """A machine that says it has a GPU whose kernels work."""
    monkeypatch.setattr(kernels, "works", lambda *_: True)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize(
    ("platform", "call"), [("tpu", "tpu_custom_call"), ("cuda", "__gpu$xla.gpu.triton")]
)
def test_auto_keeps_the_kernel_out_of_a_program_that_the_compiler_divides(platform, call):
    """A batch over eight devices: by ``jax.jit`` in blocks, by ``shard_map`` with the kernel."""
    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    by_data = jax.sharding.NamedSharding(mesh, spec)
    divided = jax.jit(auto, in_shardings=by_data)
    mapped = jax.jit(jax.shard_map(auto, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    for program, count in ((divided, 0), (mapped, 1)):
        exported = jax.export.export(
            program,
            platforms=[platform],
            disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(call)],
        )(SHAPE)
        assert exported.mlir_module().count(f"@{call}(") == count


@pytest.mark.usefixtures("accelerator")
def test_auto_never_interprets(monkeypatch):
    """A program placed on, or exported for, the CPU of a machine with a GPU runs in blocks."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    x = cases.angles(8, 2, 16, 4)
    gradients = jax.jit(jax.grad(lambda x: jnp.sin(auto(x)).sum()))
    by_blocks = jax.jit(
        jax.grad(
            lambda x: jnp.sin(
                causal_sum(x, x, x, include_self=False, implementation="xla").total
            ).sum()
        )
    )
    # A function of its own: what another test has traced of `auto` is remembered.
    assert "pallas_call" in str(jax.make_jaxpr(lambda x: auto(x))(SHAPE))
    np.testing.assert_array_equal(gradients(x), by_blocks(x))
    hlo = jax.export.export(gradients, platforms=["cpu"])(SHAPE).mlir_module()
    interpreted = jax.export.export(
        jax.jit(lambda x: causal_sum(x, x, x, include_self=False, implementation="pallas").total),
        platforms=["cpu"],
    )(SHAPE).mlir_module()
    loop = "stablehlo.while"  # over the tiles of a grid; sixteen tokens are one block
    assert loop in interpreted and loop not in hlo


def test_auto_takes_the_kernel_where_it_works(monkeypatch):
    """On a GPU or TPU, asked for the sizes at hand; a CPU keeps the blocks."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    asked = []
    shape = jax.ShapeDtypeStruct((1, 2, 16, 4), jnp.float32)

    def program():
        return str(jax.make_jaxpr(lambda x: causal_sum(x, x, x, include_self=False))(shape))

    def works(*sizes):
        asked.append(sizes)
        return answer

    monkeypatch.setattr(kernels, "works", works)
    assert "pallas_call" not in program()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    answer = True
    assert "pallas_call" in program()
    answer = False
    assert "pallas_call" not in program()
    assert asked == [(16, 4, 4, "float32")] * 2
