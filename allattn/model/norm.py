"""Layer normalisation and RMS normalisation, each with a backward pass of its own.

    y = (h - mean) / sqrt(variance + 1e-5) * scale + bias      (Ba et al. 2016, arXiv 1607.06450)
    y = x / sqrt(mean of squares + 1e-6)                   (Zhang and Sennrich, arXiv 1910.07467)

where mean and variance are over the features of one position, or of one head.

Why not JAX's derivative of these lines: it keeps three arrays of the input's size for the backward
pass, in float32 since the statistics are. For states in bfloat16 that is six times the memory of
the input, in every layer. The pass below keeps only the input and normalises it again, a few
operations per feature that the compiler fuses with those around them. With x the normalised states
and x' the gradient with regard to them, the gradient of the input is the usual

    h' = (x' - mean(x') - x mean(x' x)) / sqrt(variance + 1e-5)

and of RMS normalisation the same without mean(x').

`test_layer_norm_gradient` and `test_rms_norm` (tests/model/test_model.py) compare them with JAX's
in float64, and `test_layer_norm_epsilon` fixes the constant.

Dimension key: B batch, T position in the block, H head, K head width, D model width, 1 one number
per position.
"""

import jax
import jax.numpy as jnp

Array = jax.Array

# Added to the variance; PyTorch's default, which the papers' code leaves as it is.
EPSILON = 1e-5
# Added to the mean of squares: a state of zeros stays zeros.
RMS_EPSILON = 1e-6


# --- layer normalisation


@jax.custom_vjp
def layer_norm(h_BTD: Array, scale_D: Array, bias_D: Array) -> Array:
    """Layer normalisation, statistics at least in float32.

    Args:
      h_BTD: states.
      scale_D: factor of every feature.
      bias_D: added to every feature.

    Returns:
      h_BTD in the dtype of the input. Only the input is kept for the backward pass.
    """
    x_BTD, _ = _normalised(h_BTD)
    return (x_BTD * scale_D.astype(x_BTD.dtype) + bias_D.astype(x_BTD.dtype)).astype(h_BTD.dtype)


def _normalised(h_BTD: Array) -> tuple[Array, Array]:
    """Normalised states, and 1 / sqrt(variance + epsilon) as inverse_BT1."""
    # The mean is taken out first: the variance of centred states loses no digits.
    x_BTD = h_BTD.astype(jnp.promote_types(h_BTD.dtype, jnp.float32))
    x_BTD = x_BTD - x_BTD.mean(-1, keepdims=True)
    inverse_BT1 = jax.lax.rsqrt(jnp.square(x_BTD).mean(-1, keepdims=True) + EPSILON)
    return x_BTD * inverse_BT1, inverse_BT1


def _forward(
    h_BTD: Array, scale_D: Array, bias_D: Array
) -> tuple[Array, tuple[Array, Array, Array]]:
    return layer_norm(h_BTD, scale_D, bias_D), (h_BTD, scale_D, bias_D)


def _backward(inputs: tuple[Array, Array, Array], d_out_BTD: Array) -> tuple[Array, Array, Array]:
    h_BTD, scale_D, bias_D = inputs

    # Normalise again, and multiply by the scale as the forward pass does.
    x_BTD, inverse_BT1 = _normalised(h_BTD)
    d_out_BTD = d_out_BTD.astype(x_BTD.dtype)
    d_x_BTD = d_out_BTD * scale_D.astype(x_BTD.dtype)

    # Mean and deviation depend on every feature: take out what only moves or stretches the states.
    shift_BT1 = d_x_BTD.mean(-1, keepdims=True)
    centred_BTD = d_x_BTD - shift_BT1
    stretch_BT1 = (d_x_BTD * x_BTD).mean(-1, keepdims=True)
    d_h_BTD = centred_BTD - x_BTD * stretch_BT1

    # The parameters are shared by all positions.
    d_scale_D = (d_out_BTD * x_BTD).sum((0, 1))
    d_bias_D = d_out_BTD.sum((0, 1))
    return (
        (d_h_BTD * inverse_BT1).astype(h_BTD.dtype),
        d_scale_D.astype(scale_D.dtype),
        d_bias_D.astype(bias_D.dtype),
    )


layer_norm.defvjp(_forward, _backward)


# --- RMS normalisation


def normalise_heads(x_BTHK: Array, gain_H: Array) -> Array:
    """RMS normalisation over the width of every head, with a gain for each.

    Args:
      x_BTHK: queries, keys or outputs of all heads.
      gain_H: factor of every head.

    Returns:
      x_BTHK in its dtype; zeros stay zeros.
    """
    return rms_norm(x_BTHK) * gain_H[:, None].astype(x_BTHK.dtype)


@jax.custom_vjp
def rms_norm(x_BTHK: Array) -> Array:
    """RMS normalisation over the last axis, statistics at least in float32.

    Args:
      x_BTHK: numbers of any rank.

    Returns:
      The same in their dtype, with a mean of squares of 1. Only the input is kept for the backward
      pass.
    """
    unit_BTHK, _ = _unit(x_BTHK)
    return unit_BTHK.astype(x_BTHK.dtype)


def _unit(x_BTHK: Array) -> tuple[Array, Array]:
    """Normalised numbers, and 1 / sqrt(mean of squares + epsilon) as inverse_BTH1."""
    x_BTHK = x_BTHK.astype(jnp.promote_types(x_BTHK.dtype, jnp.float32))
    inverse_BTH1 = jax.lax.rsqrt(jnp.square(x_BTHK).mean(-1, keepdims=True) + RMS_EPSILON)
    return x_BTHK * inverse_BTH1, inverse_BTH1


def _rms_forward(x_BTHK: Array) -> tuple[Array, Array]:
    return rms_norm(x_BTHK), x_BTHK


def _rms_backward(x_BTHK: Array, d_out_BTHK: Array) -> tuple[Array]:
    # The size depends on every number: take out what only stretches them.
    unit_BTHK, inverse_BTH1 = _unit(x_BTHK)
    d_out_BTHK = d_out_BTHK.astype(unit_BTHK.dtype)
    stretch_BTH1 = (d_out_BTHK * unit_BTHK).mean(-1, keepdims=True)
    d_x_BTHK = (d_out_BTHK - unit_BTHK * stretch_BTH1) * inverse_BTH1
    return (d_x_BTHK.astype(x_BTHK.dtype),)


rms_norm.defvjp(_rms_forward, _rms_backward)
