"""JAX's cache of compiled programs on disk, so that the next start does not compile again."""

import hashlib
import os
import platform
from pathlib import Path

import jax


def enable(folder: str | os.PathLike[str]) -> None:
    """Keep programs that are compiled from now on, unless the user has said where or not at all.

    JAX_COMPILATION_CACHE_DIR names another folder or bucket URL, and
    JAX_ENABLE_COMPILATION_CACHE=false none. A program for CPUs runs only on CPUs with the same
    instructions, so every kind of CPU has a folder of its own.

    Args:
      folder: where this machine keeps its caches; the programs lie under `programs/` in it.
    """
    # What the user has set, by variable or in a notebook, is not touched.
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    jax.config.update("jax_compilation_cache_dir", f"{folder}/programs/{_processor()}")
    # Small programs are kept as well: a start compiles many of them.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _processor() -> str:
    """A short name for the instruction set of this machine's CPU."""
    flags = _instruction_flags()
    digest = hashlib.md5(flags.encode(), usedforsecurity=False).hexdigest()
    return f"{platform.machine()}-{digest[:8]}"


def _instruction_flags() -> str:
    """The line in which Linux lists the CPU's instructions ("Features" on Arm), or its name."""
    # Other systems than Linux have no such file.
    info = Path("/proc/cpuinfo")
    lines = [platform.processor()]
    if info.exists():
        lines = info.read_text(encoding="utf8").splitlines()
    for line in lines:
        if line.startswith(("flags", "Features")):
            return line
    return lines[0]
