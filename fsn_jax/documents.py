"""Rows of tokens: the shapes of what comes with them, and documents one after the other in them."""

import jax.numpy as jnp
from jaxtyping import Array, Int


def document_ids(tokens: Int[Array, "B L"], separator: int) -> Int[Array, "B L"]:
    """Numbers the documents of each row, int32, to be given to a model as ``segment_ids``.

    A document begins with the separator that ends the one before. So the end of a document is
    predicted from that document, and the first token of the next from the separator alone.

    Args:
      tokens: token ids.
      separator: the token between documents.
    """
    return jnp.cumsum(tokens == separator, axis=1, dtype=jnp.int32)


def check_integers(name: str, values: Array) -> None:
    """Checks that an argument is an array of whole numbers.

    Args:
      name: of the argument.
      values: of it, any shape.

    Raises:
      ValueError: it is not.
    """
    dtype = getattr(values, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(
            f"{name} must be an array of whole numbers; got {dtype or type(values).__name__}"
        )


def check_rows(shape: tuple[int, ...], segment_ids: Array | None, positions: Array | None) -> None:
    """Checks what comes with rows of tokens: where shapes do not fit, JAX may broadcast silently.

    Args:
      shape: of the tokens.
      segment_ids: of the tokens, or None.
      positions: of the tokens, or None.

    Raises:
      ValueError: the tokens are not ``[B, L]``, ``segment_ids`` is not of their shape, or
        ``positions`` is neither that nor ``[L]``; or they are no whole numbers.
    """
    for name, values in (("segment_ids", segment_ids), ("positions", positions)):
        if values is not None:
            check_integers(name, values)
    if len(shape) != 2:
        raise ValueError(f"tokens must be [B, L]; got shape {shape}")
    if segment_ids is not None and jnp.shape(segment_ids) != shape:
        raise ValueError(
            f"segment_ids must be [B, L], here {shape}; got shape {jnp.shape(segment_ids)}"
        )
    if positions is not None and jnp.shape(positions) not in (shape, shape[1:]):
        raise ValueError(
            f"positions must be [L] or [B, L], here {shape[1:]} or {shape}; got shape "
            f"{jnp.shape(positions)}"
        )
