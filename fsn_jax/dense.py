"""Dense layers that read phasors: both quadratures of every phase, or one."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fsn_jax.fields import DenseFields, DType, documented, setting
from fsn_jax.recompute import recomputed
from fsn_jax.torus import Complex, features, in_float32, kept_in


class Readout(nn.Module):
    """Logits from states: a dense layer that sums in float32, where bfloat16 merges close logits.

    Attributes:
      vocab_size: V.
      dtype: of the factors of the product.
      use_bias: whether a bias is added, in float32.
    """

    vocab_size: int
    dtype: DType = "float32"
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "*shape I"]) -> Float[Array, "*shape V"]:
        """Returns the logits, float32."""
        init, shape = nn.initializers.lecun_normal(), (x.shape[-1], self.vocab_size)
        kernel = self.param("kernel", init, shape, jnp.float32)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        logits = jnp.matmul(x, kernel, preferred_element_type=jnp.float32)
        if self.use_bias:
            zeros = nn.initializers.zeros
            bias = self.param("bias", zeros, (self.vocab_size,), jnp.float32)
            logits += over_tokens(bias.astype(jnp.float32), logits)
        return logits


def _random_quadrature(groups: int, phases: int) -> nn.initializers.Initializer:
    """Returns an initializer of cosines and sines of uniform angles, ``[2, G, N]``."""

    def init(key: Array, *_: object) -> Array:
        angle = jax.random.uniform(key, (groups, phases), jnp.float32, maxval=2 * np.pi)
        return jnp.stack([jnp.cos(angle), jnp.sin(angle)])

    return init


def over_tokens(x: Array, like: Array) -> Array:
    """Gives a vector ``[O]`` the rank of ``[..., O]``."""
    return jnp.expand_dims(x, tuple(range(like.ndim - 1)))


def _read(
    z: Complex, field: Complex | None, gains: Array | None, quadrature: Array | None
) -> Float[Array, "*shape I"]:
    """Returns a matrix's input: one quadrature of every phase, given ``[2, N]``, or both."""
    arrays = (in_float32(z), field, gains, quadrature)
    return jax.lax.platform_dependent(*arrays, cuda=_read_together, default=_read_by_part)


def _read_by_part(
    z: Complex, field: Complex | None, gains: Array | None, quadrature: Array | None
) -> Array:
    """``_read``, cosines and sines one by one."""
    if field is not None and gains is not None:
        coherence, torque = (over_tokens(gain, z.re) for gain in gains)
        z = Complex(z.re + coherence * field.re, z.im + torque * field.im)
    if quadrature is None:
        return features(z)
    cosine, sine = (over_tokens(part, z.re) for part in quadrature)
    return z.re * cosine + z.im * sine


def _read_together(
    z: Complex, field: Complex | None, gains: Array | None, quadrature: Array | None
) -> Array:
    """``_read``, cosines and sines in one array.

    So a GPU sums over tokens what both gains, or both parts of a quadrature, learn from in one
    kernel.
    """
    both = jnp.stack(z)

    def over_all(x: Array) -> Array:
        return jnp.expand_dims(x, tuple(range(1, both.ndim - 1)))

    if field is not None and gains is not None:
        both += over_all(gains) * jnp.stack(field)
    if quadrature is None:
        return features(Complex(*both))
    cosine, sine = over_all(quadrature) * both
    return cosine + sine


@documented
class PhasorDense(DenseFields, nn.Module):
    """A linear map from the phasors of a token to O reals.

    With ``features="phasor"`` it is ``[cos theta, sin theta] W``, W of ``[2N, O]``. With
    ``"quadrature"`` each of G equal groups of outputs reads one learned quadrature of each phase,

        x_g[n] = a[g, n] cos theta_n + b[g, n] sin theta_n,    y_g = x_g W_g,    W_g of [N, O / G],

    as a detector with a local oscillator does: ``a = r cos phi, b = r sin phi`` gives
    ``r cos(theta - phi)``. Half as many weights; what one group cannot see another can.

    What is read is scaled by ``feature_scale``. Given the local field of the phases it reads
    ``cos theta + g[0] coherence`` for the cosine and ``sin theta + g[1] torque`` for the sine, with
    gains g of each phase that are zero initially.
    """

    outputs: int = setting(1, "O, width of the result", least=1)
    groups: int = setting(1, "G, which divides O", least=1)
    use_bias: bool = setting(False, "whether a bias is added")
    kernel_init: nn.initializers.Initializer = setting(
        nn.initializers.lecun_normal(), "initializer of W"
    )
    angle: float | None = setting(
        None, "initial phi in radians, the same for all phases; None draws each from the circle"
    )

    @nn.compact
    def __call__(self, z: Complex, field: Complex | None = None) -> Float[Array, "*shape O"]:
        """Maps phasors of any shape that ends in N to reals in the compute dtype."""
        num_phases = z.re.shape[-1]
        dtype = jnp.dtype(self.dtype)
        gains = None
        if field is not None:
            zeros = nn.initializers.zeros
            gains = self.param("field_gain", zeros, (2, num_phases), jnp.float32)
        read = None  # both quadratures
        if self.features == "phasor":
            shape = (2 * num_phases, self.outputs)
            kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        else:
            init = self._quadrature_init(num_phases)
            quadrature = self.param("quadrature", init, (2, self.groups, num_phases))
            shape = (num_phases, self.outputs)
            kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
            if self.groups == 1:
                read = quadrature[:, 0]
            else:
                # One product with a matrix made for both quadratures is quicker than G inputs.
                grouped = kernel.astype(jnp.float32).reshape(1, num_phases, self.groups, -1)
                by_phase = quadrature.astype(jnp.float32).swapaxes(1, 2)[..., None]
                kernel = (by_phase * grouped).reshape(2 * num_phases, self.outputs)
        z = kept_in(z, self.dtype)
        field = None if field is None else kept_in(field, self.dtype)
        inputs = recomputed(_read, self.implementation)(z, field, gains, read)
        if self.feature_scale != 1:
            inputs *= self.feature_scale
        y = inputs.astype(dtype) @ kernel.astype(dtype)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.outputs,), jnp.float32)
            # In float32, or the gradient of the bias is a sum over all tokens in the compute dtype.
            bias = bias.astype(jnp.float32)
            y = (y.astype(jnp.float32) + over_tokens(bias, y)).astype(dtype)
        return y

    def _quadrature_init(self, num_phases: int) -> nn.initializers.Initializer:
        if self.angle is None:
            return _random_quadrature(self.groups, num_phases)
        parts = jnp.array([np.cos(self.angle), np.sin(self.angle)], jnp.float32)
        return lambda _, shape: jnp.broadcast_to(parts[:, None, None], shape)
