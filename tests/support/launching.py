"""Launchers run to their ends, and waiting for what they start."""

import os
import subprocess
import time
from collections.abc import Callable
from typing import Any

from command_line import ROOT

LAUNCH = ROOT / "launch"
TRAIN = ["python", "-m", "allattn", "train", "--config=configs/demo.py", "--workdir=runs/my run"]
QUOTED = r"python -m allattn train --config=configs/demo.py --workdir=runs/my\ run"


def launch(script: str, *words: Any, **environment: str) -> subprocess.CompletedProcess:
    """A launcher run to its end."""
    command = ["bash", str(LAUNCH / script), *map(str, words)]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def eventually(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline, "waited 30 s"
        time.sleep(0.02)
