"""What inspect says of a run before it starts, against what the run then does."""

import hashlib
import json
import math

import jax
import pytest
import small_runs
from flax.traverse_util import flatten_dict

from fsn_jax.hub import build_model
from train import inspect
from train.data.windows import WindowOrder, host_batches
from train.errors import UserError
from train.flags import parse_config

CONFIG = """from pathlib import Path

import small_runs


def get_config(placement="resident"):
    here = Path(__file__).parent
    return small_runs.tiny_config(here / "corpus", here / "run", data__placement=placement)
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspected")
    small_runs.write_corpus(folder / "corpus")
    (folder / "config.py").write_text(CONFIG, encoding="utf-8")
    return folder


def seen(here, capsys, *options, arm="resident"):
    inspect.program(["inspect", f"--config={here / 'config.py'}:{arm}", "--json", *options])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("placement", ["resident", "host"])
def test_the_first_batch_is_the_one_that_training_reads(here, capsys, placement):
    found = seen(here, capsys, "--no_compile", arm=placement)["batch"]
    experiment = parse_config(["", f"--config={here / 'config.py'}"])
    text = small_runs.text_of(4000)
    tokens = bytes(small_runs.ALPHABET.index(byte) for byte in text)
    tokens = jax.numpy.frombuffer(tokens, jax.numpy.uint8)
    order = WindowOrder(len(text), small_runs.CONTEXT, small_runs.BATCH, experiment.seed)
    (batch,) = host_batches(jax.device_get(tokens), order, start_step=0, num_steps=1)
    assert found["sha256"] == hashlib.sha256(batch.tobytes()).hexdigest()
    assert tuple(found["shape"]) == batch.shape
    start = found["start"]
    assert found["text"].encode() == text[start : start + len(found["text"])]
    assert found["rows_per_device"] * jax.device_count() == small_runs.BATCH
    assert found["sharding"] == "axis 1: data"


def test_the_parameters_are_the_models(here, capsys):
    found = seen(here, capsys, "--no_compile")
    experiment = parse_config(["", f"--config={here / 'config.py'}"])
    tokens = jax.numpy.zeros((1, 2), jax.numpy.int32)
    params = jax.eval_shape(build_model(experiment.model).init, jax.random.key(0), tokens)["params"]
    leaves = flatten_dict(params, sep="/")
    assert {p["path"]: tuple(p["shape"]) for p in found["parameters"]} == {
        name: leaf.shape for name, leaf in leaves.items()
    }
    total = sum(leaf.size for leaf in leaves.values())
    assert found["num_params"] == total == sum(group["size"] for group in found["groups"])
    assert found["memory"]["parameters"] == 4 * total
    assert found["memory"]["scratch"] is None
    assert found["flops"]["step"] == pytest.approx(
        experiment.model.flops_per_token(small_runs.CONTEXT)
        * math.prod((small_runs.BATCH, small_runs.CONTEXT))
    )


def test_memory_is_that_of_the_compiled_step_and_no_run_is_begun(here, capsys):
    memory = seen(here, capsys)["memory"]
    inputs = memory["parameters"] + memory["optimizer"] + memory["data"]
    # The state is given back in its own place; beside it there are some scalars and their padding.
    assert 0 <= memory["total"] - inputs - memory["scratch"] - memory["code"] < 1000
    # A step cannot do without its logits.
    logits = small_runs.BATCH * small_runs.CONTEXT * len(small_runs.ALPHABET) * 4
    assert memory["scratch"] > logits / jax.device_count()
    assert not (here / "run").exists()


def test_sharded_parameters_are_listed_with_axis_and_size(here, capsys):
    whole = seen(here, capsys, "--no_compile")
    divided = seen(here, capsys, "--no_compile", "--config.training.layout=sharded")
    assert {p["sharding"] for p in whole["parameters"]} == {"replicated"}
    shares = {
        p["path"]: 8 if p["sharding"].endswith(": data") else 1 for p in divided["parameters"]
    }
    assert 8 in shares.values()
    sizes = sum(p["size"] // shares[p["path"]] for p in divided["parameters"])
    assert divided["memory"]["parameters"] == 4 * sizes < whole["memory"]["parameters"]


def test_the_text_says_the_same(here, capsys):
    found = seen(here, capsys, "--no_compile")
    inspect.program(["inspect", f"--config={here / 'config.py'}", "--no_compile"])
    page = capsys.readouterr().out
    for parameter in found["parameters"]:
        assert parameter["path"] in page
    for part in (
        f"{found['num_params']:,}",
        repr(found["batch"]["text"]),
        "was not compiled",
    ):
        assert part in page


def test_a_slice_that_cannot_be_described_is_refused(monkeypatch):
    def describe(**_):
        raise RuntimeError("no such slice")

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", describe)
    with pytest.raises(UserError, match="v5e:9x9 .*no such slice.*libtpu"):
        inspect.topology_mesh("v5e:9x9")
