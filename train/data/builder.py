"""What the four builders share: the features, the order, and one way to read the bytes back."""

import contextlib
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from train.data.corpus import SPLITS

RECORD_BYTES = 1 << 20  # long texts are cut into records of this many bytes


class CorpusBuilder(  # type: ignore[call-arg]
    tfds.core.GeneratorBasedBuilder,  # type: ignore[misc]
    skip_registration=True,
):
    """A corpus as ordered records; a subclass says which by `records(split)`.

    The records are stored unshuffled, so that the texts of a split, in order and with nothing
    between them, are the split.
    """

    VERSION = tfds.core.Version("1.0.0")
    DESCRIPTION = ""
    HOMEPAGE: str | None = None

    def records(self, split: str) -> Iterator[tuple[str, bytes]]:
        """Yield (name, text) of each record of "train", "validation" or "test", in order."""
        raise NotImplementedError

    def _info(self) -> Any:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.DESCRIPTION,
            homepage=self.HOMEPAGE,
            features=tfds.features.FeaturesDict(
                {
                    "text": tfds.features.Tensor(shape=(), dtype=np.object_),  # bytes
                    "name": tfds.features.Tensor(shape=(), dtype=np.object_),  # str
                    "index": np.int64,  # of the record in its split
                }
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> Mapping[str, Iterator[tuple[int, Any]]]:
        del dl_manager  # the files were fetched, and checked, before the builder was made
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, Any]]:
        for index, (name, text) in enumerate(self.records(split)):
            yield index, {"text": text, "name": name, "index": index}


def build(builder: CorpusBuilder) -> None:
    """Write the builder's records into its data folder, without the library's own messages."""
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare()


def read_texts(builder: CorpusBuilder, split: str) -> Iterator[bytes]:
    """Yield the texts of a built split in their order.

    Raises:
      RuntimeError: the stored records are not in the order they were written in.
    """
    for position, record in enumerate(builder.as_data_source(split)):
        if int(record["index"]) != position:
            raise RuntimeError(f"record {int(record['index'])} of {split} stands at {position}")
        yield record["text"]


def builder_options(folder: Path) -> dict[str, Any]:
    """Arguments that make a builder keep its records under `folder` as ArrayRecord."""
    return {"data_dir": str(folder), "file_format": "array_record"}
