"""Parameters, gradients and moments in few arrays, which take an accelerator few kernels.

A model has some hundred small arrays. Packed, the matrices of one shape are one stack, tall ones
transposed to wide ones, and the other parameters of a group (``train/groups.py``) one vector:

    {"matrices": {"28x112": [6, 28, 112], "112x432": [18, 112, 432]}, "gates": [n], ...}

Packed states exist on accelerators only and within a dispatch; Muon packs the matrices of each step
everywhere. A run's state and its checkpoints hold the parameters' own tree.
"""

import itertools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from jaxtyping import Array

from train.groups import MATRICES, group_of
from train.settings import Layout


def packs(mesh: Mesh, layout: Layout) -> bool:
    """Returns whether a dispatch packs: no sharded arrays, and none on CPUs, which gain nothing."""
    return layout == "replicated" and mesh.devices.flat[0].platform != "cpu"


def pack(tree: Any) -> dict[str, Any]:
    """Packs a tree of parameters or of arrays like them. A packed tree stays as it is."""
    parts: dict[tuple[str, ...], list[Array]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        key, shape = _place(path, leaf)
        wide = leaf.reshape(sides(leaf)).T if _is_tall(path, leaf) else leaf
        parts.setdefault(key, []).append(wide.reshape(shape))
    return unflatten_dict({key: jnp.concatenate(arrays) for key, arrays in parts.items()})


def unpack(packed: dict[str, Any], like: Any) -> Any:
    """Takes a packed tree apart.

    Args:
      packed: the result of ``pack``.
      like: a tree of the structure and shapes that were packed.
    """
    arrays = flatten_dict(packed)
    taken = dict.fromkeys(arrays, 0)

    def next_for(path: Any, leaf: Any) -> Array:
        key, shape = _place(path, leaf)
        part = arrays[key][taken[key] : taken[key] + shape[0]]
        taken[key] += shape[0]
        return (part[0].T if _is_tall(path, leaf) else part).reshape(leaf.shape)

    return jax.tree_util.tree_map_with_path(next_for, like)


def pack_state(state: Any, optimizer: optax.GradientTransformation) -> Any:
    """Packs a ``TrainState``: its parameters, and the trees like them in the optimizer's state."""
    packed = pack(state.params)
    like = jax.eval_shape(optimizer.init, packed)

    def pack_part(part: Any, like: Any) -> Any:
        if not _is_like(part, state.params):
            return part
        # Where the optimizer masks a group, its tree has a placeholder.
        return jax.tree.unflatten(jax.tree.structure(like), jax.tree.leaves(pack(part)))

    opt_state = _map_like(pack_part, state.params, state.opt_state, like)
    return state.replace(params=packed, opt_state=opt_state)


def unpack_state(packed: Any, like: Any) -> Any:
    """Takes a packed ``TrainState`` apart; ``like`` is the state that was packed."""

    def unpack_part(part: Any, packed: Any) -> Any:
        return unpack(packed, part) if _is_like(part, like.params) else packed

    opt_state = _map_like(unpack_part, like.params, like.opt_state, packed.opt_state)
    return packed.replace(params=unpack(packed.params, like.params), opt_state=opt_state)


def sides(leaf: Any) -> tuple[int, int]:
    """Returns rows and columns of a parameter as a matrix, the squarest if it has more axes."""
    rows = itertools.accumulate(leaf.shape[:-1], operator.mul)
    best = min(rows, key=lambda n: abs(n - leaf.size // n))
    return best, leaf.size // best


def _place(path: Any, leaf: Any) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The array that a leaf is packed into, and the shape of its part there."""
    group = group_of(path)
    if group != MATRICES:
        return (group,), (leaf.size,)
    shape = leaf.shape if _is_packed(path) else (1, *sorted(sides(leaf)))
    return (group, "x".join(map(str, shape[1:]))), shape


def _is_tall(path: Any, leaf: Any) -> bool:
    if group_of(path) != MATRICES or _is_packed(path):
        return False
    rows, columns = sides(leaf)
    return rows > columns


def _is_packed(path: Any) -> bool:
    return bool(path[0].key == MATRICES)


def _map_like(function: Callable[[Any, Any], Any], params: Any, opt_state: Any, other: Any) -> Any:
    """Maps over two states of an optimizer, whose trees that are like the parameters are leaves."""
    return jax.tree.map(function, opt_state, other, is_leaf=lambda node: _is_like(node, params))


def _is_like(node: Any, params: Any) -> bool:
    return isinstance(node, dict) and node.keys() == params.keys()
