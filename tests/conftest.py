"""What all tests share: one cache of compiled programs, as many compile the same ones."""

import gc
import os
import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

# Processes that the tests start read the environment, this one has imported JAX before it could.
CACHE = os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", f"{tempfile.gettempdir()}/allattn-test-cache"
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
jax.config.update("jax_compilation_cache_dir", CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

# One device in this process, whichever test comes first; commands in processes of their own make
# one per core.
jax.config.update("jax_num_cpu_devices", 1)

# JAX keeps millions of objects alive, and Python looks through all of them for cycles: a tenth of
# the tests' time at Python's own thresholds.
gc.set_threshold(100_000, 50, 100)


@pytest.fixture
def own_data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test's processes share what is prepared, and leave nothing behind."""
    monkeypatch.setenv("ALLATTN_DATA_DIR", str(tmp_path / "prepared"))


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may become longer than 100 kB, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
