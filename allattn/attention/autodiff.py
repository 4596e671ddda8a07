"""What the hand-written backward passes start from.

It is named for rematerialisation, and it cannot be differentiated again: a second derivative would
enter a kernel, which has none.
"""

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

# The name of the operation's results, for `jax.checkpoint_policies.save_only_these_names`.
NAME = "all_attention"


def name_for_remat(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The same arrays: what a backward pass needs of its forward pass, besides the inputs."""
    return tuple(checkpoint_name(x, NAME) for x in arrays)


@jax.custom_jvp
def forbid_second_derivative(values: Any) -> Any:
    """The same values, which cannot be differentiated.

    Wraps what a hand-written backward pass starts from.

    Raises:
      NotImplementedError: a derivative of the backward pass is asked for.
    """
    return values


@forbid_second_derivative.defjvp
def _refuse(primals: tuple, tangents: tuple) -> tuple:
    # JAX comes here only to differentiate, never to compute the values.
    raise NotImplementedError(
        "all_attention: expected first derivatives only, found a derivative of a gradient; "
        'implementation="reference" has all of them'
    )
