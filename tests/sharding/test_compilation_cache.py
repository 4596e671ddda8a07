"""Where compiled programs are kept, as long as the user has not said where."""

from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

from allattn.sharding import compilation_cache

SETTINGS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture
def settings() -> Iterator[None]:
    """JAX's own settings, as before any command; those of the tests come back."""
    before = {name: jax.config.values[name] for name in SETTINGS}
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_programs_beside_the_data(settings: None, tmp_path: Path) -> None:
    """Each kind of processor has a folder of its own; small programs are kept too."""
    compilation_cache.enable(tmp_path)
    folder = Path(jax.config.values["jax_compilation_cache_dir"])
    assert folder.parent == tmp_path / "programs" and len(folder.name.split("-")[-1]) == 8
    assert jax.config.values["jax_persistent_cache_min_compile_time_secs"] == 0


def test_a_folder_of_the_user(settings: None, tmp_path: Path) -> None:
    """A folder that was set by variable or in a notebook stays."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    compilation_cache.enable(tmp_path)
    assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path / "own")
    assert jax.config.values["jax_persistent_cache_min_compile_time_secs"] == 1
