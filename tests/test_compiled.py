"""Invariants of the programs that accelerators would run, by their own compilers.

Skipped without them: ``pip install --no-deps -r benchmarks/requirements-compiled.txt``.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys

import cases
import jax
import pytest

from benchmarks import hlo
from benchmarks.compiled import as_table, program
from fsn_jax import FSN, Transformer
from train.errors import UserError
from train.program import run_program

compilers = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("libtpu", "jax_cuda12_plugin"))),
    reason="needs benchmarks/requirements-compiled.txt",
)


def rows(folder, *flags):
    output = folder / "compiled.jsonl"
    command = [sys.executable, "-m", "benchmarks.compiled", f"--output={output}", *flags]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def test_a_table_of_no_rows_is_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl has no rows"):
        program(["compiled", "--table", f"--output={tmp_path}/none.jsonl"])


def test_no_accelerator_of_this_machine_is_asked():
    code = "from benchmarks.machines import *; prepare(None); print(jax.config.jax_platforms)"
    environment = {**os.environ, "JAX_PLATFORMS": "cuda,cpu"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert done.stdout == "cpu\n"


@compilers
@pytest.mark.slow
@pytest.mark.parametrize("machine", ["v5e:2x4", "v6e:2x4", "h100"])
def test_the_step_that_auto_takes(tmp_path, machine):
    """It has the fused kernels, and beside one all-reduce no collective."""
    (row,) = rows(
        tmp_path,
        f"--machines={machine}",
        "--arms=fsn_1m",
        "--dtypes=bfloat16",
        "--implementations=auto",
        "--layers=1",
    )
    of_a_layer = {"h100": 4}.get(machine, 2)
    assert row["fused_kernels"] == of_a_layer
    assert row["collectives"] == ({} if row["devices"] == 1 else {"all-reduce": 1})


@compilers
@pytest.mark.slow
@pytest.mark.parametrize(
    ("measure", "arms", "more"),
    [
        ("sum", "transformer_1m", set()),
        ("coupling", "fsn_1m,projected_1m", {"fsn_backward_phase"}),
    ],
)
def test_gpu_kernels_keep_to_the_registers(tmp_path, measure, arms, more):
    found = rows(
        tmp_path,
        f"--measure={measure}",
        "--machines=a100,h100",
        f"--arms={arms}",
        "--dtypes=float32,bfloat16",
        "--implementations=pallas",
    )
    assert len(found) == 4 * len(arms.split(","))
    expected = {"fsn_forward", "fsn_backward_query", "fsn_backward_key"} | more
    for row in found:
        assert {kernel["kernel"] for kernel in row["fused"]} == expected
        assert not any(k["spill_stores"] + k["spill_loads"] for k in row["fused"]), row


@compilers
@pytest.mark.slow
def test_cycles_of_the_tpu_kernel(tmp_path):
    """A length of one block and one of two: at least three tiles' work for the longer."""
    found = rows(
        tmp_path,
        "--measure=sum",
        "--machines=v5e:2x2",
        "--arms=projected_1m",
        "--dtypes=float32",
        "--implementations=pallas",
        "--lengths=512,1024",
    )
    short, long = (sum(row["kernel_cycles"].values()) for row in found)
    assert 1_000 < short < 5_500
    assert 3 * short < long < 18_000


STEP = """HloModule jit_steps

%fused_computation (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %n = f32[8]{0} negate(%p)
}

%body (arg: (f32[8], f32[4,2])) -> (f32[8], f32[4,2]) {
  %arg = (f32[8]{0}, f32[4,2]{1,0}) parameter(0)
  %a = f32[8]{0} get-tuple-element(%arg), index=0
  %f = f32[8]{0} fusion(%a), kind=kLoop, calls=%fused_computation, \
metadata={op_name="jit(steps)/FSN/block_0/attention/score/mul"}, \
backend_config={"estimated_cycles":"70"}
  %r = (f32[8]{0}, f32[4,2]{1,0}) all-reduce-start(%f), metadata={op_name="shard_map/psum"}
  %m = bf16[8]{0} fusion(%f), kind=kLoop, calls=%fused_computation, \
metadata={op_name="jit(steps)/mul"}, backend_config={"estimated_cycles":"5"}
  ROOT %t = (f32[8], f32[4,2]) tuple(%f, %m)
}

ENTRY %main (state: f32[1]) -> f32[1] {
  %state = f32[1]{0} parameter(0)
PACKING
}
""".replace("\\\n", "").replace(
    "PACKING", "\n".join(f"  %c{i} = f32[1]{{0}} copy(%state)" for i in range(9))
)


