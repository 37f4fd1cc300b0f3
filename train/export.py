"""``python -m train export RUN FOLDER``: writes a trained model in the Hugging Face hub's layout.

::

    model.safetensors    the parameters, named by their path (block_0.attention.kernel_real)
    config.json          the model's config, vocabulary, context and provenance
    README.md            the model card
    sampler.jax_export   a sampler that runs without this package: StableHLO for CPU, CUDA and TPU
    sample.py            its command line

``fsn_jax.hub`` reads the first two back.
"""

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict
from jax import Array

import fsn_jax
from fsn_jax import FSNConfig, hub
from fsn_jax.generate import sample_token
from fsn_jax.hub import Pretrained
from train.config import ModelConfig
from train.errors import UserError
from train.files import new_folder, user_path, writing
from train.load import RunModel, load_without_data
from train.metrics import read_rows
from train.program import Arguments, start_jax
from train.run_files import EVALUATIONS

PLATFORMS = ("cpu", "cuda", "tpu")
SAMPLER, SCRIPT, CARD = "sampler.jax_export", "sample.py", "README.md"


def export_sampler(trained: Pretrained) -> bytes:
    """Serializes the model, its parameters and the sampling of tokens as one program.

    It takes ``(window int32[context], length int32[], seed uint32[], drawn int32[], temperature
    float32[], top_k int32[], top_p float32[])`` and returns the window, int32[context], with all
    positions from ``length`` on sampled. Token i uses the key ``fold_in(key(seed), i)``, where
    ``drawn`` tokens were sampled before. The tokens equal those of ``fsn_jax.generate.generate``.
    """
    context = trained.context
    # By way of the host: the program must not hold the mesh of the machine that exports it.
    variables = {"params": jax.tree.map(jnp.asarray, jax.device_get(trained.params))}

    def sample(
        window: Array,
        length: Array,
        seed: Array,
        drawn: Array,
        temperature: Array,
        top_k: Array,
        top_p: Array,
    ) -> Array:
        key = jax.random.key(seed)
        segments = trained.separator is not None
        cache: Any = trained.model.apply(
            variables, 1, context, segments=segments, method="empty_cache"
        )
        Carry = tuple[Array, Array | None, Any]

        def body(carry: Carry, position: Array) -> tuple[Carry, Array]:
            token, document, cache = carry
            ids = None
            if document is not None:
                document += token == trained.separator
                ids = document[None, None]
            extended: Any = trained.model.apply(
                variables, token[None, None], cache, segment_ids=ids, method="extend"
            )
            logits, cache = extended
            new = sample_token(
                logits[:, 0],
                jax.random.fold_in(key, drawn + position - length),
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
            )[0]
            token = jnp.where(position < length, window[position], new)
            return (token, document, cache), token

        document = jnp.int32(0) if segments else None
        _, rest = jax.lax.scan(body, (window[0], document, cache), jnp.arange(1, context))
        return jnp.concatenate([window[:1], rest])

    window = jax.ShapeDtypeStruct((context,), jnp.int32)
    scalars = (jnp.int32, jnp.uint32, jnp.int32, jnp.float32, jnp.int32, jnp.float32)
    settings = (jax.ShapeDtypeStruct((), dtype) for dtype in scalars)
    exported = jax.export.export(jax.jit(sample), platforms=PLATFORMS)(window, *settings)
    return bytes(exported.serialize())


def write_model(trained: RunModel, folder: Path, *, with_sampler: bool) -> None:
    """Writes weights, config and card into a folder; the card says whether it has a sampler."""
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
        "context": trained.experiment.data.context,
        "segments": trained.experiment.data.segments,
        "vocabulary": {
            "of": trained.experiment.data.name,
            "unit": trained.vocabulary.unit,
            "values": trained.vocabulary.to_text(),
        },
        "run": {
            "name": trained.experiment.name,
            "step": trained.step,
            "seed": trained.experiment.seed,
            "data_sha256": trained.data_sha256,
        },
    }
    (folder / hub.CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / CARD).write_text(model_card(trained, with_sampler=with_sampler), encoding="utf-8")


