"""Stores a corpus as a tensorflow-datasets dataset in ArrayRecord files; needs no TensorFlow.

Each example is ``{"text": bytes, "name": str, "index": int64}``. The texts of a split, in the order
of their index and joined without separators, are the split, byte for byte.
"""

import contextlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from train.data.corpus import SPLITS

VERSION = "1.0.0"


class _Builder(tfds.dataset_builders.AdhocBuilder, skip_registration=True):  # type: ignore[misc, call-arg]
    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        # The base class would import TensorFlow to look for its types.
        splits = self._split_datasets.items()
        return {split: self._generate_examples_iterator(examples) for split, examples in splits}


def store(
    name: str, examples: Callable[[str], Iterator[tuple[str, bytes]]], folder: Path
) -> dict[str, Iterator[bytes]]:
    """Stores a dataset and returns the texts of each split, read back in order.

    Args:
      name: name of the dataset.
      examples: returns (name, text) of each example of a split, in order.
      folder: folder of the dataset's folder ``<name>/<version>``.
    """

    def with_index(split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, (source, text) in enumerate(examples(split)):
            # A file name need not be UTF-8.
            name = source.encode("utf-8", "surrogateescape")
            yield index, {"text": text, "name": name, "index": index}

    text = tfds.features.Tensor(shape=(), dtype=np.object_)
    builder = _Builder(
        name=name,
        version=VERSION,
        features=tfds.features.FeaturesDict({"text": text, "name": text, "index": np.int64}),
        split_datasets={split: with_index(split) for split in SPLITS},
        data_dir=str(folder),
        description=f"The corpus {name} of fsn_jax.",
        file_format="array_record",
        disable_shuffling=True,
    )
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare()
    return {split: _texts(builder.as_data_source(split)) for split in SPLITS}


def _texts(examples: Any) -> Iterator[bytes]:
    for position, example in enumerate(examples):
        if int(example["index"]) != position:
            raise RuntimeError(f"example {int(example['index'])} is at position {position}")
        yield example["text"]
