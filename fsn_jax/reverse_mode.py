"""Functions with derivatives of reverse mode alone, and the error for others.

JAX's own error about a ``custom_vjp`` names no remedy. Reverse mode transposes tangents and never
computes them; forward mode computes them. So an identity whose tangents can be transposed but not
computed allows reverse mode alone. It adds no operation to the compiled program.
"""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

Tree = TypeVar("Tree")

MESSAGE = (
    'this path has derivatives of reverse mode alone: with implementation="reference" jax.jvp, '
    "jax.jacfwd, jax.linearize and jax.hessian work too, with whole attention matrices in memory"
)


def reverse_mode_only(tree: Tree) -> Tree:
    """Returns a tree unchanged; JAX raises if forward mode computes a tangent of its arrays.

    Args:
      tree: arrays of any shape; others than of floating point have no tangents.

    Raises:
      TypeError: with MESSAGE, where a derivative of forward mode is computed or compiled.
    """
    return jax.tree.map(_guarded, tree)


def _guarded(x: Array) -> Array:
    floating = jnp.issubdtype(jnp.result_type(x), jnp.floating)
    return _value.bind(x) if floating else x


def _refuse(*_: Any, **__: Any) -> Any:
    raise TypeError(MESSAGE)


def _jvp(primals: tuple[Any], tangents: tuple[Any]) -> tuple[Any, Any]:
    (tangent,) = tangents
    if type(tangent) is not ad.Zero:
        tangent = _tangent.bind(tangent)
    return _value.bind(*primals), tangent


_value = Primitive("reverse_mode_only")
_value.def_impl(lambda x: x)
_value.def_abstract_eval(lambda x: x)
ad.primitive_jvps[_value] = _jvp
batching.defvectorized(_value)
mlir.register_lowering(_value, lambda _, x: [x])

_tangent = Primitive("reverse_mode_only_tangent")
_tangent.def_impl(_refuse)
_tangent.def_abstract_eval(lambda x: x)
ad.deflinear2(_tangent, lambda cotangent, _: [cotangent])
batching.primitive_batchers[_tangent] = _refuse  # of reverse mode, a batch has its own tangents
mlir.register_lowering(_tangent, _refuse)
