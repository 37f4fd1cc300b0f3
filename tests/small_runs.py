"""Small corpora, models and runs that the tests of the training half share."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import numpy as np
from ml_collections import ConfigDict

from fsn_jax import FSNConfig, TransformerConfig
from fsn_jax.vocabulary import Vocabulary
from train import finish, loop, plan, step
from train.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    ExperimentConfig,
    OptimizerConfig,
    TrainingConfig,
    experiment,
)
from train.data.corpus import SPLITS, Corpus, SplitInfo, write_manifest
from train.files import file_sha256
from train.loop import Outcome
from train.mesh import data_mesh
from train.metrics import read_rows
from train.run import create_or_resume

ALPHABET = b"abcdefghijkl"
CONTEXT, BATCH = 16, 16

# Relative: float32 sums of some 10**4 terms in another order, over some steps of a small run.
SAME_LOSS = 2e-6

MAKERS = (
    (loop, "make_optimizer"),
    (loop, "abstract_state"),
    (loop, "make_evaluate_rows"),
    (plan, "make_train_steps"),
    (step, "make_init"),
)
"""What makes the programs of a run, and the module where the run finds it."""

ACCELERATOR: Any = SimpleNamespace(devices=np.array([SimpleNamespace(platform="tpu")]))
"""What the optimizer sees of a mesh with an accelerator."""

# Few parameters of few kinds: what is tested with them does not depend on the layers, and nearly
# all of its time goes to compiling them.
TINY_FSN = FSNConfig(
    vocab_size=len(ALPHABET),
    num_layers=1,
    num_phases=8,
    num_heads=2,
    heads_per_phase=1,
    score_angles=False,
    similarity_heads=0,
    kernel_angle=0.0,
    feedforward="none",
)
TINY_TRANSFORMER = TransformerConfig(
    vocab_size=len(ALPHABET), num_layers=1, width=8, num_heads=2, feedforward_width=8
)


def text_of(size: int, seed: int = 0, alphabet: bytes = ALPHABET) -> bytes:
    """Random letters that begin with all of the alphabet."""
    drawn = random.Random(seed).choices(alphabet, k=size)
    return (alphabet + bytes(drawn))[:size]


def write_corpus(
    folder: Path,
    *,
    train: bytes = text_of(4000),
    validation: bytes = text_of(300, 1),
    alphabet: bytes = ALPHABET,
) -> Corpus:
    """A prepared corpus, written out flat without tensorflow-datasets."""
    folder.mkdir(parents=True)
    texts = {"train": train, "validation": validation, "test": text_of(200, 2)}
    splits = {}
    for split in SPLITS:
        file = folder / f"{split}.bin"
        file.write_bytes(texts[split])
        splits[split] = SplitInfo(len(texts[split]), file_sha256(file))
    vocabulary = Vocabulary(np.frombuffer(alphabet, np.uint8))
    corpus = Corpus("text", folder, vocabulary, splits, "made up")
    write_manifest(corpus, source_sha256="0" * 64, rule="made up")
    return corpus


def tiny_config(
    corpus: Path, run_dir: Path, model: FSNConfig | TransformerConfig = TINY_FSN, **changes: Any
) -> ConfigDict:
    """30 steps, a row, an evaluation and a save every 10; changes as `training__num_steps=20`."""
    config = experiment(
        "tiny",
        model=model,
        data=DataConfig(name="text", path=str(corpus), context=CONTEXT),
        optimizer=OptimizerConfig(warmup_steps=3),
        training=TrainingConfig(batch_size=BATCH, num_steps=30, steps_per_dispatch=5, log_every=10),
        evaluation=EvaluationConfig(every=10, batch_size=8),
        checkpoints=CheckpointConfig(every=10),
    )
    config.run_dir = str(run_dir)
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return config


def tiny_experiment(corpus: Path, run_dir: Path, **changes: Any) -> ExperimentConfig:
    return ExperimentConfig.from_config_dict(tiny_config(corpus, run_dir, **changes))


def run_to_the_end(experiment: ExperimentConfig, corpus: Corpus) -> Outcome:
    """What `python -m train` does between its checks and the summary."""
    with create_or_resume(experiment, corpus) as run:
        return loop.train(experiment, corpus, run, show_progress=False)


def finish_arms(base: Path) -> dict[str, Path]:
    """Train and finish an FSN with two seeds and a transformer; their folders by name.

    Their samples are made up: to compile what draws them would take most of the time. The settings
    are those of other tests, so that the rest is compiled once a session.
    """
    corpus = write_corpus(base / "corpus")
    runs: dict[str, dict[str, Any]] = {
        "fsn": {},
        "fsn_seed1": {"seed": 1},
        "transformer": {"model": TINY_TRANSFORMER},
    }
    for name, changes in runs.items():
        config = tiny_experiment(corpus.folder, base / name, name=name, **changes)
        with create_or_resume(config, corpus) as run:
            outcome = loop.train(config, corpus, run, show_progress=False)
            with mock.patch.object(finish, "_sample", return_value=b"abcabc <b>&amp;</b>"):
                finish.finish(config, corpus, run, outcome)
    return {name: base / name for name in runs}


def write_record(
    results: Path,
    arm: str,
    *,
    seed: int = 0,
    curve: Sequence[float] = (3.0, 2.0),
    whole: float | None = None,
    sample: str = "abc",
    commits: Sequence[str] = ("c0ffee",),
    **facts: Any,
) -> Path:
    """A made-up record with the evaluations of `curve`; facts replace those of its summary.

    It was started once at each of `commits`.
    """
    known = {"parameters": 1000, "characters": 10**6, "sha256": "da7a", "context": 8, "stride": 8}
    known["bytes"] = 99
    fact = {**known, **facts}
    assert fact.keys() == known.keys()
    folder = results / (f"{arm}_seed{seed}" if seed else arm)
    folder.mkdir(parents=True)
    architecture = "transformer" if "transformer" in arm else "fsn"
    files: dict[str, Any] = {
        "config.json": {
            "name": folder.name,
            "seed": seed,
            "model": {"architecture": architecture, "width": len(arm), "score_scope": "all"},
            "data": {"name": "enwik8", "context": fact["context"]},
        },
        "summary.json": {
            "steps": len(curve),
            "parameters": fact["parameters"],
            "characters": fact["characters"],
            "training_flops": 6.0 * fact["parameters"] * fact["characters"],
            "seconds": 10.0,
            "characters_per_second": fact["characters"] // 10,
            "data_sha256": fact["sha256"],
            "validation": {
                "bpc": curve[-1], **{name: fact[name] for name in ("bytes", "stride", "context")},
            },
        },
        "provenance.json": [
            {
                "command": ["python", "-m", "train"],
                "git": {"commit": commit, "modified": False},
                "packages": {"jax": "1.0"},
                "device": "1 x abacus",
                "data": {"name": "enwik8", "sha256": fact["sha256"]},
            }
            for commit in commits
        ],
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    (folder / "sample.txt").write_text(sample, encoding="utf-8")
    every = fact["characters"] // len(curve)
    rows = [
        {"kind": kind, "step": i + 1, "characters": every * (i + 1), "bpc": bpc}
        for i, bpc in enumerate(curve)
        for kind in ("train", "validation")
    ]
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    timing = [{"step": i + 1, "seconds": 5.0 + seed} for i in range(len(curve))]
    (folder / "timing.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in timing), encoding="utf-8"
    )
    if whole is not None:
        write_evaluation(folder, "evaluations.jsonl", whole)
    return folder


def write_evaluation(folder: Path, name: str, bpc: float, **other: Any) -> None:
    """Adds a made-up evaluation of the last checkpoint of a record; facts replace those of it."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    row = {
        "step": summary["steps"],
        "bpc": bpc,
        "context": summary["validation"]["context"],
        "stride": summary["validation"]["stride"],
        "data_sha256": summary["data_sha256"],
    }
    with (folder / name).open("a", encoding="utf-8") as log:
        log.write(json.dumps({**row, **other}) + "\n")


def rows_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The rows of one kind in a run's exact log."""
    return [row for row in read_rows(folder / "metrics.jsonl") if row["kind"] == kind]


def mesh_of(num_devices: int) -> jax.sharding.Mesh:
    return data_mesh(jax.devices()[:num_devices])


def assert_equal_trees(one: Any, other: Any) -> None:
    """The same structure and the same bits (NaN equals NaN)."""
    flat, structure = jax.tree_util.tree_flatten_with_path(one)
    assert structure == jax.tree_util.tree_structure(other)
    for (path, x), y in zip(flat, jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), jax.tree_util.keystr(path))


def largest_difference(one: Any, other: Any) -> float:
    return max(
        float(np.abs(np.asarray(x, np.float64) - np.asarray(y, np.float64)).max())
        for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )
