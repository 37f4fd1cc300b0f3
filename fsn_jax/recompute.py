"""Recomputation in the backward pass, where XLA would keep results of the forward pass."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jaxtyping import Array

from fsn_jax.fields import Implementation
from fsn_jax.reverse_mode import reverse_mode_only

Tree = TypeVar("Tree")
Result = TypeVar("Result")


def delay_until(cotangent: Array, tree: Tree) -> Tree:
    """Returns a tree that the compiler cannot use before a cotangent is computed.

    Otherwise XLA would merge a recomputation with the forward pass, or start it early, and keep the
    result in memory. It is an optimization barrier, as in ``jax.checkpoint``. On CPUs, where XLA
    (jaxlib 0.10.2) drops barriers before it merges equal computations, it adds zero times the
    cotangent's first number.

    Args:
      cotangent: an array of any shape; if its first number is not finite, the result need not be.
      tree: arrays of any shape and a real type.
    """
    if not cotangent.size:
        return tree
    if _spec(cotangent):  # on an Explicit mesh its first number is on one device only
        return _barrier(cotangent, tree)
    return jax.lax.platform_dependent(cotangent, tree, cpu=_add_zero, default=_barrier)


def _add_zero(cotangent: Array, tree: Tree) -> Tree:
    zero = 0.0 * cotangent[(0,) * cotangent.ndim]  # not known to be zero: times NaN it is not
    return jax.tree.map(lambda x: x + zero.astype(x.dtype), tree)


def _barrier(cotangent: Array, tree: Tree) -> Tree:
    return jax.lax.optimization_barrier((cotangent, tree))[1]


def _spec(x: Array) -> tuple[Any, ...]:
    """The Explicit mesh axes that an array is divided over."""
    return tuple(axis for axis in jax.typeof(x).sharding.spec if axis is not None)


def match_varying_axes(tree: Tree) -> Tree:
    """Casts the arrays of a tree to the ``shard_map`` axes over which any of them varies.

    A custom derivative gives parameters, which are the same on all devices, a cotangent that is
    not. This cast lets JAX sum it over the devices. Elsewhere nothing changes.

    Args:
      tree: arrays of any shape.
    """
    varying = frozenset[str]().union(*map(_varying, jax.tree.leaves(tree)))
    return jax.tree.map(lambda x: _cast(x, varying), tree)


def _varying(x: Array) -> frozenset[str]:
    varying: frozenset[str] = jax.typeof(x).manual_axis_type.varying
    return varying


def _cast(x: Array, varying: frozenset[str]) -> Array:
    missing = tuple(sorted(varying - _varying(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def recomputed(
    function: Callable[..., Result], implementation: Implementation = "auto"
) -> Callable[..., Result]:
    """Returns a function whose backward pass keeps its arguments and recomputes the rest.

    Args:
      function: of arrays, or trees of them, to arrays.
      implementation: ``reference`` returns the function itself, which has all derivatives. The
        others have those of reverse mode and raise TypeError for forward mode.
    """
    if implementation == "reference":
        return function
    return lambda *arguments: _recomputed(
        function, *reverse_mode_only(match_varying_axes(arguments))
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recomputed(function: Callable[..., Result], *arguments: Tree) -> Result:
    return function(*arguments)


def _forward(function: Callable[..., Result], *arguments: Tree) -> tuple[Result, tuple[Tree, ...]]:
    return function(*arguments), arguments


def _backward(
    function: Callable[..., Result], arguments: tuple[Tree, ...], cotangent: Result
) -> tuple[Tree, ...]:
    first = jax.tree.leaves(cotangent)[0]
    leaves, structure = jax.tree.flatten(arguments)
    # Parameters, which have fewer axes, need not wait: what a token enters does.
    delayed = iter(delay_until(first, [leaf for leaf in leaves if leaf.ndim >= first.ndim]))
    leaves = [next(delayed) if leaf.ndim >= first.ndim else leaf for leaf in leaves]
    return jax.vjp(function, *jax.tree.unflatten(structure, leaves))[1](cotangent)


_recomputed.defvjp(_forward, _backward)
