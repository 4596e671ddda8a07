"""A clear refusal of second derivatives, which the hand-written backward passes do not have."""

from typing import Any

import jax


@jax.custom_jvp
def first_order(values: Any) -> Any:
    """The same values, which cannot be differentiated: wraps what a hand-written backward pass starts from.

    Raises:
      NotImplementedError: a derivative of the backward pass is asked for.
    """
    return values


@first_order.defjvp
def _refuse(primals: tuple, tangents: tuple) -> tuple:
    raise NotImplementedError(
        "all_attention: expected first derivatives only, found a derivative of a gradient; "
        'implementation="reference" has all of them'
    )
