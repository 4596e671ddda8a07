"""What all tests share: one compilation cache, since many of them compile the same small programs."""

import tempfile
from pathlib import Path

import jax
import pytest

jax.config.update("jax_compilation_cache_dir", tempfile.gettempdir() + "/allattn-test-cache")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

# One device in this process, whichever test comes first; commands in processes of their own make
# one per core.
jax.config.update("jax_num_cpu_devices", 1)


@pytest.fixture
def own_data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test's processes share what is prepared, and leave nothing behind."""
    monkeypatch.setenv("ALLATTN_DATA_DIR", str(tmp_path / "prepared"))
