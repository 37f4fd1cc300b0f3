"""The fused kernels, interpreted: against a float64 softmax, forward and backward; and lowered."""

import subprocess
import sys

import cases
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from fsn_jax import FrustratedAttention, kernels
from fsn_jax.causal import causal_sum
from fsn_jax.coupling_sum import coupled_field
from fsn_jax.kernels import choice, gpu, gpu_coupling, gpu_tiles, tpu, tpu_coupling, tpu_tiles
from fsn_jax.torus import Complex, phasor

KERNELS = {"gpu": (gpu, gpu_coupling), "tpu": (tpu, tpu_coupling)}
# float32 sums over at most 100 terms in another order; bfloat16 has 8 bits of mantissa, and here
# both the weights and the cotangents of the scores are rounded to it on their way.
TOLERANCE = {"float32": {"rtol": 1e-4, "atol": 1e-4}, "bfloat16": {"rtol": 0.1, "atol": 0.15}}


@pytest.fixture(params=KERNELS)
def kernel(request, monkeypatch):
    """Runs the kernels of a platform in JAX, with small blocks."""
    of_sum, of_coupling = KERNELS[request.param]
    narrow = {2: gpu.Tile(16, 16), 4: gpu.Tile(32, 16)}
    monkeypatch.setattr(gpu, "TILES", {128: narrow, 1 << 30: {4: gpu.Tile(16, 16)}})
    monkeypatch.setitem(gpu_coupling.SUMS, 4, gpu_coupling.Cut(gpu.Tile(32, 16), 16))
    monkeypatch.setitem(gpu_coupling.SCORES, 4, gpu_coupling.Cut(gpu.Tile(16, 16), 16))
    monkeypatch.setattr(tpu_tiles, "LANES", 8)
    monkeypatch.setattr(tpu_tiles, "MAX_BLOCK", 32)

    def interpreted(name, implementation, compiled, modules, *arrays):
        if implementation == "xla":
            return compiled(*arrays)
        chosen = of_sum if modules is kernels.PLATFORMS else of_coupling
        return getattr(chosen, name)(*arrays, interpret=True)

    monkeypatch.setattr(kernels, "_by_platform", interpreted)


def described(platform, sizes=(), names=()):
    """A mesh of devices that are not there: since JAX 0.12 Pallas asks which GPU it lowers for."""
    gpu = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda")
    kinds = (jax.sharding.AxisType.Auto,) * len(sizes)
    return AbstractMesh(sizes, names, kinds, abstract_device=gpu if platform == "cuda" else None)


def exact(query, key, value, ids, d_total, d_self, include_self):
    """Sum, self weights and all gradients in float64, from the definition of the softmax."""
    length = query.shape[2]
    alike = ids[:, None, :, None] == ids[:, None, None]
    scores = np.where(np.tri(length, dtype=bool) & alike, query @ key.swapaxes(2, 3), -np.inf)
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
    ("heads", "length", "score_width", "value_width", "dtype", "include_self", "segments"),
    [
        (3, 37, 6, 10, "float32", False, 1),  # neither L nor a width is what a kernel would like
        (1, 16, 16, 16, "float32", True, 1),  # exactly one block
        (1, 5, 0, 2, "float32", False, 1),  # no score at all; less than a block
        (2, 50, 28, 132, "float32", False, 3),  # wide values, packed segments
        (1, 96, 4, 5, "float32", True, 4),  # three blocks on a TPU, six on a GPU
        (2, 33, 6, 20, "bfloat16", True, 2),
    ],
)
def test_against_float64(heads, length, score_width, value_width, dtype, include_self, segments):
    rng = np.random.default_rng(length)
    leading = (2, heads, length)
    arrays = [
        jnp.asarray(rng.normal(size=(*leading, w)), dtype)
        for w in (score_width, score_width, value_width)
    ]
    d_total, d_self = rng.normal(size=(*leading, value_width)), rng.normal(size=leading)
    ids = np.sort(rng.integers(segments, size=(2, length)), axis=1).astype(np.int32)
    segment_ids = jnp.asarray(ids) if segments > 1 else None

    def weighted(*arrays):
        result = causal_sum(
            *arrays, segment_ids, include_self=include_self, implementation="pallas"
        )
        total = jnp.sum(result.total * d_total.astype(np.float32))
        return total + jnp.sum(result.self_weight * d_self.astype(np.float32)), result

    differentiated = jax.value_and_grad(weighted, argnums=(0, 1, 2), has_aux=True)
    (_, result), gradients = jax.jit(differentiated)(*arrays)
    as_float64 = [np.asarray(x, np.float64) for x in arrays]
    expected = exact(*as_float64, ids, d_total, d_self, include_self)
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
    layer = cases.layer(FrustratedAttention, config)
    variables = cases.random_variables(layer, theta)
    weights = cases.angles(*theta.shape, seed=5)

    def library(inputs):
        update = layer.apply({"params": inputs["params"]}, inputs["theta"])
        return (weights * update).sum(), update

    def truth(inputs):
        update = oracle.frustrated_attention(inputs["params"], inputs["theta"], config)
        return float((oracle.as_float64(weights) * update).sum())

    at = {"params": variables["params"], "theta": theta}
    gradients, update = jax.jit(jax.grad(library, has_aux=True))(at)
    expected = oracle.frustrated_attention(
        oracle.as_float64(at["params"]), oracle.as_float64(theta), config
    )
    np.testing.assert_allclose(update, expected, rtol=1e-5, atol=1e-5)
    cases.check_gradients(gradients, truth, oracle.as_float64(at))


