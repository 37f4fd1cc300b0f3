"""Both models in float64 NumPy, written as loops from the equations and from nothing else.

This file shares no code with ``fsn_jax``: it is the second opinion that the tests compare the
library with. It is slow on purpose. The sums that the equations write are Python loops, over one
batch element, one query `t`, one source `u`, one phase `n` at a time, and every sine and cosine is
called where the equation has it; the library's einsums, folded values and shared powers have no
counterpart. Only dense layers (a vector times a matrix) are left to NumPy.

Letters: `B` batch, `L` length, `V` vocabulary, `N` phases a token, `H` heads, `P = N/H` phases a
head, `R` pairs a head in the score, `M` harmonics, `T` delays, `F` feed-forward width,
`K` collective modes, `D` transformer width.

A *config* is any object with the fields of ``FSNConfig`` or ``TransformerConfig`` that a function
reads; *params* is a nested mapping of float64 arrays with the names of the Flax tree
(``as_float64`` makes one). All arithmetic is float64 or complex128.
"""

import cmath
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Array = np.ndarray
Params = Mapping[str, Any]


def as_float64(tree: Any) -> Any:
    """The same nested mapping as plain dicts, every leaf a float64 array."""
    if isinstance(tree, Mapping):
        return {name: as_float64(branch) for name, branch in tree.items()}
    return np.asarray(tree, dtype=np.float64)


# Scalars


def silu(x: float) -> float:
    """x / (1 + exp(-x))."""
    return x / (1.0 + math.exp(-x))


def softplus(x: float) -> float:
    """log(1 + exp(x))."""
    return math.log1p(math.exp(x))


def features(angles: Array) -> Array:
    """angles [N] -> [cos, sin] [2N] of one token."""
    return np.array([math.cos(x) for x in angles] + [math.sin(x) for x in angles])


def causal_softmax(scores: Array) -> Array:
    """scores [L, L] -> weights [L, L]: row t is a softmax over u <= t and zero after."""
    length = scores.shape[0]
    weights = np.zeros_like(scores)
    for t in range(length):
        largest = max(scores[t, u] for u in range(t + 1))
        exponentials = [math.exp(scores[t, u] - largest) for u in range(t + 1)]
        total = sum(exponentials)
        for u in range(t + 1):
            weights[t, u] = exponentials[u] / total
    return weights


# The coupling


def coupling(
    theta: Array, attention: Array, kappa: Array, wave: Callable[[float], float] = math.sin
) -> Array:
    """The frustrated kernel, in its Kuramoto-Sakaguchi form.

    With ``kappa = rho exp(-i alpha)``::

        dtheta[t,n] = sum_{tau,m} rho[tau,m,n] sum_{u: u+tau <= t} A[h(n),t,u]
                      sin(m (theta[u+tau,n] - theta[t,n]) - alpha[tau,m,n])

    theta [B, L, N], attention [B, H, L, L], kappa [T, M, N] complex -> dtheta [B, L, N]. With
    ``wave`` the cosine it is the coherence of each phase with the field that it is in.
    """
    batch, length, phases = theta.shape
    phases_per_head = phases // attention.shape[1]
    delays, harmonics, _ = kappa.shape
    update = np.zeros((batch, length, phases))
    for tau in range(delays):
        for harmonic in range(1, harmonics + 1):
            for n in range(phases):
                rho, minus_alpha = cmath.polar(complex(kappa[tau, harmonic - 1, n]))
                head = n // phases_per_head
                for b in range(batch):
                    for t in range(length):
                        for u in range(t + 1):
                            if u + tau > t:
                                continue
                            difference = theta[b, u + tau, n] - theta[b, t, n]
                            update[b, t, n] += (
                                rho
                                * attention[b, head, t, u]
                                * wave(harmonic * difference + minus_alpha)
                            )
    return update


def kernel(params: Params, config: Any) -> Array:
    """kappa [T, M, N] complex ([T, M, J, N] for J heads) from the parameters that are left."""
    real = np.array(params["kernel_real"], dtype=np.float64)
    if not config.signed_harmonics:
        for index in np.ndindex(real.shape):
            real[index] = softplus(real[index])
    if not config.static_angles:
        return real.astype(np.complex128)
    return real + 1j * np.asarray(params["kernel_imag"], dtype=np.float64)


# The score


