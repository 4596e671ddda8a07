"""Python code in processes of its own, which may have any number of devices.

They are copies of one process, which has imported the package and has used no device: a test does
not wait for imports, which take longer than most of what it runs. Commands that start anew, with
every import of their own, are in tests/launch/, test_cli.py and, two that train together, in
`test_work_per_process`.
"""

import atexit
import json
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
from command_line import ROOT, TEST_PATH, Result
from jax._src import compiler

# The package, and what it imports where it is needed.
IMPORTED = ["allattn.__main__", "allattn.train", "allattn.run", "allattn.data.builders"]
IMPORTED += ["tensorboardX.event_file_writer", "command_line", "tiny_model"]
# What JAX reads when it is imported, for all copies.
SURROUNDINGS = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": TEST_PATH}
_originals = multiprocessing.get_context("forkserver")


class NewProcess:
    """A process that runs Python code with words as `sys.argv`, from the repository's root.

    Args:
      code: Python code.
      words: follow the code's name in `sys.argv`.
      devices: how many it has; None: as many as the code makes.
      environment: variables besides those of this process; settings of JAX (JAX_...) as JSON.
    """

    def __init__(
        self, code: str, words: Sequence[str] = (), devices: int | None = None, **environment: str
    ) -> None:
        _start_original()
        variables = {**os.environ, **SURROUNDINGS, **environment}
        variables.pop("XLA_FLAGS", None)
        if devices:
            variables["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
        settings = {
            name.lower(): json.loads(value)
            for name, value in environment.items()
            if name.startswith("JAX_")
        }
        # Files take any amount of output, and nobody has to read them meanwhile.
        self._said = tempfile.TemporaryDirectory()
        arguments = (code, [str(word) for word in words], variables, settings, self._said.name)
        self._process = _originals.Process(target=_run, args=arguments)
        self._process.start()

    def send_signal(self, what: signal.Signals) -> None:
        if self._process.exitcode is None:
            os.kill(self._process.pid, what)

    def result(self, seconds: float = 300) -> Result:
        """Exit code and output, once it has ended."""
        self._process.join(seconds)
        said = [(Path(self._said.name) / name).read_text() for name in ("out", "err")]
        assert self._process.exitcode is not None, said
        return Result(self._process.exitcode, *said)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self._said.cleanup()


def _start_original() -> None:
    """Start the process of which the others are copies, unless it is there."""
    _originals.set_forkserver_preload([*IMPORTED, __name__])
    with mock.patch.dict(os.environ, SURROUNDINGS):
        os.environ.pop("XLA_FLAGS", None)
        forkserver.ensure_running()


# It ends before this process does, and its time counts as time of this process.
atexit.register(forkserver._forkserver._stop)


def _run(
    code: str, words: list[str], variables: dict[str, str], settings: dict[str, Any], said: str
) -> None:
    """What a copy does."""
    # Its output and its surroundings. JAX has read its variables when it was imported.
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{said}/{name}", os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(variables)
    for name, value in settings.items():
        jax.config.update(name, value)
    os.chdir(ROOT)
    # JAX lets process 0 alone keep what it compiles, and on CPUs the others have no use for that.
    first = SimpleNamespace(process_id=0, client=None)
    compiler.distributed = SimpleNamespace(global_state=first)
    sys.argv = ["-c", *words]
    exec(code, {"__name__": "__main__"})


def fresh(code: str, devices: int | None = None, **environment: str) -> Any:
    """The JSON that code prints last in a new process."""
    process = NewProcess(code, devices=devices, **environment)
    try:
        done = process.result()
    finally:
        process.kill()
    assert done.code == 0, done.err[-2000:]
    return json.loads(done.out.splitlines()[-1])