@pytest.fixture
def small_tiles(kernel, monkeypatch):
    """Tiles of a TPU with eight or sixteen queries."""
    monkeypatch.setattr(tpu_tiles, "MAX_BLOCK", 16)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("switches", "length", "num_segments"),
    [
        # The published form; three blocks of eight, the last one padded.
        ({"num_heads": 2, "heads_per_phase": 2, "score_scope": "block"}, 21, 1),
        ({"num_heads": 2, "num_harmonics": 1, "score_scope": "all"}, 21, 3),
        ({"num_heads": 3, "heads_per_phase": 2, "num_harmonics": 3, "delay": False}, 8, 2),
        ({"num_heads": 2, "num_harmonics": 2}, 1, 1),
        # On a GPU two tiles of phases, the second one padded, and half a block of tokens.
        ({"num_heads": 2, "heads_per_phase": 2, "num_phases": 20}, 16, 1),
    ],
    ids=["all_heads", "segments", "no_delay", "one_token", "many_phases"],
)
def test_coupling_kernel_against_reference(switches, length, num_segments):
    """The field, all gradients of torque and coherence, and that none is of the future."""
    settings = {
        "num_phases": 12,
        "num_harmonics": 2,
        "heads_per_phase": 1,
        "score": "gated",
        **switches,
    }
    theta = cases.angles(2, length, settings["num_phases"])
    rng = np.random.default_rng(length)
    ids = np.sort(rng.integers(num_segments, size=(2, length)), axis=1).astype(np.int32)
    segment_ids = jnp.asarray(ids) if num_segments > 1 else None
    weights = rng.normal(size=(2, *theta.shape)).astype(np.float32)

    def differentiated(implementation):
        config = cases.fsn_config(**settings, implementation=implementation)
        layer = cases.layer(FrustratedAttention, config)

        def weighted(at, weights):
            field = layer.apply(*at, segment_ids=segment_ids, method="field")
            return sum(map(jnp.vdot, field, weights)), field

        variables = cases.random_variables(layer, theta)
        program = jax.jit(jax.grad(weighted, has_aux=True))
        return lambda weights: program((variables, theta), weights)

    fused = differentiated("pallas")
    found, expected = fused(weights), differentiated("reference")(weights)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    seen = length // 2
    (_, d_theta), _ = fused(weights * (np.arange(length) < seen)[:, None])
    assert seen == 0 or np.any(d_theta[:, :seen])
    np.testing.assert_array_equal(d_theta[:, seen:], 0)


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(("coupling", "segments"), [((2, 2, 1), True), (None, False)])
def test_the_measured_kernels_are_right_in_bfloat16(monkeypatch, coupling, segments):
    """The cotangents are those of the blocks; a warning, here an error, says if they are not."""
    monkeypatch.setattr(choice, "REPEATS", 1)
    sizes = choice.Sizes(1, 2, 17, 6, 4 * 5, "bfloat16", coupling, segments)
    assert choice.fastest(sizes) in ("xla", "pallas")


