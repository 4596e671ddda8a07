"""A run that cannot be computed as it is asked for is refused before it is compiled."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from command_line import call, flags, trainer, write_texts

from allattn.errors import UserError
from allattn.train import memory


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_a_model_larger_than_memory(tmp_path: Path, own_data_dir: None) -> None:
    """In seconds, in one line, and nothing is written into the workdir."""
    texts = write_texts(tmp_path)
    begin = time.monotonic()
    words = flags(texts, model__width=10**6, model__heads=2)
    found = call("train", f"--workdir={tmp_path}/run", *words)
    assert found.code == 2 and time.monotonic() - begin < 20
    line = found.err.splitlines()[-1]
    assert "expected arrays within the " in line and "found at least 59,6" in line
    assert "parameters 14,9" in line and not (tmp_path / "run").exists()


def test_what_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_data_dir: None
) -> None:
    """The state, gradients, layer inputs and logits; a memory of that size is enough."""
    by = trainer(write_texts(tmp_path))
    state, _ = by.fresh_state()
    counted = memory.bytes_of_device(by.config, by.mesh, state)
    parameters = sum(x.nbytes for x in jax.tree.leaves(state.params))
    assert counted == {
        "parameters": parameters,
        "gradients": parameters,
        "optimizer": sum(x.nbytes for x in jax.tree.leaves(state.optimizer)),
        "cache": state.cache.nbytes,
        "layer inputs": 1 * 4 * 16 * 16 * 4,  # depth x rows x block x width x bytes
        "logits": 4 * 16 * 9 * 4,  # rows x block x symbols x bytes
    }
    total = sum(counted.values())
    monkeypatch.setattr(memory, "memory_of_device", lambda _: total)
    memory.check_fits(by.config, by.mesh, state)
    monkeypatch.setattr(memory, "memory_of_device", lambda _: total - 1)
    with pytest.raises(UserError, match="^model and train.batch: expected arrays within the 0.0 G"):
        memory.check_fits(by.config, by.mesh, state)


def test_float64_needs_jax_with_64_bits(tmp_path: Path, own_data_dir: None) -> None:
    """Otherwise JAX would compute in float32 without a word."""
    texts = write_texts(tmp_path)
    with jax.enable_x64(True):
        assert trainer(texts, model__dtype="float64").model.config.dtype == "float64"
    with pytest.raises(UserError, match="^model.dtype: .*JAX_ENABLE_X64=1.* found float64$"):
        trainer(texts, model__dtype="float64")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"proc/meminfo": "MemTotal: 64 kB\nSwapTotal: 8 kB\n"}, 72 * 1024),
        # A group within another that has less, in version 2.
        (
            {
                "proc/meminfo": "MemTotal: 64 kB\n",
                "proc/self/cgroup": "0::/job/step\n",
                "sys/fs/cgroup/job/memory.max": "4096\n",
                "sys/fs/cgroup/job/step/memory.max": "max\n",
            },
            4096,
        ),
        # Version 1, whose number for no limit is larger than any memory.
        (
            {
                "proc/meminfo": "MemTotal: 64 kB\n",
                "proc/self/cgroup": "3:cpu:/a\n2:memory:/b\n0::/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/b/memory.limit_in_bytes": "8192\n",
            },
            8192,
        ),
    ],
)
def test_memory_of_a_machine(tmp_path: Path, files: dict[str, str], expected: int | None) -> None:
    write(tmp_path, files)
    assert memory.machine_memory(tmp_path) == expected


def test_memory_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """An accelerator's own; CPU devices share the machine's; unknown where nobody tells."""

    def mesh(platform: str, stats: dict[str, int] | None) -> Any:
        device = SimpleNamespace(platform=platform, memory_stats=lambda: stats)
        return SimpleNamespace(local_devices=[device, device])

    monkeypatch.setattr(memory, "machine_memory", lambda: 100)
    assert memory.memory_of_device(mesh("cpu", None)) == 50
    assert memory.memory_of_device(mesh("gpu", {"bytes_limit": 7})) == 7
    assert memory.memory_of_device(mesh("tpu", None)) is None
