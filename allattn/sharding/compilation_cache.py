"""Compiled programs, kept for the next start."""

import hashlib
import platform
from pathlib import Path

import jax

from allattn.data import cache_dir


def keep() -> None:
    """Keep what is compiled from now on beside the prepared data, unless the user has said where, or not at all.

    JAX_COMPILATION_CACHE_DIR names another folder or bucket URL, and
    JAX_ENABLE_COMPILATION_CACHE=false none. Programs for CPUs run only on CPUs with the same
    instructions, so every kind has a folder of its own.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", f"{cache_dir()}/programs/{_processor()}")
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _processor() -> str:
    """A short name of the instructions that this machine's CPU has."""
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else [platform.processor()]
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), lines[0])
    return (
        f"{platform.machine()}-{hashlib.md5(flags.encode(), usedforsecurity=False).hexdigest()[:8]}"
    )
