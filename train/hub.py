"""Writes a trained model in the layout of the Hugging Face hub; ``fsn_jax.hub`` reads it back.

::

    model.safetensors   the parameters, named by their path (block_0.attention.kernel_real)
    config.json         the model's config, vocabulary, context and provenance
    README.md           the model card
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict

import fsn_jax
from fsn_jax import FSNConfig, hub
from train.load import TrainedModel
from train.metrics import read_rows
from train.run_files import EVALUATIONS

CARD = "README.md"


def write_model(trained: TrainedModel, folder: Path, *, with_sampler: bool) -> None:
    """Writes the three files into an existing folder; the card says whether it has a sampler."""
    language_model = trained.language_model
    arrays = {
        name: np.ascontiguousarray(jax.device_get(leaf))
        for name, leaf in flatten_dict(trained.params, sep=".").items()
    }
    # save_file would leave the file to its owner alone, whatever the umask.
    (folder / hub.WEIGHTS).write_bytes(safetensors.numpy.save(arrays, {"format": "flax"}))
    architecture = type(trained.model).__name__
    config = {
        "architectures": [architecture],
        "model_type": trained.experiment.architecture,
        "library_name": "fsn_jax",
        "fsn_jax_version": fsn_jax.__version__,
        "format": hub.FORMAT,
        "model": dataclasses.asdict(trained.experiment.model),
        "context": language_model.context,
        "segments": trained.experiment.data.segments,
        "vocabulary": {
            "of": language_model.corpus_name,
            "unit": language_model.vocabulary.unit,
            "values": language_model.vocabulary.to_text(),
        },
        "run": {
            "name": trained.experiment.name,
            "step": trained.step,
            "seed": trained.experiment.seed,
            "data_sha256": trained.corpus.sha256,
        },
    }
    (folder / hub.CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / CARD).write_text(model_card(trained, with_sampler=with_sampler), encoding="utf-8")


def model_card(trained: TrainedModel, *, with_sampler: bool) -> str:
    """Returns the README of an exported model, with the metadata that the hub reads."""
    experiment, corpus = trained.experiment, trained.corpus
    rows = [
        row
        for row in read_rows(trained.run.path / EVALUATIONS)
        if row["step"] == trained.step and row["data_sha256"] == corpus.sha256
    ]
    metadata: dict[str, Any] = {
        "library_name": "fsn_jax",
        "pipeline_tag": "text-generation",
        "tags": ["jax", "flax", "character-level", experiment.architecture],
    }
    measured = "Not yet evaluated on the whole validation split: `python -m train evaluate RUN`."
    if rows:
        metadata["model-index"] = [_model_index(experiment.name, corpus.name, rows[-1])]
        measured = (
            f"{rows[-1]['bpc']:.4f} bits per character on {rows[-1]['num_bytes']:,} bytes of "
            f"validation (context {rows[-1]['context']}, stride {rows[-1]['stride']})."
        )
    # JSON is YAML: one key a line, each value in JSON.
    header = "".join(f"{key}: {json.dumps(value)}\n" for key, value in metadata.items())
    model = experiment.model
    kind = "RoPE-SwiGLU transformer"
    if isinstance(model, FSNConfig):
        kind = f"Frustrated Synchronization Network (score: {model.score}, heads: "
        kind += f"{model.num_heads}, harmonics: {model.num_harmonics})"
    unit = "byte values" if corpus.vocabulary.unit == "bytes" else "Unicode characters"
    sampling = "In a checkout of fsn_jax, `python -m train sample FOLDER` writes text."
    if with_sampler:
        sampling += (
            " Without the package `python sample.py --prompt 'The '` does; it needs jax, numpy and "
            "flatbuffers."
        )
    return f"""---
{header}---

# {experiment.name}

A {kind}, {model.num_params():,} parameters, trained by fsn_jax \
{fsn_jax.__version__} on the corpus `{corpus.name}` for {trained.step:,} steps of \
{experiment.training.batch_size} windows of {experiment.data.context} characters, seed \
{experiment.seed}. Its {len(corpus.vocabulary)} tokens are {unit} of the corpus (SHA-256 \
`{corpus.sha256}`).

{measured}
It was trained as an experiment on architectures; it knows nothing but the statistics of its corpus.

With the package:

```python
from fsn_jax import hub

trained = hub.load(".")  # this folder
print(trained.sample("The ", num_tokens=200))
logits = trained.logits("The ")  # [1, L, V]; trained.model and trained.params are the Flax model
```

{sampling}
"""


def _model_index(name: str, corpus: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the hub's entry of an evaluation on the validation split."""
    setting = f"context {row['context']}, stride {row['stride']}"
    metric = {
        "type": "bpc",
        "name": f"bits per character, {setting}",
        "value": round(row["bpc"], 4),
    }
    result = {
        "task": {"type": "text-generation"},
        "dataset": {"name": corpus, "type": corpus, "split": "validation"},
        "metrics": [metric],
    }
    return {"name": name, "results": [result]}