@pytest.mark.parametrize("kind", ["fsn", "transformer"])
def test_operations_of_a_model_are_of_its_parts(kind):
    """By the names that the operations of a real program have."""
    model = {
        "fsn": lambda: FSN(cases.fsn_config(num_layers=1)),
        "transformer": lambda: Transformer(cases.transformer_config(num_layers=1)),
    }[kind]()
    tokens = cases.tokens(1, 6)
    variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
    gradient = jax.jit(jax.grad(lambda variables: model.apply(variables, tokens).sum()))
    text = gradient.lower(variables).as_text(debug_info=True)
    parts: dict[str, set[str]] = {}
    for name in re.findall(r'loc\("(jit[^"]*/[^"]*)"', text):
        parts.setdefault(hlo.part_of(name), set()).add(name)
    for part, module in (
        ("sum", "/causal_sum/"),
        ("scores", "/score/" if kind == "fsn" else "attention._project/query/"),
        ("coupling", "/attention"),
        ("feed-forward", "/feedforward/"),
        ("readout", ".read_out/"),
        ("model, other", "/block_0/" if kind == "fsn" else "/attention_norm/"),
    ):
        assert any(module in name for name in parts[part]), part
        if part not in ("coupling", "model, other"):
            for other in parts.keys() - {part}:
                assert not any(module in name for name in parts[other]), (part, other)


def test_what_is_read_from_a_program():
    step = hlo.step_instructions(STEP)
    assert hlo.cycles_by_part(step) == {
        "scores": 70,
        hlo.OPTIMIZER: 5,
        "model, other": 0,
        hlo.UNNAMED: 0,
    }
    assert hlo.bytes_by_part(step) == {"scores": 64, hlo.OPTIMIZER: 48}
    assert hlo.collectives(STEP) == {"all-reduce": 1}


def test_a_step_reads_of_its_corpus_what_it_gathers_and_all_of_anything_else():
    def compiled(operand):
        return f"""HloModule jit_sum

ENTRY %main (p: {operand}) -> u8[8] {{
  %p = {operand}{{0}} parameter(0)
  ROOT %g = u8[8]{{0}} fusion(%p), kind=kLoop
}}
"""

    activations = hlo.step_instructions(compiled("f32[30000000]"))
    assert hlo.bytes_by_part(activations) == {hlo.UNNAMED: 120_000_008}
    corpus = hlo.step_instructions(compiled(f"u8[{hlo.CORPUS_BYTES}]"))
    assert hlo.bytes_by_part(corpus) == {hlo.UNNAMED: 16}


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--lengths=many", "error: --lengths takes whole numbers"),
        ("--output=/", "error: cannot write / (Is a directory)"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_compiled(option, says, capsys):
    assert run_program(program, ["compiled", option]) == 2
    error = capsys.readouterr().err
    assert error.startswith(says) and error.count("\n") == 1


def test_the_table_adds_the_kernels_of_a_step():
    same = {"machine": "v5e:2x4", "arm": "a", "dtype": "float32", "length": 512, "config": "c"}
    common = {"implementation": "pallas", "collectives": {}, "compile_seconds": 1.0}
    step = same | common | {"measure": "step", "xla_cycles": 1000, "fused_kernels": 2, "sums": 3.0}
    alone = step | {"measure": "sum", "xla_cycles": 7, "sums": 1.0}
    alone["kernel_cycles"] = {"fsn_forward": 10, "fsn_backward": 20}
    assert "| 1,090 |" in as_table([step, alone]).splitlines()[2]
    coupling = alone | {"measure": "coupling", "kernel_cycles": {"fsn_forward": 100}}
    lines = as_table([coupling, alone, step]).splitlines()
    assert "| 1,300 |" in lines[2] and "| 107 |" in lines[3] and "| 37 |" in lines[4]
    assert "| 1,090 |" not in as_table([step])