@pytest.mark.parametrize(
    ("platform", "call"), [("tpu", "tpu_custom_call"), ("cuda", "__gpu$xla.gpu.triton")]
)
@pytest.mark.parametrize(
    ("length", "score_width", "value_width", "dtype"),
    [
        (192, 16, 16, "float32"),  # configs/enwik8.py:transformer_pocket
        (200, 28, 28, "bfloat16"),  # configs/enwik8.py:transformer_1m, odd length
        (192, 128, 64, "float32"),  # scores wider than values
        (200, 28, 224, "bfloat16"),  # values wider than scores
        (64, 0, 16, "float32"),
    ],
)
def test_lowers(platform, call, length, score_width, value_width, dtype):
    """One kernel forward, one (TPU) or two backward, for a platform that is not there."""
    widths = (score_width, score_width, value_width)
    shapes = [jax.ShapeDtypeStruct((2, 4, length, w), dtype) for w in widths]

    def loss(*arrays):
        return causal_sum(*arrays, include_self=False, implementation="pallas").total.sum()

    with jax.sharding.use_abstract_mesh(described(platform)):
        exported = jax.export.export(
            jax.jit(jax.grad(loss, argnums=(0, 1, 2))),
            platforms=[platform],
            disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(call)],
        )(*shapes)
    assert exported.mlir_module().count(f"@{call}(") == {"tpu": 2, "cuda": 3}[platform]


def test_many_harmonics_leave_a_tile_of_phases():
    kappa = Complex(*2 * [jnp.zeros((2, 100, 1, 64))])
    for cuts in (gpu_coupling.SUMS, gpu_coupling.SCORES):
        assert {cut.phases(kappa) for cut in cuts.values()} == {gpu_tiles.PIECE}


def test_a_gpu_without_a_kernel_gets_the_blocks_and_interprets_nothing():
    x = jax.ShapeDtypeStruct((1, 2, 16, 4), "float32")

    def lowered(implementation):
        def total(*arrays):
            return causal_sum(*arrays, include_self=False, implementation=implementation).total

        return jax.jit(total).trace(x, x, x).lower(lowering_platforms=("rocm",)).as_text()

    assert lowered("pallas").count("stablehlo.while") == lowered("xla").count("stablehlo.while")


@pytest.mark.parametrize(
    ("platform", "calls", "dtype", "x64"),
    [
        ("tpu", 2, "bfloat16", False),
        ("tpu", 2, "float32", True),
        ("cuda", 4, "bfloat16", False),
    ],
)
def test_coupling_lowers(platform, calls, dtype, x64):
    """One kernel folds, sums and unfolds; one (TPU) or three differentiate."""
    config = cases.fsn_config(
        num_phases=24,
        num_heads=2,
        heads_per_phase=2,
        score="gated",
        dtype=dtype,
        implementation="pallas",
    )
    layer = cases.layer(FrustratedAttention, config)
    theta = jax.ShapeDtypeStruct((2, 200, 24), jnp.float32)
    variables = jax.eval_shape(layer.init, jax.random.key(0), theta)

    def loss(variables, theta):
        return jnp.sin(layer.apply(variables, theta)).sum()

    call = {"tpu": "tpu_custom_call", "cuda": "__gpu$xla.gpu.triton"}[platform]
    with jax.sharding.use_abstract_mesh(described(platform)), jax.enable_x64(x64):
        exported = jax.export.export(
            jax.jit(jax.grad(loss, argnums=(0, 1))),
            platforms=[platform],
            disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(call)],
        )(variables, theta)
    assert exported.mlir_module().count(f"@{call}(") == calls


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_a_layer_lowers_inside_shard_map(platform):
    """Parameters are the same on all devices, tokens and their segments are not."""
    layer = FrustratedAttention(num_heads=2, implementation="pallas")
    theta, segments = jax.ShapeDtypeStruct((8, 16, 8), "float32"), jnp.zeros((8, 16), jnp.int32)
    variables = jax.eval_shape(layer.init, jax.random.key(0), theta)

    def gradient(variables, theta, segments):
        def loss(variables, theta):
            return jnp.sin(layer.apply(variables, theta, segment_ids=segments)).sum()

        return jax.grad(loss, argnums=(0, 1))(variables, theta)

    whole, rows = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("data")
    mesh = described(platform, (8,), ("data",))
    specs = (whole, rows, rows)
    mapped = jax.shard_map(gradient, mesh=mesh, in_specs=specs, out_specs=(whole, rows))
    call = {"tpu": "tpu_custom_call", "cuda": "__gpu$xla.gpu.triton"}[platform]
    exported = jax.export.export(
        jax.jit(mapped),
        platforms=[platform],
        disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(call)],
    )(variables, theta, segments)
    assert exported.mlir_module().count(f"@{call}(") == {"tpu": 2, "cuda": 4}[platform]


SIZES = choice.Sizes(1, 2, 16, 2, 4, "float32")
COUPLING = choice.Sizes(1, 1, 16, 2, 4, "float32", coupling=(1, 1, 1))


@pytest.fixture(autouse=True)
def _nothing_remembered():
    choice.measured.cache_clear()
    yield
    choice.measured.cache_clear()


