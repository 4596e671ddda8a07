"""The table of tile sizes, and the search that fills it."""

import json
from pathlib import Path
from typing import Any

import pytest

from allattn.attention import tuning
from benchmarks import tune

SIZES = {"T": 128, "L": 256, "N": 512, "K": 64}


def row(queries: int, **changes: Any) -> dict[str, Any]:
    return {
        "implementation": "xla",
        "device": "cpu",
        "sizes": SIZES,
        "tiles": {"queries": queries},
        **changes,
    }


def test_the_nearest_measured_call_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    larger = row(256, sizes={**SIZES, "L": 8192})
    other = row(512, device="TPU v4")
    monkeypatch.setattr(tuning, "TABLE", [row(32), larger, other])
    assert tuning.tiles("xla", **SIZES) == tuning.XlaTiles(queries=32)
    assert tuning.tiles("xla", **{**SIZES, "L": 5000}).queries == 256
    assert tuning.tiles("pallas_gpu", **SIZES) == tuning.GpuTiles()


def test_the_table_is_well_formed() -> None:
    """Every row names its machine, and has tiles that its implementation knows."""
    for found in tuning.TABLE:
        assert (
            set(found["sizes"]) == set(SIZES)
            and found["date"]
            and found["jax"]
            and found["machine"]
        )
        assert found["ms"] <= found["default_ms"]
        tuning.DEFAULTS[found["implementation"]]._replace(**found["tiles"])


def test_the_search_finds_what_is_fastest() -> None:
    """Only a gain beyond noise counts; tiles that do not fit are passed over."""
    best = tuning.XlaTiles(queries=256, few=32)

    def seconds(tiles: tuning.XlaTiles) -> float:
        assert tuning.tiles("xla", **SIZES) == tiles  # they are in force
        if tiles.elements == 2**21:
            raise RuntimeError("out of memory")
        return (
            1.0
            + sum(a != b for a, b in zip(tiles, best, strict=True)) / 4
            - (tiles.elements == 2**18) / 1000
        )

    found = tune.tune("xla", SIZES, seconds, repeats=1)
    assert found["tiles"] == best._asdict() and found["ms"] == 1000 and found["default_ms"] == 1500


def test_a_row_replaces_its_predecessor(tmp_path: Path) -> None:
    path = tmp_path / "tuned.json"
    path.write_text("[]")
    for found in (row(64), row(32, device="TPU v4"), row(128)):
        tune.enter(found, path)
    assert [(r["device"], r["tiles"]["queries"]) for r in json.loads(path.read_text())] == [
        ("TPU v4", 32),
        ("cpu", 128),
    ]
