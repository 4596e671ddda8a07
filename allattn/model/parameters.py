"""How large a network is, what its parameters are called, and whether they can be one's.

Dimension key: X layer, H head.
"""

from typing import Any

import jax
import jax.numpy as jnp

from allattn.errors import UserError


def parameter_count(params: Any) -> int:
    """Number of scalar parameters.

    Args:
      params: tree of arrays, or of anything else with a size, such as jax.ShapeDtypeStruct.
    """
    return sum(array.size for array in jax.tree.leaves(params))


def parameter_name(path: tuple[Any, ...]) -> str:
    """A path of JAX's tree functions as text, such as "layers/query"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def check_spans(params: Any, where: str) -> None:
    """Refuse spans that training cannot leave.

    Args:
      params: parameters of a network; those without learned spans pass.
      where: what holds them, for the message.

    Raises:
      UserError: a span is NaN, or outside 0 to 1, its share of the limit.
    """
    if "span" not in params["layers"]:
        return
    # Two numbers that every process has, whatever the mesh; NaN is both.
    span_XH = params["layers"]["span"]
    shortest = float(jnp.min(span_XH))
    longest = float(jnp.max(span_XH))
    if not (shortest >= 0 and longest <= 1):
        raise UserError(
            f"{where}: expected spans from 0 to 1, as shares of the limit, "
            f"found {shortest:g} to {longest:g}"
        )