def test_a_kernel_that_fails_is_reported_and_not_used(monkeypatch):
    """As on a GPU whose compiler refuses it, or where it computes something else."""
    forward, backward = kernels.forward, kernels.backward

    def refuses(*arrays, implementation):
        if implementation == "pallas":
            raise NotImplementedError("no such tile")
        return forward(*arrays, implementation=implementation)

    monkeypatch.setattr(kernels, "forward", refuses)
    with pytest.warns(UserWarning, match="fused kernel is not used.*no such tile"):
        assert choice.fastest(SIZES) == "xla"

    def full(*arrays, implementation):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    choice.measured.cache_clear()
    monkeypatch.setattr(kernels, "forward", full)
    with pytest.warns(UserWarning, match="fused kernel is not used.*out of memory"):
        assert choice.fastest(SIZES) == "xla"

    def wrong(*arrays, implementation):
        factor = 2 if implementation == "pallas" else 1
        return tuple(factor * g for g in backward(*arrays, implementation=implementation))

    choice.measured.cache_clear()
    monkeypatch.undo()
    monkeypatch.setattr(kernels, "backward", wrong)
    with pytest.warns(UserWarning, match="fused kernel is not used.*a cotangent is off"):
        assert choice.fastest(SIZES) == "xla"

    def wrong_coupling(*arrays, implementation):
        factor = 2 if implementation == "pallas" else 1
        cotangents = coupling_backward(*arrays, implementation=implementation)
        return jax.tree.map(lambda d: factor * d, cotangents)

    monkeypatch.undo()
    coupling_backward = kernels.coupling_backward
    monkeypatch.setattr(kernels, "coupling_backward", wrong_coupling)
    with pytest.warns(UserWarning, match="fused kernel is not used.*a cotangent is off"):
        assert choice.fastest(COUPLING) == "xla"


def test_the_faster_of_the_two_is_chosen(monkeypatch):
    """By a clock that is told how long each takes, in the middle of tracing another program."""
    seconds = {"xla": 2.0, "pallas": 1.0}
    run = choice._run
    monkeypatch.setattr(choice, "_run", lambda name, *x: (seconds[name], run(name, *x)[1]))
    found = []
    jax.make_jaxpr(lambda x: found.append(choice.fastest(SIZES)) or x)(0.0)
    assert found == ["pallas"]
    choice.measured.cache_clear()
    seconds["pallas"] = 3.0
    assert choice.fastest(SIZES) == "xla"


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_it_is_measured_inside_of_meshes_and_shard_map(monkeypatch, kind):
    monkeypatch.setattr(choice, "REPEATS", 1)
    mesh, found = jax.make_mesh((8,), ("data",), (kind,)), []
    spec = jax.sharding.PartitionSpec("data")

    def measured(x):
        choice.measured.cache_clear()
        found.append(choice.fastest(SIZES))
        return x

    x = jax.device_put(np.zeros(8), jax.sharding.NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        jax.eval_shape(measured, x)
        jax.eval_shape(jax.shard_map(measured, in_specs=spec, out_specs=spec), x)
    assert len(found) == 2 and {*found} <= {"xla", "pallas"}


SHAPE = jax.ShapeDtypeStruct((8, 2, 16, 4), jnp.float32)


def auto(x):
    return causal_sum(x, x, x, include_self=False).total


@pytest.fixture
def accelerator(monkeypatch):
    """A machine that says it has a GPU whose kernels are the faster."""
    monkeypatch.setattr(choice, "fastest", lambda _: "pallas")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize(
    ("platform", "call"), [("tpu", "tpu_custom_call"), ("cuda", "__gpu$xla.gpu.triton")]
)
def test_auto_keeps_the_kernel_out_of_a_program_that_the_compiler_divides(
    monkeypatch, platform, call
):
    """A batch over eight devices: by ``jax.jit`` in blocks, by ``shard_map`` with the kernel."""
    (backend,) = (b for b, p in kernels.PLATFORM_OF_BACKEND.items() if p == platform)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    by_data = jax.sharding.NamedSharding(mesh, spec)
    divided = jax.jit(auto, in_shardings=by_data)
    there = described(platform, (8,), ("data",))
    mapped = jax.jit(
        jax.shard_map(auto, mesh=there, in_specs=spec, out_specs=spec, check_vma=False)
    )
    for program, count in ((divided, 0), (mapped, 1)):
        exported = jax.export.export(
            program,
            platforms=[platform],
            disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(call)],
        )(SHAPE)
        assert exported.mlir_module().count(f"@{call}(") == count


