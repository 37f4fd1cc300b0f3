"""A trained model as a folder in the layout of the Hugging Face hub, and back, bit for bit.

::

    model.safetensors   the parameters, named by their path (block_0.attention.kernel_real)
    config.json         the model, its vocabulary and context, where it comes from
    README.md           the model card
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

import fsn_jax
from fsn_jax.config import ConfigError
from train.config import ARCHITECTURES, ModelConfig
from train.data.vocabulary import Vocabulary
from train.errors import UserError
from train.load import LanguageModel, TrainedModel
from train.metrics import read_rows
from train.step import build_model

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
FORMAT = 1


def write_model(trained: TrainedModel, folder: Path) -> None:
    """Writes the three files into a folder that is there."""
    language_model = trained.language_model
    arrays = {
        name: np.ascontiguousarray(jax.device_get(leaf))
        for name, leaf in flat_params(trained.params).items()
    }
    safetensors.numpy.save_file(arrays, folder / WEIGHTS, metadata={"format": "flax"})
    architecture = type(trained.model).__name__
    config = {
        "architectures": [architecture],
        "model_type": trained.experiment.architecture,
        "library_name": "fsn_jax",
        "fsn_jax_version": fsn_jax.__version__,
        "format": FORMAT,
        "model": dataclasses.asdict(trained.experiment.model),
        "context": language_model.context,
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
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    (folder / CARD).write_text(model_card(trained))


def read_model(folder: str | Path) -> LanguageModel:
    """Reads what ``write_model`` wrote; needs neither the run nor its data.

    Raises:
      UserError: a file is missing, damaged, or does not fit the others.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG).read_text())
        if config["format"] != FORMAT:
            raise ValueError(f"format {config['format']}, not {FORMAT}")
        model_config = ARCHITECTURES[config["model_type"]](**config["model"])
        words = config["vocabulary"]
        vocabulary = Vocabulary.from_text(words["values"], words["unit"])
        context, corpus_name = int(config["context"]), str(words["of"])
    except (OSError, ValueError, LookupError, TypeError, ConfigError) as error:
        raise UserError(f"{folder / CONFIG} is not that of an exported model ({error})") from error
    try:
        arrays = safetensors.numpy.load_file(folder / WEIGHTS)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{folder / WEIGHTS} cannot be read ({error}); export it again") from error
    model = build_model(model_config)
    return LanguageModel(
        model=model,
        params=_params(arrays, model_config, folder / WEIGHTS),
        vocabulary=vocabulary,
        context=context,
        corpus_name=corpus_name,
    )


def is_exported(folder: str | Path) -> bool:
    """Whether a folder holds an exported model."""
    return (Path(folder) / WEIGHTS).is_file()


def flat_params(params: Any) -> dict[str, Any]:
    """Every parameter by its path, joined by dots."""
    return {
        ".".join(entry.key for entry in path): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
    }


def _params(arrays: Mapping[str, np.ndarray], config: ModelConfig, file: Path) -> Any:
    """The parameter tree of a model from its arrays."""
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    like = jax.eval_shape(build_model(config).init, jax.random.key(0), tokens)["params"]
    wanted = flat_params(like)
    for name in sorted(wanted.keys() | arrays.keys()):
        there = (arrays[name].shape, arrays[name].dtype) if name in arrays else None
        here = (wanted[name].shape, wanted[name].dtype) if name in wanted else None
        if there != here:
            raise UserError(
                f"{file} does not fit its {CONFIG}: {name} is {there or 'absent'} in the one and "
                f"{here or 'absent'} in the other; export it again"
            )
    leaves = [jnp.asarray(arrays[name]) for name in wanted]  # in the order of the tree
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def model_card(trained: TrainedModel) -> str:
    """The README of an exported model, with the metadata that the hub reads."""
    experiment, corpus = trained.experiment, trained.corpus
    evaluations = [
        row
        for row in read_rows(trained.run.path / "evaluations.jsonl")
        if row["step"] == trained.step and row["data_sha256"] == corpus.sha256
    ]
    results = [
        {
            "task": {"type": "text-generation"},
            "dataset": {"name": corpus.name, "type": corpus.name, "split": "validation"},
            "metrics": [
                {
                    "type": "bpc",
                    "name": f"bits per character, context {row['context']}, stride {row['stride']}",
                    "value": round(row["bpc"], 4),
                }
            ],
        }
        for row in evaluations[-1:]
    ]
    metadata: dict[str, Any] = {
        "library_name": "fsn_jax",
        "pipeline_tag": "text-generation",
        "tags": ["jax", "flax", "character-level", experiment.architecture],
    }
    if results:
        metadata["model-index"] = [{"name": experiment.name, "results": results}]
    # JSON is YAML: one key a line, each value in JSON.
    header = "".join(f"{key}: {json.dumps(value)}\n" for key, value in metadata.items())
    kind = (
        "Frustrated Synchronization Network"
        if experiment.architecture == "fsn"
        else ("RoPE-SwiGLU transformer")
    )
    unit = "byte values" if corpus.unit == "bytes" else "Unicode characters"
    measured = (
        "".join(
            f"{row['bpc']:.4f} bits per character on {row['num_bytes']:,} bytes of validation "
            f"(context {row['context']}, stride {row['stride']}).\n"
            for row in evaluations[-1:]
        )
        or "Not yet evaluated on the whole validation split: `python -m train evaluate RUN`.\n"
    )
    return f"""---
{header}---

# {experiment.name}

A {kind}, {experiment.model.num_params():,} parameters, trained by fsn_jax \
{fsn_jax.__version__} on the corpus `{corpus.name}` for {trained.step:,} steps of \
{experiment.training.batch_size} windows of {experiment.data.context} characters, seed \
{experiment.seed}. Its {len(corpus.vocabulary)} tokens are {unit} of the corpus (SHA-256 \
`{corpus.sha256}`).

{measured}
It was trained as an experiment on architectures; it knows nothing but the statistics of its corpus.

With the package:

```python
from train.hub import read_model

trained = read_model(".")  # this folder
logits = trained.model.apply({{"params": trained.params}}, trained.encode(b"The ")[None])
```

`python -m train sample .` writes text. Without the package, if `sampler.jax_export` is here:
`python sample.py --prompt 'The '`, which needs jax, numpy and flatbuffers.
"""
