"""What has derivatives of reverse mode alone says so, and costs nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fsn_jax import FrustratedAttention
from fsn_jax.reverse_mode import reverse_mode_only

X = jnp.linspace(-1.0, 2.0, 5)


def sine(x):
    return jnp.sin(reverse_mode_only(x))


FORWARD = {
    "jvp": lambda f: jax.jvp(f, (X,), (X,)),
    "jvp of jit": lambda f: jax.jvp(jax.jit(f), (X,), (X,)),
    "jit of jvp": lambda f: jax.jit(lambda x: jax.jvp(f, (x,), (x,)))(X),
    "jacfwd": lambda f: jax.jacfwd(f)(X),
    "linearize": lambda f: jax.linearize(f, X)[1](X),
    "hessian": lambda f: jax.hessian(lambda x: f(x).sum())(X),
    "jit of hessian": lambda f: jax.jit(jax.hessian(lambda x: f(x).sum()))(X),
}


@pytest.mark.parametrize("name", FORWARD)
def test_a_derivative_of_forward_mode_is_refused_by_name(name):
    with pytest.raises(TypeError, match='with implementation="reference" jax.jvp'):
        FORWARD[name](sine)
    FORWARD[name](jnp.sin)


def test_a_layer_names_the_path_that_has_them():
    layer = FrustratedAttention(num_heads=2)
    theta = jnp.zeros((1, 3, 4))
    variables = jax.eval_shape(layer.init, jax.random.key(0), theta)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), variables)
    with pytest.raises(TypeError, match='with implementation="reference" jax.jvp'):
        jax.jvp(lambda x: layer.apply(zeros, x), (theta,), (theta,))


REVERSE = {
    "grad": lambda f: jax.grad(lambda x: f(x).sum())(X),
    "vmap of grad": lambda f: jax.vmap(jax.grad(f))(X),
    "grad of vmap": lambda f: jax.grad(lambda x: jax.vmap(f)(x).sum())(X),
    "remat": lambda f: jax.jit(jax.grad(lambda x: jax.checkpoint(f)(x).sum()))(X),
    "scan": lambda f: jax.grad(lambda x: jax.lax.scan(lambda c, x: (c, f(x)), 0, x)[1].sum())(X),
    "jacrev of grad": lambda f: jax.jacrev(jax.grad(lambda x: f(x).sum()))(X),
}


@pytest.mark.parametrize("name", REVERSE)
def test_derivatives_of_reverse_mode_are_those_of_the_function(name):
    np.testing.assert_allclose(REVERSE[name](sine), REVERSE[name](jnp.sin), atol=1e-6)


def test_it_is_no_operation_of_the_compiled_program():
    guarded, plain = (
        jax.jit(jax.grad(lambda x, f=f: f(x).sum())).lower(X).as_text() for f in (sine, jnp.sin)
    )
    assert guarded == plain


def test_other_types_pass():
    tree = reverse_mode_only({"float": X, "int": jnp.arange(3), "none": None})
    np.testing.assert_array_equal(tree["int"], jnp.arange(3))
    gradient = jax.grad(lambda x: reverse_mode_only((x, jnp.arange(5)))[0].sum())(X)
    np.testing.assert_array_equal(gradient, jnp.ones(5))
