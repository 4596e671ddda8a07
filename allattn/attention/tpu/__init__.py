"""The operation as two fused TPU kernels, forward and backward, in Pallas.

`skew` moves logits from positions to keys, `tile` says where a tile of queries lies among the keys,
`operands` lays out the arguments, `call` calls a kernel; `forward` and `backward` are the kernels.
On a CPU they run interpreted.

Dimension key: B batch, T query position, N persistent pair, H head, K head width, G group of P
heads that share lanes.
"""

import functools

import jax
import jax.numpy as jnp

from allattn.attention.autodiff import forbid_second_derivative, name_for_remat
from allattn.attention.contract import Dynamic, Inputs, Static, refuse_what_kernels_lack
from allattn.attention.tpu.backward import BackwardOperands, in_shape_of, run_backward
from allattn.attention.tpu.forward import run_forward
from allattn.attention.tpu.operands import (
    apart,
    heads_apart,
    joined,
    operands_of,
    scalars_of,
    side_by_side,
    sizes_of,
)

Array = jax.Array


def all_attention(static: Static, inputs: Inputs, dynamic: Dynamic) -> tuple[Array, Array]:
    """The operation of `allattn.attention.all_attention`, whose docstring gives the arguments.

    Returns:
      out_BTHK in the query's dtype and mass_BTH in float32.

    Raises:
      NotImplementedError: there is a span_epsilon, or the dtype is neither float32 nor bfloat16.
    """
    refuse_what_kernels_lack("pallas_tpu", static, inputs)
    return _attention(static, inputs, dynamic)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: Static, inputs: Inputs, dynamic: Dynamic) -> tuple[Array, Array]:
    results, _ = _attention_forward(static, inputs, dynamic)
    return results


def _attention_forward(
    static: Static, inputs: Inputs, dynamic: Dynamic
) -> tuple[tuple[Array, Array], tuple]:
    # A second derivative would enter the kernel here, which has none.
    inputs = forbid_second_derivative(inputs)
    sizes = sizes_of(static, inputs)
    scalars = scalars_of(static, inputs, dynamic)
    outputs = run_forward(static, sizes, scalars, operands_of(static, sizes, inputs, scalars))

    # What the backward pass starts from is named, so that rematerialisation may keep it.
    out_BTHK = heads_apart(outputs.out, inputs.query_BTHK)
    out_BTHK, lse_BGTP = name_for_remat(out_BTHK, outputs.lse)
    T = inputs.query_BTHK.shape[1]
    mass_BTGP = outputs.mass.transpose(0, 2, 1, 3)
    mass_BTH = mass_BTGP.reshape(sizes.B, sizes.T, sizes.H)[:, :T]
    # Heads stay side by side in what is kept: a TPU stores narrow ones with positions along lanes.
    _, _, H, K = out_BTHK.shape
    kept = joined(static, inputs), out_BTHK.reshape(sizes.B, T, H * K), lse_BGTP
    return (out_BTHK, mass_BTH), (kept, dynamic)


def _attention_backward(
    static: Static, residuals: tuple, cotangents: tuple[Array, Array]
) -> tuple[Inputs, None]:
    # The share of persistent pairs has no gradient.
    (inputs, out_BTE, lse_BGTP), dynamic = residuals
    d_out_BTHK, _ = cotangents
    _, _, H, K = d_out_BTHK.shape
    inputs = apart(static, inputs, H, K)
    out_BTHK = out_BTE.reshape(d_out_BTHK.shape)
    differentiable = (inputs, out_BTHK, lse_BGTP, d_out_BTHK)
    inputs, out_BTHK, lse_BGTP, d_out_BTHK = forbid_second_derivative(differentiable)
    sizes = sizes_of(static, inputs)
    scalars = scalars_of(static, inputs, dynamic)

    # out . d_out of every query, in the layout of the log-sum-exp.
    delta_BTH = jnp.sum(d_out_BTHK.astype(jnp.float32) * out_BTHK.astype(jnp.float32), axis=-1)
    delta_BTH = jnp.pad(delta_BTH, ((0, 0), (0, sizes.T - delta_BTH.shape[1]), (0, 0)))
    delta_BTGP = delta_BTH.reshape(sizes.B, sizes.T, -1, sizes.heads)
    operands = BackwardOperands(
        operands=operands_of(static, sizes, inputs, scalars),
        d_out=side_by_side(sizes, d_out_BTHK, sizes.T),
        lse=lse_BGTP,
        delta=delta_BTGP.transpose(0, 2, 1, 3),
    )
    gradients = run_backward(static, sizes, scalars, operands)
    return in_shape_of(inputs, static, sizes, scalars, gradients), None


_attention.defvjp(_attention_forward, _attention_backward)
