"""Python code in a process of its own, which may have any number of devices."""

import json
import os
import subprocess
import sys
from typing import Any

from command_line import TEST_PATH


def fresh(code: str, devices: int | None = None, **environment: str) -> Any:
    """The JSON that code prints last in a new process."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": TEST_PATH, **environment}
    environment.pop("XLA_FLAGS", None)
    if devices:
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])