def dense(
    params: Params,
    angles: Array,
    coherence: Array | None = None,
    torque: Array | None = None,
    *,
    scale: float,
) -> Array:
    """A dense layer inside a block: angles [N] of one token -> reals [O].

    It sees cosines and sines, or, if it has quadratures [2, G, N], one mixture of the two for each
    of G equal groups of outputs, all times a factor. With the field [N] that the phases are in,
    cosines are shifted by its coherence and sines by its torque, times a gain.
    """
    weights = params["kernel"]
    outputs = np.zeros(weights.shape[1])
    phases = len(angles)
    seen = features(angles)
    if coherence is not None and torque is not None:
        for n in range(phases):
            seen[n] += params["field_gain"][0, n] * coherence[n]
            seen[phases + n] += params["field_gain"][1, n] * torque[n]
    seen *= scale
    for o in range(outputs.size):
        if "quadrature" in params:
            cosine, sine = params["quadrature"]
            group = o // (outputs.size // len(cosine))
            for n in range(phases):
                mixed = cosine[group, n] * seen[n] + sine[group, n] * seen[phases + n]
                outputs[o] += mixed * weights[n, o]
        else:
            outputs[o] = seen @ weights[:, o]
    return outputs + params.get("bias", 0.0)


def compared(config: Any, head: int) -> range:
    """The phases of a head's pairs; a projected score, which has none of its own, counts them."""
    per_head = config.num_phases // config.num_heads
    if config.score == "projected":
        return range(config.score_phases or per_head)
    if config.score_scope == "block":
        return range(head * per_head, (head + 1) * per_head)
    return range(config.num_phases)


def drift(config: Any, head: int) -> list[float]:
    """omega of each pair of a head, radians a position: RoPE's frequencies over a block."""
    pairs = compared(config, head)
    if head < config.similarity_heads:
        return [0.0] * len(pairs)
    period = config.num_phases // config.num_heads
    if config.score == "projected":
        period = len(pairs)
    return [config.rotary_base ** (-(n % period) / period) for n in pairs]


def query_and_key(params: Params, angles: Array, config: Any) -> tuple[Array, Array]:
    """angles [N] of one token -> complex query and key [H, R], before the rotary drift."""
    heads, pairs = config.num_heads, len(compared(config, 0))
    query = np.zeros((heads, pairs), dtype=np.complex128)
    key = np.zeros((heads, pairs), dtype=np.complex128)
    if config.score == "projected":
        q = dense(params["query"], angles, scale=config.feature_scale)
        same = 2 * pairs * config.similarity_heads
        k = np.concatenate(
            [
                q[:same],
                dense(params["key"], angles, scale=config.feature_scale) if "key" in params else [],
            ]
        )
        for h in range(heads):
            for p in range(pairs):
                # Columns come as [head][real, imaginary][pair].
                real, imag = h * 2 * pairs + p, h * 2 * pairs + pairs + p
                query[h, p] = complex(q[real], q[imag])
                key[h, p] = complex(k[real], k[imag])
        return query, key
    if config.score == "content_gated":
        a = 1.0 + dense(params["query_gate"], angles, scale=config.feature_scale)
        b = 1.0 + dense(params["key_gate"], angles, scale=config.feature_scale)
    else:
        a, b = params["gate"].reshape(-1), np.ones(heads * pairs)
        if config.score_angles:
            a = a * np.exp(-1j * params["gate_angle"].reshape(-1))
    for h in range(heads):
        for p, n in enumerate(compared(config, h)):
            query[h, p] = a[h * pairs + p] * cmath.exp(1j * angles[n])
            key[h, p] = b[h * pairs + p] * cmath.exp(1j * angles[n])
    return query, key


def attention_weights(params: Params, theta: Array, config: Any) -> Array:
    """theta [B, L, N] -> A [B, H, L, L].

    ``s[h,t,u] = beta_h sum_p Re(q[t,h,p] conj(k[u,h,p]) exp(i (t - u) omega_p))``, then the causal
    softmax; score "none" gives every visible token the same weight.
    """
    batch, length, _ = theta.shape
    heads = config.num_heads
    weights = np.zeros((batch, heads, length, length))
    if config.score == "none":
        for t in range(length):
            weights[:, :, t, : t + 1] = 1.0 / (t + 1)
        return weights
    pairs = len(compared(config, 0))
    for b in range(batch):
        tokens = [query_and_key(params, theta[b, t], config) for t in range(length)]
        for h in range(heads):
            beta = math.exp(params["log_beta"][h])
            omega = drift(config, h)
            scores = np.zeros((length, length))
            for t in range(length):
                for u in range(t + 1):
                    for p in range(pairs):
                        product = tokens[t][0][h, p] * tokens[u][1][h, p].conjugate()
                        scores[t, u] += beta * (product * cmath.exp(1j * (t - u) * omega[p])).real
            weights[b, h] = causal_softmax(scores)
    return weights


# The layers


