"""How large the tiles of an implementation are.

Measured for some devices and sizes; the others get a default.

The table `tuned.json` lists what `python -m benchmarks.attention --tune` found: device, sizes of
the call, tiles, the time before and after, date and versions.
"""

import json
import math
from importlib import resources
from typing import Any, NamedTuple

import jax

from allattn.errors import UserError, first_line


class XlaTiles(NamedTuple):
    """Tiles of the XLA implementation.

    Queries of one row in a tile are a quarter of the distances, between `few` and `queries`.
    """

    queries: int = 128
    few: int = 64
    # Weights worked on at once, if rows are grouped: products of many queries run faster.
    elements: int = 2**20


class TpuTiles(NamedTuple):
    """Tiles of the TPU kernels."""

    # 128 at most, and a multiple of 128.
    queries: int = 128
    keys: int = 512
    # Keys that a step of the grid holds, a power of two; less on a TPU with little memory.
    segment: int = 16384


class GpuTiles(NamedTuple):
    """Tiles of the GPU kernels, powers of two; keys are also distances and persistent pairs."""

    queries: int = 64
    keys: int = 64
    # Queries in a tile of the kernel whose sums over queries take most registers.
    few: int = 32
    # How Triton runs a program: its warps, and how many loads it keeps in flight.
    warps: int = 4
    stages: int = 3


# What was measured nowhere near, and what `python -m benchmarks.attention --tune` measured.
DEFAULTS: dict[str, Any] = {"xla": XlaTiles(), "pallas_tpu": TpuTiles(), "pallas_gpu": GpuTiles()}
# The sizes that a call is compared by.
SIZES = {"T", "L", "N", "K"}


def read_table(text: str) -> list[dict[str, Any]]:
    """The rows of `tuned.json`, each checked.

    Raises:
      UserError: the text is none that `benchmarks.tune` writes.
    """
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"tuned.json: expected JSON, found {first_line(error)}") from error
    # A list of rows, of which others may follow.
    if not isinstance(rows, list):
        raise UserError(f"tuned.json: expected a list, found {rows!r:.80}")
    for row in rows:
        if not _is_row(row):
            raise UserError(f"tuned.json: expected rows of tiles, found {row!r:.200}")
    return rows


def _is_row(row: Any) -> bool:
    """Whether tiles of an implementation that there is were measured for sizes of a call."""
    if not isinstance(row, dict) or not isinstance(row.get("device"), str):
        return False
    # A name that cannot be one, such as a list, is looked up as text.
    default = DEFAULTS.get(str(row.get("implementation")))
    sizes = row.get("sizes")
    tiles = row.get("tiles")
    if default is None or not isinstance(sizes, dict) or not isinstance(tiles, dict):
        return False
    if set(sizes) != SIZES or not set(tiles) <= set(default._fields):
        return False
    # A truth value is a whole number to Python.
    numbers = [*sizes.values(), *tiles.values()]
    return all(type(x) is int and 0 <= x < 2**31 for x in numbers) and all(tiles.values())


TABLE = read_table(resources.files(__package__).joinpath("tuned.json").read_text(encoding="utf8"))


def device() -> tuple[str, str]:
    """Platform and kind of the device that the code is traced for."""
    # An abstract mesh names its device where code is compiled for another machine.
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described:
        return described.platform, described.device_kind
    return jax.default_backend(), jax.devices()[0].device_kind


def tiles(implementation: str, **sizes: int) -> Any:
    """Tile sizes of the nearest call that was measured on this kind of device, or the default.

    Args:
      implementation: a name that `all_attention` knows, not "reference".
      **sizes: T, L, N and K of the call.

    Returns:
      XlaTiles, TpuTiles or GpuTiles.
    """
    default = DEFAULTS[implementation]
    _, kind = device()
    measured = [
        row for row in TABLE if row["implementation"] == implementation and row["device"] == kind
    ]
    if not measured:
        return default

    # Sizes matter by their ratios: compare logarithms, of 1 + size since N may be 0.
    def far(row: dict[str, Any]) -> float:
        return sum(
            abs(math.log2((1 + row["sizes"][name]) / (1 + size))) for name, size in sizes.items()
        )

    nearest = min(measured, key=far)
    return default._replace(**nearest["tiles"])
