"""Pretrained language models: folders that ``python -m train export`` writes, ready to use.

A folder holds ``model.safetensors`` (the parameters by their paths, joined by dots) and
``config.json`` (the model's config, vocabulary and context). Loading one needs this package alone.
"""

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from fsn_jax.config import ARCHITECTURES, FSNConfig, TransformerConfig, recorded_fields
from fsn_jax.documents import document_ids
from fsn_jax.fsn import FSN
from fsn_jax.generate import padded_length, stream
from fsn_jax.transformer import Transformer
from fsn_jax.vocabulary import Vocabulary

WEIGHTS, CONFIG = "model.safetensors", "config.json"
FORMAT = 1


@dataclasses.dataclass(frozen=True, eq=False)
class Pretrained:
    """A model with everything that sampling needs.

    Attributes:
      model: the Flax module.
      params: its parameters.
      vocabulary: the vocabulary of its tokens.
      context: length of the training windows, in tokens.
      corpus_name: name of the corpus that the vocabulary comes from.
      separator: the token that begins a document, of a model that sees its own document alone;
        None for others.
    """

    model: FSN | Transformer
    params: Any
    vocabulary: Vocabulary
    context: int
    corpus_name: str
    separator: int | None = None

    def encode(self, text: str | bytes) -> npt.NDArray[np.int32]:
        """Returns the tokens of a text, int32[n].

        Raises:
          TextError: the vocabulary has no token for a part of it.
        """
        data = text.encode() if isinstance(text, str) else text
        return self.vocabulary.encode(data, source=self.corpus_name)

    def logits(self, text: str | bytes) -> Float[Array, "B L V"]:
        """Returns the logits after each token of a text, as a batch of one."""
        return self._apply(text)

    def states(self, text: str | bytes) -> Float[Array, "B L N"]:
        """Returns the last block's states, as a batch of one: an FSN's phases, in radians."""
        return self._apply(text, method="states")

    def sample(self, prompt: str | bytes, **settings: Any) -> str:
        """Returns the text that follows a prompt; settings as for ``stream``."""
        return b"".join(self.stream(prompt, **settings)).decode(errors="replace")

    def stream(
        self,
        prompt: str | bytes,
        *,
        num_tokens: int = 400,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 1.0,
        stop: str | bytes | Sequence[str | bytes] = (),
        seed: int = 0,
    ) -> Iterator[bytes]:
        """Returns an iterator over the bytes that follow a prompt, a few at a time.

        Args:
          prompt: what the text begins with; at least one token.
          num_tokens: number of tokens to draw.
          temperature: divides the logits; 0 takes the likeliest token.
          top_k: draw from the k likeliest tokens; 0 means all.
          top_p: draw from the likeliest tokens that hold this probability; 1 means all.
          stop: the text ends with this, or with the first of these that it holds.
          seed: same seed, same text.

        Raises:
          ConfigError: a setting is out of range.
          TextError: the vocabulary has no token for a part of a text.
          NotFiniteError: the logits are not finite, when the first token is drawn.
        """
        stops = [stop] if isinstance(stop, (str, bytes)) else stop
        chunks = stream(
            self.model,
            {"params": self.params},
            self.encode(prompt)[None],
            num_tokens=num_tokens,
            key=jax.random.key(seed),
            context=self.context,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            stop=[self.encode(text) for text in stops],
            separator=self.separator,
        )
        return (self.vocabulary.decode(jax.device_get(chunk[0])) for chunk in chunks)

    def _apply(self, text: str | bytes, **options: Any) -> Any:
        """Applies the model to the padded text: one program serves many lengths."""
        encoded = self.encode(text)
        length = len(encoded)
        tokens = jnp.asarray(np.pad(encoded, (0, padded_length(length) - length)))[None]
        if self.separator is not None:
            options["segment_ids"] = document_ids(tokens, self.separator)
        model = _without_choice(self.model)
        return _applied(model, {"params": self.params}, tokens, **options)[:, :length]


