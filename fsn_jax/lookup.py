"""Rows of a table by token id."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int


def lookup(table: Float[Array, "V N"], ids: Int[Array, "*shape"]) -> Float[Array, "*shape N"]:
    """Returns the rows of a table; NaN for ids that it does not have, -1 among them.

    On a mesh of Explicit axes the rows are divided as their ids are.
    """
    of_ids = jax.typeof(ids).sharding
    sharding = None
    if any(of_ids.spec):
        sharding = NamedSharding(of_ids.mesh, PartitionSpec(*of_ids.spec, None))
    return table.at[ids].get(
        mode="fill", fill_value=jnp.nan, wrap_negative_indices=False, out_sharding=sharding
    )
