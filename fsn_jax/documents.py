"""Documents that lie one after the other in a row of tokens."""

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
