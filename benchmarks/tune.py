"""The search for tile sizes: one of them at a time, the candidates timed in turn.

`python -m benchmarks.attention --tune` runs it. The table of what was found is data of the package.
"""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from allattn.attention import tuning

CANDIDATES: dict[str, dict[str, tuple[int, ...]]] = {
    "xla": {
        "queries": (64, 128, 256),
        "few": (32, 64, 128),
        "elements": (2**18, 2**19, 2**20, 2**21),
    },
    "pallas_tpu": {"keys": (256, 512, 1024), "segment": (2048, 16384)},
    "pallas_gpu": {
        "queries": (64, 128),
        "keys": (32, 64),
        "few": (16, 32, 64),
        "warps": (4, 8),
        "stages": (1, 2, 3),
    },
}
GAIN = 0.97  # of the time before; what is less may be noise


def tune(
    implementation: str, sizes: dict[str, int], seconds: Callable[[Any], float], repeats: int
) -> dict[str, Any]:
    """Improve the default, parameter by parameter, then time the best beside the default once more.

    Args:
      implementation: a name in CANDIDATES.
      sizes: T, L, N and K of the call.
      seconds: how long the call takes, given its tiles, which are in force meanwhile.
      repeats: timings of each candidate.

    Returns:
      A row of the table but for the machine.
    """
    default = tuning.DEFAULTS[implementation]
    best = default
    for name, values in CANDIDATES[implementation].items():
        # The best so far against itself with another value of this parameter.
        rivals = [best]
        for value in values:
            if value != getattr(best, name):
                rivals.append(best._replace(**{name: value}))
        times = _times(implementation, rivals, seconds, repeats)
        fastest = min(times, key=lambda tiles: times[tiles])
        if times[fastest] < GAIN * times[best]:
            best = fastest

    # Gains of several steps add up to one that must be seen again.
    times = _times(implementation, [default, best], seconds, repeats)
    if times[best] >= GAIN * times[default]:
        best = default
    return {
        "implementation": implementation,
        "device": tuning.device()[1],
        "sizes": sizes,
        "tiles": best._asdict(),
        "default_ms": round(times[default] * 1e3, 2),
        "ms": round(times[best] * 1e3, 2),
    }


def _times(
    implementation: str, rivals: list, seconds: Callable[[Any], float], repeats: int
) -> dict[Any, float]:
    """Medians, the rivals taken in turn; for one that does not fit the machine infinity."""
    times: dict[Any, list[float]] = {tiles: [] for tiles in rivals}
    for repeat in range(repeats + 1):
        for tiles, measured in times.items():
            second = _seconds(implementation, tiles, seconds)
            if repeat:  # the first compiles
                measured.append(second)
    return {tiles: statistics.median(measured) for tiles, measured in times.items()}


def _seconds(implementation: str, tiles: Any, seconds: Callable[[Any], float]) -> float:
    """How long a call takes with some tiles, which are the default and the only ones meanwhile."""
    defaults = tuning.DEFAULTS
    table = tuning.TABLE
    try:
        tuning.DEFAULTS = defaults | {implementation: tiles}
        tuning.TABLE = []
        return seconds(tiles)
    except Exception as error:  # whatever a compiler raises where tiles are too large for it
        print(f"{tiles}: {str(error).splitlines()[0][:200]}", flush=True)
        return float("inf")
    finally:
        tuning.DEFAULTS = defaults
        tuning.TABLE = table


def enter(row: dict[str, Any], path: Path = Path(tuning.__file__).with_name("tuned.json")) -> None:
    """Put a row into the table; it replaces that of the same device and sizes."""

    def key_of(row: dict[str, Any]) -> tuple:
        return row["implementation"], row["device"], tuple(sorted(row["sizes"].items()))

    rows = {key_of(old): old for old in json.loads(path.read_text(encoding="utf8"))}
    rows[key_of(row)] = row
    lines = ",\n".join(json.dumps(rows[key]) for key in sorted(rows))
    path.write_text(f"[\n{lines}\n]\n", encoding="utf8")
