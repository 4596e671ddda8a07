"""Keys and values of a layer's context, computed only as far back as the layer's spans reach.

In training, the cache holds the inputs of every layer, not keys and values: those follow the
parameters, which change with every step. So each step projects the cached states anew. Most
learned spans are short (Sukhbaatar et al. 2019, arXiv 1905.07799), and a layer needs only the
states that its longest span and ramp reach:

    cache of layer x    [ . . . . . . . . . . . . . . . . . . . . . ]  S states, oldest first
    within reach                            [ . . . . . . . . . . ]  `size` of them, projected
    block                                                           [ . . . . ]  T states
    keys and values     [ . . . . . . . 0 0 0 k k k k k k k k k k k   k k k k ]

The reach is known only at run time and differs by layer, while shapes are static. Therefore code
for a few sizes is compiled, and a `lax.switch` inside the scan over layers runs one of them. It
recompiles nothing when spans grow.

What it costs without: with 18 layers of width 512, blocks of 512 tokens and spans like the paper's
up to L = 8192, projecting as much as the longest span needs in every layer takes 164 GFLOP per row
and block. Projecting by layer takes 72, and attention itself 29.

Why a gradient of its own: JAX differentiates a switch by keeping the residuals of all branches.
Here the backward pass is a second switch over the same inputs.

`test_projections_follow_the_reach` (tests/model/test_model.py) compares values and gradients with
the plain products; `test_cache_beyond_reach_is_not_read` holds what is read.

Dimension key: X layer, B batch, T position in the block, S cached position (in keys and values:
cached and block), H head, K head width, E all heads side by side, D model width.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from allattn.attention.xla.tiles import reach_sizes
from allattn.model.norm import layer_norm

Array = jax.Array

# Keys beyond reach that an implementation may read: at most as many as it works on at once.
LARGEST_TILE = 1024


class InputNorm(NamedTuple):
    """Parameters of the norm before both projections."""

    scale_D: Array
    bias_D: Array


class Kernels(NamedTuple):
    """Weights of both projections, and what normalises the states before them."""

    key_DHK: Array
    value_DHK: Array
    # With pre_norm. It gets a gradient from the cached states as well, as the weights do.
    norm: InputNorm | None = None


def project(kernel_DHK: Array, states_BSD: Array) -> Array:
    """Projection of states to all heads.

    One product with the heads side by side, the layout that attention kernels read: a TPU would
    transpose the result of an einsum.

    Args:
      kernel_DHK: weights.
      states_BSD: states; the product is in their dtype.

    Returns:
      Projected states, as out_BSHK.
    """
    _, H, K = kernel_DHK.shape
    B, S, _ = states_BSD.shape
    out_BSE = states_BSD @ _side_by_side(kernel_DHK, states_BSD.dtype)
    return out_BSE.reshape(B, S, H, K)


def _side_by_side(kernel_DHK: Array, dtype: Any) -> Array:
    """Weights as kernel_DE; parameters are in float32, products in the activations' dtype."""
    D, H, K = kernel_DHK.shape
    return kernel_DHK.astype(dtype).reshape(D, H * K)


def project_both(kernels: Kernels, states_BSD: Array) -> tuple[Array, Array]:
    """Keys and values of states, as key_BSHK and value_BSHK; those of zeros are zeros."""
    if kernels.norm is not None:
        # Zeros stand for what was before the text. Inference has no states, but keys and values of
        # zeros there.
        is_state_BS1 = (states_BSD != 0).any(-1, keepdims=True)
        normalised_BSD = layer_norm(states_BSD, kernels.norm.scale_D, kernels.norm.bias_D)
        states_BSD = jnp.where(is_state_BS1, normalised_BSD, 0)
    return project(kernels.key_DHK, states_BSD), project(kernels.value_DHK, states_BSD)


