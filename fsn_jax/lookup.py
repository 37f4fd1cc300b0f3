"""Rows of a table by token id."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int


def lookup(table: Float[Array, "V N"], ids: Int[Array, "*shape"]) -> Float[Array, "*shape N"]:
    """Returns the rows of a table; NaN for ids that it does not have, -1 among them.

    On a mesh of Explicit axes the rows are divided as their ids are.
    """
    spec = jax.typeof(ids).sharding.spec
    sharding = PartitionSpec(*spec, None) if any(spec) else None
    return table.at[ids].get(
        mode="fill", fill_value=jnp.nan, wrap_negative_indices=False, out_sharding=sharding
    )