@pytest.mark.usefixtures("accelerator")
@pytest.mark.parametrize(
    ("axes", "chosen"), [({"data"}, "xla"), ({"data", "model"}, "auto")], ids=["some", "all"]
)
def test_auto_takes_the_kernel_only_where_shard_map_divides_over_all_axes(axes, chosen):
    """The compiler divides over the others, and cannot divide a kernel."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), (jax.sharding.AxisType.Auto,) * 2)
    spec, found = jax.sharding.PartitionSpec(), []

    def program(x):
        found.append(choice.of_auto(x, 4, segments=False))
        return x

    mapped = jax.shard_map(program, mesh=mesh, in_specs=spec, out_specs=spec, axis_names=axes)
    jax.eval_shape(jax.jit(mapped), SHAPE)
    assert found[-1] == chosen


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


@pytest.mark.usefixtures("accelerator")
def test_auto_keeps_the_blocks_where_the_batch_is_left_open(monkeypatch):
    """There is no size to measure at."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    chosen = []

    def program(x):
        chosen.append(choice.of_auto(x, 4, segments=False))
        return x

    for sizes in ("8, 2, 16, 4", "b, 2, 16, 4"):
        shape = jax.export.symbolic_shape(sizes)
        jax.eval_shape(program, jax.ShapeDtypeStruct(shape, jnp.float32))
    assert chosen == ["auto", "xla"]


def test_an_implementation_that_the_kernels_have_not_is_named():
    """It is not taken for an interpreted kernel."""
    z = phasor(cases.angles(1, 1, 4, 2))
    kappa = Complex(jnp.ones((1, 1, 1, 2)), jnp.zeros((1, 1, 1, 2)))
    with pytest.raises(ValueError, match="implementation must be 'auto', .*; got 'reference'"):
        coupled_field(z.re, z.im, z, kappa, implementation="reference")


def test_auto_takes_the_kernel_where_it_works(monkeypatch):
    """On a GPU or TPU, asked for the sizes at hand; a CPU keeps the blocks."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    asked = []
    shape = jax.ShapeDtypeStruct((1, 2, 16, 4), jnp.float32)

    def program():
        return str(jax.make_jaxpr(lambda x: causal_sum(x, x, x, include_self=False))(shape))

    def fastest(sizes):
        asked.append(sizes)
        return answer

    monkeypatch.setattr(choice, "fastest", fastest)
    assert "pallas_call" not in program()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    answer = "pallas"
    assert "pallas_call" in program()
    answer = "xla"
    assert "pallas_call" not in program()
    assert asked == [choice.Sizes(1, 2, 16, 4, 4, "float32")] * 2
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert "pallas_call" not in program()
    assert len(asked) == 2, "several processes might not measure the same"


@pytest.mark.parametrize(
    ("width", "sizes"),
    [(8, [16]), (96, [64, 32]), (112, [128]), (208, [128, 64, 16]), (448, [128, 128, 128, 64])],
)
def test_columns_in_pieces(width, sizes):
    assert [columns.size for columns in gpu_tiles.columns_of(width)] == sizes


def test_no_piece_of_columns_is_too_wide_or_mostly_padding():
    for width in range(1, 1100):
        pieces = gpu_tiles.columns_of(width)
        ends = [columns.start + columns.size for columns in pieces]
        assert [columns.start for columns in pieces] == [0, *ends[:-1]]
        last = pieces[-1]
        there = width - last.start
        assert 0 < there <= last.size
        assert last.size == gpu_tiles.PIECE or 6 * (last.size - there) <= there
        assert max(columns.size for columns in pieces) <= gpu_tiles.WIDE


def test_importing_the_package_imports_no_kernel():
    """Pallas' Triton backend is deprecated: whoever runs in blocks must not need it."""
    code = "import sys, fsn_jax; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    kernels_of_ours = {f"fsn_jax.kernels.{name}" for name in kernels.PLATFORMS.values()}
    assert not {"jax.experimental.pallas.triton", *kernels_of_ours} & {*done.stdout.split()}


def test_a_kernel_that_cannot_be_imported_is_left_out(monkeypatch):
    """As of the release of JAX that has no Triton backend: a TPU's program is not touched by it."""
    monkeypatch.setitem(sys.modules, "fsn_jax.kernels.gpu", None)
    shape = jax.ShapeDtypeStruct((1, 2, 16, 4), jnp.float32)
    call = "tpu_custom_call"
    exported = jax.export.export(
        jax.jit(lambda x: causal_sum(x, x, x, include_self=False, implementation="pallas").total),
        platforms=["tpu"],
        disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(call)],
    )(shape)
    assert f"@{call}(" in exported.mlir_module()