def frustrated_attention(
    params: Params, theta: Array, config: Any, wave: Callable[[float], float] = math.sin
) -> Array:
    """FrustratedAttention: theta [B, L, N] -> dtheta, or coherence (``coupling``), [B, L, N]."""
    weights = attention_weights(params.get("score", {}), theta, config)
    if config.values == "circular":
        kappa = kernel(params, config)
        if config.heads_per_phase == 1:
            return coupling(theta, weights, kappa, wave)
        # A phase of block h hears head h + j by the kernel of rank j.
        update = np.zeros(theta.shape)
        for j in range(config.heads_per_phase):
            heard = [(block + j) % config.num_heads for block in range(config.num_heads)]
            update += coupling(theta, weights[:, heard], kappa[:, :, j], wave)
        return update
    batch, length, phases = theta.shape
    update = np.zeros(theta.shape)
    for b in range(batch):
        values = [
            dense(params["value"], theta[b, u], scale=config.feature_scale) for u in range(length)
        ]
        for t in range(length):
            mixed = np.zeros(phases)
            for n in range(phases):
                head = n // (phases // config.num_heads)
                for u in range(t + 1):
                    mixed[n] += weights[b, head, t, u] * values[u][n]
            update[b, t] = mixed @ params["output"]["kernel"]
    return update


def kuramoto_attention(params: Params, theta: Array, config: Any) -> Array:
    """KuramotoAttention: theta [B, L, N] -> dtheta [B, L, N].

    ``dtheta[t,n] = softplus(gain[n]) sum_u A[h(n),t,u] sin(theta[u,n] - theta[t,n])``.
    """
    weights = attention_weights(params.get("score", {}), theta, config)
    batch, length, phases = theta.shape
    update = np.zeros(theta.shape)
    for b in range(batch):
        for t in range(length):
            for n in range(phases):
                head = n // (phases // config.num_heads)
                pull = sum(
                    weights[b, head, t, u] * math.sin(theta[b, u, n] - theta[b, t, n])
                    for u in range(t + 1)
                )
                update[b, t, n] = softplus(params["gain"][n]) * pull
    return update


def feedforward(
    params: Params,
    theta: Array,
    config: Any,
    coherence: Array | None = None,
    torque: Array | None = None,
) -> Array:
    """SwiGLU on phasors, or collective modes, or nothing: theta [B, L, N] -> dtheta [B, L, N].

    With ``field_features`` it also sees the field [B, L, N] of the coupling before it.
    """
    update = np.zeros(theta.shape)
    if config.feedforward == "none":
        return update
    batch, length, phases = theta.shape
    for b in range(batch):
        for t in range(length):
            sight = [theta[b, t]]
            if coherence is not None and torque is not None:
                sight += [coherence[b, t], torque[b, t]]
            if config.feedforward == "swiglu":
                gate, up = (
                    dense(params["gate"], *sight, scale=config.feature_scale),
                    dense(params["up"], *sight, scale=config.feature_scale),
                )
                hidden = np.array([silu(g) * x for g, x in zip(gate, up, strict=True)])
                update[b, t] = hidden @ params["down"]["kernel"]
                continue
            if config.mode_weights == "coherence":
                update[b, t] = native_modes(params, sight, config)
                continue
            drive = dense(params["weights"], *sight, scale=config.feature_scale)
            for n in range(phases):
                field = 0j
                for k in range(config.num_modes):
                    field += silu(drive[k]) * complex(
                        params["modes_real"][k, n], params["modes_imag"][k, n]
                    )
                update[b, t, n] = (cmath.exp(-1j * theta[b, t, n]) * field).imag
    return update


def native_modes(params: Params, sight: list[Array], config: Any) -> Array:
    """Collective modes weighed by coherence, of one token: phases (and its field) -> dtheta [N]."""
    theta, phases = sight[0], len(sight[0])
    matrix = {
        name: params[f"{name}_real"] + 1j * params[f"{name}_imag"]
        for name in ("gate", "up", "down")
    }
    seen = []
    for n in range(phases):
        z = cmath.exp(1j * theta[n])
        if len(sight) == 3:
            gain = params["field_gain"]
            z *= 1 + gain[0, n] * sight[1][n] + 1j * gain[1, n] * sight[2][n]
        seen.append(config.feature_scale * z)
    total = [0j] * phases
    for k in range(config.num_modes):
        a = sum(seen[n] * matrix["gate"][n, k] for n in range(phases))
        b = sum(seen[n] * matrix["up"][n, k] for n in range(phases))
        size = (abs(b) ** 2 + 1e-4) ** 0.5
        weight = silu((a * b.conjugate()).real / size + params["bias"][k])
        for n in range(phases):
            total[n] += weight * b * matrix["down"][k, n]
    return np.array([(cmath.exp(-1j * theta[n]) * total[n]).imag for n in range(phases)])


