"""How large a network is."""

from typing import Any

import jax


def parameter_count(params: Any) -> int:
    """Number of scalar parameters.

    Args:
      params: tree of arrays, or of anything else with a size, such as jax.ShapeDtypeStruct.
    """
    return sum(array.size for array in jax.tree.leaves(params))
