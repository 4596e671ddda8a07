"""What every benchmark says of the machine that it ran on."""

import datetime
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import jax

# Sides of square matrices whose product keeps the machine busy.
CPU_SIZE = 2048
GPU_SIZE = 8192


def matmul_gflops(dtype: str = "float32") -> float:
    """Rate of a square matrix product that keeps the machine busy, the median of ten."""
    size = CPU_SIZE if jax.default_backend() == "cpu" else GPU_SIZE
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()  # compiles
    times = [seconds(lambda: product(x)) for _ in range(10)]
    return 2 * size**3 / statistics.median(times) / 1e9


def seconds(run: Callable[[], Any]) -> float:
    """How long a call takes, its results included."""
    began = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - began


def provenance() -> dict[str, str]:
    """Machine, devices, version, date and commit of a run."""
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "devices": f"{jax.device_count()} {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
    }


def _commit() -> str:
    """Short hash of the checkout that runs; "" outside one.

    It ends in "-dirty" if files have changed, other than the results that a benchmark writes.
    """

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    changes = git("status", "--porcelain", "--", ":/", ":(top,exclude)benchmarks/results")
    commit = git("rev-parse", "--short", "HEAD")
    return f"{commit}-dirty" if changes else commit