def fsn_from_angles(params: Params, theta: Array, config: Any) -> Array:
    """The FSN after its embedding: theta [B, L, N] -> logits [B, L, V]."""
    theta = np.array(theta, dtype=np.float64)
    for i in range(config.num_layers):
        block = params[f"block_{i}"]
        attention = block.get("attention", {})
        torque = frustrated_attention(attention, theta, config)
        field = []
        if config.field_features:
            field = [frustrated_attention(attention, theta, config, math.cos), torque]
        theta = theta + torque
        theta = theta + feedforward(block.get("feedforward", {}), theta, config, *field)
    readout = params["readout"]
    return np.stack(
        [[features(x) @ readout["kernel"] + readout["bias"] for x in row] for row in theta]
    )


def fsn(params: Params, tokens: Array, config: Any) -> Array:
    """The FSN: tokens int [B, L] -> logits [B, L, V]."""
    return fsn_from_angles(params, params["embedding"]["angles"][np.asarray(tokens)], config)


# The baseline


def rms_norm(x: Array, scale: Array) -> Array:
    """x [D] -> x / sqrt(mean(x^2) + 1e-6) * scale."""
    return x / math.sqrt(sum(v * v for v in x) / len(x) + 1e-6) * scale


def rotate(x: Array, position: int, base: float) -> Array:
    """Rotate the pairs (x[p], x[p + d/2]) of one head [d] by position * base^(-p/(d/2))."""
    half = len(x) // 2
    turned = np.zeros(len(x))
    for p in range(half):
        angle = position * base ** (-p / half)
        turned[p] = x[p] * math.cos(angle) - x[p + half] * math.sin(angle)
        turned[p + half] = x[p] * math.sin(angle) + x[p + half] * math.cos(angle)
    return turned


def transformer_attention(params: Params, x: Array, config: Any) -> Array:
    """Causal RoPE attention: normed x [L, D] -> [L, D]."""
    length, width = x.shape
    size = width // config.num_heads
    query, key, value = (x @ params[name]["kernel"] for name in ("query", "key", "value"))
    for name, rows in (("query_shift", query), ("key_shift", key)):
        for t in reversed(range(1, length if name in params else 1)):
            rows[t] += params[name] * rows[t - 1]
    mixed = np.zeros((length, width))
    for h in range(config.num_heads):
        columns = slice(h * size, (h + 1) * size)
        scores = np.zeros((length, length))
        for t in range(length):
            q = rotate(query[t, columns], t, config.rotary_base)
            for u in range(t + 1):
                scores[t, u] = q @ rotate(key[u, columns], u, config.rotary_base) / math.sqrt(size)
        weights = causal_softmax(scores)
        for t in range(length):
            for u in range(t + 1):
                mixed[t, columns] += weights[t, u] * value[u, columns]
    return mixed @ params["output"]["kernel"]


def transformer(params: Params, tokens: Array, config: Any) -> Array:
    """The pre-norm RoPE-SwiGLU transformer: tokens int [B, L] -> logits [B, L, V]."""
    embedding = params["embedding"]["embedding"]
    logits = []
    for row in np.asarray(tokens):
        x = np.array([embedding[token] for token in row], dtype=np.float64)
        for i in range(config.num_layers):
            block = params[f"block_{i}"]
            normed = np.stack([rms_norm(v, block["attention_norm"]["scale"]) for v in x])
            x = x + transformer_attention(block["attention"], normed, config)
            mlp = block["feedforward"]
            for t in range(len(row)):
                v = rms_norm(x[t], block["feedforward_norm"]["scale"])
                gate, up = v @ mlp["gate"]["kernel"], v @ mlp["up"]["kernel"]
                hidden = np.array([silu(g) * y for g, y in zip(gate, up, strict=True)])
                x[t] = x[t] + hidden @ mlp["down"]["kernel"]
        normed = np.stack([rms_norm(v, params["final_norm"]["scale"]) for v in x])
        head = embedding.T if config.tied_embedding else params["readout"]["kernel"]
        logits.append(normed @ head)
    return np.stack(logits)


# Derivatives


def shifted(tree: Any, direction: Any, step: float) -> Any:
    """tree + step * direction; a branch that is absent from the direction stays as it is."""
    if isinstance(tree, Mapping):
        return {
            name: shifted(branch, direction[name], step) if name in direction else branch
            for name, branch in tree.items()
        }
    return tree + step * direction


def directional_derivative(
    function: Callable[[Any], float], tree: Any, direction: Any, step: float = 1e-5
) -> float:
    """Central difference of a scalar function of a float64 tree.

    Its error is of order step^2 (truncation) plus 1e-16 / step (rounding), both far below float32.
    """
    ahead = function(shifted(tree, direction, step))
    behind = function(shifted(tree, direction, -step))
    return (ahead - behind) / (2.0 * step)