def model_card(trained: RunModel, *, with_sampler: bool) -> str:
    """Returns the README of an exported model, with the metadata that the hub reads."""
    experiment, corpus = trained.experiment, trained.experiment.data.name
    rows = [
        row
        for row in read_rows(trained.run.path / EVALUATIONS)
        if row["step"] == trained.step and row["data_sha256"] == trained.data_sha256
    ]
    metadata: dict[str, Any] = {
        "library_name": "fsn_jax",
        "pipeline_tag": "text-generation",
        "tags": ["jax", "flax", "character-level", experiment.architecture],
    }
    measured = "Not yet evaluated on the whole validation split: `python -m train evaluate RUN`."
    if rows:
        metadata["model-index"] = [_model_index(experiment.name, corpus, rows[-1])]
        measured = (
            f"{rows[-1]['bpc']:.4f} bits per character on {rows[-1]['num_bytes']:,} bytes of "
            f"validation (context {rows[-1]['context']}, stride {rows[-1]['stride']})."
        )
    # JSON is YAML: one key a line, each value in JSON.
    header = "".join(f"{key}: {json.dumps(value)}\n" for key, value in metadata.items())
    unit = "byte values" if trained.vocabulary.unit == "bytes" else "Unicode characters"
    before = experiment.init_from and f", from the parameters of {experiment.init_from}"
    sampling = "In a checkout of fsn_jax, `python -m train sample FOLDER` writes text."
    if with_sampler:
        sampling += (
            " Without the package `python sample.py --prompt 'The '` does; it needs jax, numpy and "
            "flatbuffers."
        )
    return f"""---
{header}---

# {experiment.name}

A {_kind(experiment.model)}, {experiment.model.num_params():,} parameters, trained by fsn_jax \
{fsn_jax.__version__} on the corpus `{corpus}` for {trained.step:,} steps of \
{experiment.training.batch_size} windows of {experiment.data.context} characters, seed \
{experiment.seed}{before}.{_additions(experiment.model)} Its \
{len(trained.vocabulary)} tokens are {unit} of the corpus (SHA-256 `{trained.data_sha256}`).

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


def _kind(model: ModelConfig) -> str:
    """Says what a model is."""
    if not isinstance(model, FSNConfig):
        return "RoPE-SwiGLU transformer"
    return (
        f"Frustrated Synchronization Network (score: {model.score}, heads: {model.num_heads}, "
        f"harmonics: {model.num_harmonics})"
    )


def _additions(model: ModelConfig) -> str:
    """Says what a model has that the published network has not."""
    if not isinstance(model, FSNConfig) or model.score != "projected":
        return ""
    return " Its query and key matrices are an addition of fsn_jax to the published network."


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


def program(argv: Sequence[str]) -> None:
    """Runs the program with the arguments of its command line."""
    p = Arguments(prog="python -m train export", description=__doc__)
    p.add_argument("run", help="a run's folder, for instance runs/quickstart")
    p.add_argument("folder", help="a new folder to write to")
    p.add_checkpoint_options("best")
    p.add_argument("--no_sampler", action="store_true", help="leave the sampler out")
    options = p.parse_args(argv[1:])
    folder = user_path("the folder", options.folder)
    if folder.exists():
        raise UserError(f"{folder} is there already; remove it or name another folder")
    start_jax()
    trained = load_without_data(options.run, which=options.checkpoint, data_path=options.data_path)
    sampler = None if options.no_sampler else export_sampler(trained.language_model)
    with writing("the folder", folder), new_folder(folder) as made:
        write_model(trained, made, with_sampler=sampler is not None)
        if sampler is not None:
            (made / SAMPLER).write_bytes(sampler)
            shutil.copyfile(Path(__file__).with_name("standalone_sample.py"), made / SCRIPT)
    for file in sorted(folder.iterdir()):
        print(f"{file.stat().st_size:>12,} bytes  {file}")
