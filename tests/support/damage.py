"""Damage to bytes and to JSON, drawn by hypothesis, and what a reader may do about it."""

import copy
import json
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from allattn.errors import RunError, UserError

# The same few examples on every machine, and many where time is no matter.
QUICK = settings(max_examples=20)
THOROUGH = settings(max_examples=1000)
COMMON = settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
# Memory that a reader of a small file may take at once, in bytes.
MEMORY = 50_000_000
# What a field may hold that has no business there.
STRANGE = [None, True, -1, 2**70, 1.5, float("nan"), float("inf"), "", "\x00", "x", [], {}, [[]]]
STRANGE += ["9" * 5000, {"step": 1}, ["\n"], [1, "\n"], "../../x", "\ud800"]


def both(test: Callable) -> Any:
    """The two profiles as parameters of a test, which wraps its inner function in one of them."""
    slow = pytest.param(THOROUGH, marks=pytest.mark.slow, id="thorough")
    return pytest.mark.parametrize("profile", [pytest.param(QUICK, id="quick"), slow])(test)


def run(profile: settings, test: Callable[[], None]) -> None:
    """Run a property with the profile's number of examples."""
    settings(COMMON, max_examples=profile.max_examples)(test)()


@st.composite
def damaged(draw: Callable, content: bytes) -> bytes:
    """Bytes with one to three places flipped, cut, filled with zeros, repeated or overwritten."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(changed) - 1)))
        length = draw(st.integers(1, 64))
        kind = draw(st.sampled_from(["flip", "end", "cut", "zeros", "repeat", "insert", "ones"]))
        if kind == "flip" and changed:
            changed[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "end":
            del changed[at:]
        elif kind == "cut":
            del changed[at : at + length]
        elif kind == "repeat":
            changed[at:at] = changed[at : at + length]
        elif kind == "insert":
            changed[at:at] = draw(st.binary(max_size=16))
        else:
            fill = b"\xff" if kind == "ones" else b"\0"
            changed[at : at + length] = fill * len(changed[at : at + length])
    return bytes(changed)


def damaged_text(text: str) -> st.SearchStrategy[str]:
    """The same of a text of ASCII; what is not Unicode any more is replaced."""
    return damaged(text.encode()).map(lambda changed: changed.decode(errors="replace"))


@st.composite
def damaged_json(draw: Callable, value: Any) -> Any:
    """A value of JSON with one to three members replaced, removed or added."""
    changed = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        # A copy, since later damage may go on in it.
        strange = copy.deepcopy(draw(st.sampled_from(STRANGE)))
        changed = _damaged_somewhere(draw, changed, strange)
    return changed


def _damaged_somewhere(draw: Callable, value: Any, strange: Any) -> Any:
    # The whole, or something further in.
    if not isinstance(value, dict | list) or not value or draw(st.integers(0, 3)) == 0:
        return strange
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = draw(st.sampled_from(keys))
    kind = draw(st.sampled_from(["in", "in", "replace", "remove", "add"]))
    if kind == "in":
        value[key] = _damaged_somewhere(draw, value[key], strange)
    elif kind == "replace":
        value[key] = strange
    elif kind == "remove":
        del value[key]
    elif isinstance(value, dict):
        value["another"] = strange
    else:
        value.insert(key, strange)
    return value


def refuses_or_reads(read: Callable[[], Any]) -> Any:
    """What a reader returns; None where it refuses with one line. Anything else is a fault.

    Nothing may take much memory meanwhile.
    """
    tracemalloc.start()
    try:
        return read()
    except (UserError, RunError) as error:
        line = str(error)
        assert line and "\n" not in line and len(line) < 1000, line
        return None
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MEMORY
