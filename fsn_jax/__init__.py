"""Attention as frustrated synchronization, in JAX and Flax."""

from importlib.metadata import PackageNotFoundError, version

from fsn_jax.attention import FrustratedAttention, KuramotoAttention
from fsn_jax.config import ConfigError, FSNConfig, TransformerConfig
from fsn_jax.feedforward import CollectiveModes
from fsn_jax.fsn import FSN
from fsn_jax.transformer import Transformer

try:
    __version__ = version("fsn-jax")
except PackageNotFoundError:  # a bare checkout on the path
    __version__ = "0+unknown"

__all__ = [
    "FSN",
    "CollectiveModes",
    "ConfigError",
    "FSNConfig",
    "FrustratedAttention",
    "KuramotoAttention",
    "Transformer",
    "TransformerConfig",
]
