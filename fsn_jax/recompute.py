"""Computing again in the backward pass, where XLA would keep what the forward pass had."""

from collections.abc import Callable
from typing import TypeVar

import jax
from jaxtyping import Array

from fsn_jax.config import Implementation

Tree = TypeVar("Tree")
Result = TypeVar("Result")


def delay_until(gradient: Array, tree: Tree) -> Tree:
    """The arrays of a tree as they are, though the compiler learns them no sooner than a gradient.

    So it cannot find that what is computed from them is what the forward pass has, nor compute it
    before the backward pass is there. It is a barrier, as in ``jax.checkpoint``; for CPUs, where
    XLA drops those (jaxlib 0.10.2) before it merges what is equal, one in the numbers.

    Args:
      gradient: an array of any shape; if its first number is not finite, the result need not be.
      tree: arrays of any shape and a real type.
    """
    return jax.lax.platform_dependent(gradient, tree, cpu=_depend_on_number, default=_barrier)


def _depend_on_number(gradient: Array, tree: Tree) -> Tree:
    if not gradient.size:
        return tree
    zero = 0.0 * gradient[(0,) * gradient.ndim]  # not known to be zero: times NaN it is not
    return jax.tree.map(lambda x: x + zero.astype(x.dtype), tree)


def _barrier(gradient: Array, tree: Tree) -> Tree:
    return jax.lax.optimization_barrier((gradient, tree))[1]


def match_varying_axes(tree: Tree) -> Tree:
    """The arrays of a tree, typed in ``shard_map`` as varying where any of them does.

    A derivative of our own gives the parameters, which are the same everywhere, a gradient that is
    not; JAX sums it over the devices if it is told here that they meet. Elsewhere nothing changes.

    Args:
      tree: arrays of any shape.
    """
    varying = frozenset[str]().union(*map(_varying, jax.tree.leaves(tree)))

    def cast(x: Array) -> Array:
        missing = tuple(sorted(varying - _varying(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)


def _varying(x: Array) -> frozenset[str]:
    kind = getattr(jax.typeof(x), "manual_axis_type", None)  # before JAX 0.10 it has another name
    return kind.varying if kind else frozenset()


def recomputed(
    function: Callable[..., Result], implementation: Implementation = "auto"
) -> Callable[..., Result]:
    """A function of which the backward pass keeps the arguments and nothing else.

    Args:
      function: of arrays, or trees of them, to arrays; computed twice where it is differentiated.
      implementation: with ``reference`` the function stays as it is, and has all derivatives;
        otherwise those of reverse mode.
    """
    if implementation == "reference":
        return function

    @jax.custom_vjp
    def again(*arguments: Tree) -> Result:
        return function(*arguments)

    def forward(*arguments: Tree) -> tuple[Result, tuple[Tree, ...]]:
        return function(*arguments), arguments

    def backward(arguments: tuple[Tree, ...], gradient: Result) -> tuple[Tree, ...]:
        arguments = delay_until(jax.tree.leaves(gradient)[0], arguments)
        return jax.vjp(function, *arguments)[1](gradient)

    again.defvjp(forward, backward)
    return lambda *arguments: again(*match_varying_axes(arguments))
