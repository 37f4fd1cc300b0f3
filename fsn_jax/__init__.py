"""Attention as frustrated synchronization, in JAX and Flax."""

import importlib
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType

from fsn_jax.attention import FrustratedAttention
from fsn_jax.base_layer import KuramotoAttention
from fsn_jax.config import FSNConfig, TransformerConfig
from fsn_jax.feedforward import CollectiveModes, PhasorSwiGLU
from fsn_jax.fields import ConfigError
from fsn_jax.fsn import FSN
from fsn_jax.transformer import Transformer

try:
    __version__ = version("fsn-jax")
except PackageNotFoundError:  # a bare checkout on the path
    __version__ = "0+unknown"


def __getattr__(name: str) -> ModuleType:
    """Imports ``fsn_jax.hub``, ``fsn_jax.generate`` and ``fsn_jax.readings`` when first named."""
    if name in ("generate", "hub", "readings"):
        return importlib.import_module(f"fsn_jax.{name}")
    raise AttributeError(f"module 'fsn_jax' has no attribute {name!r}")


__all__ = [
    "FSN",
    "CollectiveModes",
    "ConfigError",
    "FSNConfig",
    "FrustratedAttention",
    "KuramotoAttention",
    "PhasorSwiGLU",
    "Transformer",
    "TransformerConfig",
]