def lengths(S: int, T: int) -> tuple[int, ...]:
    """Numbers of cached states for which code is compiled, ascending; the last is S.

    None is below a quarter of the block, except S itself: beside a long block, a few states more
    cost less than one choice more.
    """
    return tuple(size for size in reach_sizes(S) if size >= T // 4 or size == S)


def last_states(cache_XBSD: Array, x: Array | int, length: int) -> Array:
    """The last `length` cached states of layer x, as cache_BSD."""
    # Layer and states are cut out by one slice, which reads nothing else.
    _, B, S, D = cache_XBSD.shape
    return jax.lax.dynamic_slice(cache_XBSD, (x, 0, S - length, 0), (1, B, length, D))[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def project_one_of(
    sizes: tuple[int, ...],
    filled: bool,
    choice: Array | int,
    x: Array | int,
    kernels: Kernels,
    cache_XBSD: Array,
    h_BTD: Array,
) -> tuple[Array, Array]:
    """Keys and values of one layer's context, from one of several numbers of cached states.

    Args:
      sizes: from `lengths`; static.
      filled: whether there are zeros where nothing is projected, for those who read them; static.
      choice: index in `sizes`, int32, may be traced.
      x: the layer, may be traced. Its states are read inside the branch that runs.
      kernels: weights of the layer.
      cache_XBSD: earlier inputs of all layers; no gradient.
      h_BTD: inputs of the layer in this block.

    Returns:
      key_BSHK and value_BSHK of S cached states and the block. Those of cached states before the
      last sizes[choice] are zeros; if not `filled`, only of the nearest `LARGEST_TILE` of them, and
      others may be anything, even not a number.
    """
    # One branch for each size. The whole cache is an operand: only the branch that runs reads its
    # part of it.
    branches = [functools.partial(_project_last, size, filled) for size in sizes]
    key_BSE, value_BSE = jax.lax.switch(choice, branches, x, kernels, cache_XBSD, h_BTD)
    # Heads go apart out here: a TPU stores narrow ones with positions along lanes, and the results
    # of a branch as they are.
    B, S, _ = key_BSE.shape
    _, H, K = kernels.key_DHK.shape
    return key_BSE.reshape(B, S, H, K), value_BSE.reshape(B, S, H, K)


def _project_last(
    size: int, filled: bool, x: Array | int, kernels: Kernels, cache_XBSD: Array, h_BTD: Array
) -> tuple[Array, ...]:
    """Keys and values of the last `size` cached states and the block, as key_BSE and value_BSE.

    Cache and block are projected separately, each into its place: concatenating the states first
    makes a step on a CPU 3 % slower.
    """
    S = cache_XBSD.shape[2]
    cache_BSD = last_states(cache_XBSD, x, size)
    cached = project_both(kernels, cache_BSD)
    new = project_both(kernels, h_BTD)

    # So that all branches have one shape, there is room for states that no head looks at. Left as
    # it is, it still has zeros where an implementation that works on whole tiles may read.
    def placed(cached_BSHK: Array, new_BTHK: Array) -> Array:
        B, T, H, K = new_BTHK.shape
        shape = (B, S + T, H * K)
        first_zero = max(0, S - size - LARGEST_TILE)
        out_BSE = jnp.zeros(shape, h_BTD.dtype)
        if not filled:
            out_BSE = jax.lax.empty(shape, h_BTD.dtype)
            zeros_BSE = jnp.zeros((B, S - size - first_zero, H * K), h_BTD.dtype)
            out_BSE = _put(out_BSE, zeros_BSE, first_zero)
        out_BSE = _put(out_BSE, cached_BSHK.reshape(B, size, H * K), S - size)
        return _put(out_BSE, new_BTHK.reshape(B, T, H * K), S)

    return tuple(map(placed, cached, new))


def _put(out_BSE: Array, part_BSE: Array, first: int) -> Array:
    """The array with a part of its positions replaced."""
    return jax.lax.dynamic_update_slice_in_dim(out_BSE, part_BSE, first, 1)


def _forward(
    sizes: tuple[int, ...],
    filled: bool,
    choice: Array | int,
    x: Array | int,
    kernels: Kernels,
    cache_XBSD: Array,
    h_BTD: Array,
) -> tuple[tuple[Array, Array], tuple]:
    # The inputs are all that is kept.
    out = project_one_of(sizes, filled, choice, x, kernels, cache_XBSD, h_BTD)
    return out, (choice, x, kernels, cache_XBSD, h_BTD)


def _backward(
    sizes: tuple[int, ...], filled: bool, inputs: tuple, d_out: tuple[Array, Array]
) -> tuple:
    del filled
    # The same choice again, among branches that each compute the gradient of theirs.
    choice, x, kernels, cache_XBSD, h_BTD = inputs
    branches = [functools.partial(_gradients_last, size) for size in sizes]
    d_kernels, d_h_BTD = jax.lax.switch(choice, branches, x, kernels, cache_XBSD, h_BTD, d_out)
    # No gradient of choice, layer number and cache.
    return None, None, d_kernels, None, d_h_BTD


def _gradients_last(
    size: int,
    x: Array | int,
    kernels: Kernels,
    cache_XBSD: Array,
    h_BTD: Array,
    d_out: tuple[Array, Array],
) -> tuple[Kernels, Array]:
    """Gradients of kernels and block for `_project_last`, as d_kernels and d_h_BTD."""
    # Only what was projected: zeros before it depend on nothing.
    S = cache_XBSD.shape[2]
    states_BSD = jnp.concatenate([last_states(cache_XBSD, x, size), h_BTD], axis=1)

    # The kernels' gradients, by one product over cache and block each: two products would be
    # summed over the devices of a mesh separately.
    _, pull_kernels = jax.vjp(lambda kernels: project_both(kernels, states_BSD), kernels)
    (d_kernels,) = pull_kernels(_from(S - size, d_out))

    # The gradient of the block's states, which come last.
    _, pull_h = jax.vjp(lambda h_BTD: project_both(kernels, h_BTD), h_BTD)
    (d_h_BTD,) = pull_h(_from(S, d_out))
    return d_kernels, d_h_BTD


def _from(first: int, d_out: tuple[Array, Array]) -> tuple[Array, Array]:
    """Gradients of keys and values from a position on."""
    d_key_BSHK, d_value_BSHK = d_out
    return d_key_BSHK[:, first:], d_value_BSHK[:, first:]


project_one_of.defvjp(_forward, _backward)
