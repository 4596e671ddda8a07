"""Layer normalisation with a backward pass of its own.

    y = (h - mean) / sqrt(variance + 1e-5) * scale + bias      (Ba et al. 2016, arXiv 1607.06450)

where mean and variance are over the features of one position.

Why not JAX's derivative of this line: it keeps three arrays of the input's size for the backward
pass, in float32 since the statistics are. For states in bfloat16 that is six times the memory of
the input, in every layer. The pass below keeps only the input and normalises it again, a few
operations per feature that the compiler fuses with those around them. With x the normalised states
and x' the gradient with regard to them, the gradient of the input is the usual

    h' = (x' - mean(x') - x mean(x' x)) / sqrt(variance + 1e-5)

`test_layer_norm_gradient` (tests/model/test_model.py) compares it with JAX's in float64, and
`test_layer_norm_epsilon` fixes the constant.

Dimension key: B batch, T position in the block, D model width, 1 one number per position.
"""

import jax
import jax.numpy as jnp

Array = jax.Array

# Added to the variance; PyTorch's default, which the papers' code leaves as it is.
EPSILON = 1e-5


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