@dataclasses.dataclass(frozen=True, eq=False)
class Description:
    """What the config of an exported model says; attributes as of ``Pretrained``.

    Attributes:
      config: of the model.
    """

    config: FSNConfig | TransformerConfig
    vocabulary: Vocabulary
    context: int
    corpus_name: str
    separator: int | None


def _without_choice(model: FSN | Transformer) -> FSN | Transformer:
    """Returns a model that times no kernels: for a few passes the choice would cost more."""
    if model.config.implementation != "auto":
        return model
    return model.clone(config=dataclasses.replace(model.config, implementation="xla"))


@functools.partial(jax.jit, static_argnums=0, static_argnames="method")
def _applied(model: FSN | Transformer, variables: Any, tokens: Array, **options: Any) -> Any:
    return model.apply(variables, tokens, **options)


def build_model(config: FSNConfig | TransformerConfig) -> FSN | Transformer:
    """Returns the Flax module for a model's config."""
    return FSN(config) if isinstance(config, FSNConfig) else Transformer(config)


def load(folder: str | Path) -> Pretrained:
    """Reads a folder that ``python -m train export`` wrote.

    Raises:
      ValueError: a file is missing, damaged, or inconsistent with the others.
    """
    described = describe(folder)
    file = Path(folder).expanduser() / WEIGHTS
    try:
        arrays = safetensors.numpy.load_file(file)
    except (OSError, LookupError, TypeError, AttributeError, safetensors.SafetensorError) as error:
        raise ValueError(f"{file} cannot be read ({error}); export it again") from error
    model = build_model(described.config)
    return Pretrained(
        model,
        _params(arrays, model, file),
        described.vocabulary,
        described.context,
        described.corpus_name,
        described.separator,
    )


def describe(folder: str | Path) -> Description:
    """Reads the config of an exported model, without its weights and without JAX's devices.

    Raises:
      ValueError: it is missing, damaged or inconsistent.
    """
    file = Path(folder).expanduser() / CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if config["format"] != FORMAT:
            raise ValueError(f"format {config['format']}, not {FORMAT}")
        kind = ARCHITECTURES[config["model_type"]]
        settings = kind(**recorded_fields(kind, config["model"]))
        words = config["vocabulary"]
        vocabulary = Vocabulary.from_text(words["values"], words["unit"])
        if len(vocabulary) != settings.vocab_size:
            raise ValueError(
                f"the vocabulary has {len(vocabulary)} {vocabulary.unit}, and model.vocab_size is "
                f"{settings.vocab_size}"
            )
        context, corpus_name = int(config["context"]), str(words["of"])
        if context < 2:
            raise ValueError(f"context must be at least 2; got {context}")
        separator = vocabulary.separator if config.get("segments") == "documents" else None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not that of an exported model ({error})") from error
    return Description(settings, vocabulary, context, corpus_name, separator)


def is_exported(folder: str | Path) -> bool:
    """Whether a folder holds an exported model."""
    return (Path(folder) / WEIGHTS).is_file()


def _params(arrays: Mapping[str, np.ndarray], model: FSN | Transformer, file: Path) -> Any:
    """Builds the parameter tree of a model from its arrays."""
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    init = _without_choice(model).init
    like = jax.eval_shape(init, jax.random.key(0), tokens)["params"]
    wanted = flatten_dict(like, sep=".")
    for name in sorted(wanted.keys() | arrays.keys()):
        there = (arrays[name].shape, arrays[name].dtype) if name in arrays else None
        here = (wanted[name].shape, wanted[name].dtype) if name in wanted else None
        if there != here:
            raise ValueError(
                f"{file} does not fit its {CONFIG}: {name} is {there or 'absent'} in the one and "
                f"{here or 'absent'} in the other; export it again"
            )
    return unflatten_dict({name: jnp.asarray(array) for name, array in arrays.items()}, sep=".")
