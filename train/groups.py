"""Groups of parameters: each has a learning rate, decays or not, and may have its own optimizer."""

from typing import Any

import jax

ANGLES, KERNELS, GATES, VECTORS = "angles", "kernels", "gates", "vectors"
MATRICES, TABLES = "matrices", "tables"
GROUPS = (ANGLES, KERNELS, GATES, VECTORS, MATRICES, TABLES)
DECAYED = (MATRICES, TABLES)

_GROUP_OF_LEAF = {
    "angles": ANGLES,
    "gate_angle": ANGLES,
    "kernel_real": KERNELS,
    "kernel_imag": KERNELS,
    "gain": KERNELS,
    "gate": GATES,
    "quadrature": GATES,
    "field_gain": GATES,
    "log_beta": GATES,
    "kernel": MATRICES,
    "modes_real": MATRICES,
    "modes_imag": MATRICES,
    **{f"{name}_{part}": MATRICES for name in ("gate", "up", "down") for part in ("real", "imag")},
    "embedding": TABLES,
    "key_shift": VECTORS,
    "query_shift": VECTORS,
    "bias": VECTORS,
    "scale": VECTORS,
}


def group_of(path: tuple[Any, ...]) -> str:
    """Returns the group of a parameter.

    Args:
      path: the parameter's path in the tree, as names or as ``jax.tree_util`` gives it. Arrays of
        a packed tree (``train/packing.py``) are named after their group.

    Raises:
      KeyError: no group contains the parameter; a new layer must choose one.
    """
    names = [str(getattr(entry, "key", entry)) for entry in path]
    if names[0] in GROUPS:
        return names[0]
    if names[-1] not in _GROUP_OF_LEAF:
        raise KeyError(
            f"{'/'.join(names)} is in no group of parameters: add {names[-1]!r} to train/groups.py"
        )
    group = _GROUP_OF_LEAF[names[-1]]
    return TABLES if group == MATRICES and names[0] == "readout" else group


def groups(params: Any) -> Any:
    """Returns the tree of groups of a parameter tree."""
    return jax.tree_util.tree_map_with_path(lambda path, _: group_of(path), params)
