"""Several processes of one run: what one of them does before the others."""

import collections
import json
from collections.abc import Callable
from typing import Any, TypeVar

from jax._src.distributed import global_state  # its key-value store has no public name

from allattn.errors import RunError, UserError

T = TypeVar("T")

_LEAD_SECONDS = 3600  # enough to download and prepare the largest data set
_turns: collections.Counter[str] = collections.Counter()


def lead(name: str, action: Callable[[], T]) -> T:
    """Does something on process 0 first, and then, if it went well there, on the others.

    Every process calls it, in the same order for each name.

    Args:
      name: of the action, in messages.
      action: what each process does; what process 0 did may save the others the work.

    Returns:
      What the action returned in this process.

    Raises:
      UserError, RunError: as the action raised it on process 0, on every process; RunError also where process 0 gives
        no answer.
    """
    client = global_state.client
    if client is None or global_state.num_processes == 1:
        return action()
    key = f"allattn/{name}/{_turns[name]}"
    _turns[name] += 1
    if global_state.process_id:
        _wait_for(client, key, name)
        return action()
    try:
        result = action()
    except Exception as error:
        kind = UserError if isinstance(error, UserError) else RunError
        client.key_value_set(key, json.dumps([kind.__name__, str(error)]))
        raise
    client.key_value_set(key, json.dumps(None))
    return result


def _wait_for(client: Any, key: str, name: str) -> None:
    """Returns when process 0 has done its part; raises what it raised."""
    try:
        failure = json.loads(client.blocking_key_value_get(key, _LEAD_SECONDS * 1000))
    except RuntimeError as error:  # of the coordination service: too late, or gone
        raise RunError(f"{name}: process 0 gave no answer within {_LEAD_SECONDS} s: {error}") from error
    if failure:
        kind, text = failure
        raise UserError(text) if kind == "UserError" else RunError(f"process 0: {text}")
