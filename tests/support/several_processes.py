"""Several processes on this machine that run one command over gloo."""

import signal
import socket
import time
from pathlib import Path
from typing import Any

from command_line import Result, flags, write_texts
from new_process import NewProcess

from allattn import data

# Four devices or more share rows, heads and parameters; nothing depends on the number of steps.
RUN = {
    "model__width": 32,
    "model__heads": 2,
    "train__batch": 8,
    "train__finetune_steps": 0,
    "checkpoint__every": 4,
}
RUN |= {"evaluate__every": 100_000, "optimizer__schedule": "constant", "model__dropout": 0.2}
COMMAND = "import sys; from allattn.__main__ import main; sys.exit(main())"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def prepared_texts(folder: Path) -> Path:
    """Texts that are prepared already, so that a process has nothing to say of that."""
    texts = write_texts(folder)
    data.prepare("files", texts, numbering="appearance")
    return texts


class Processes:
    """`count` processes of one program; those that are left when the test ends are killed."""

    def __init__(
        self,
        count: int,
        devices: int,
        words: Any,
        own: Any = lambda _: {},
        code: Any = lambda _: COMMAND,
    ) -> None:
        """`words` gives the command of one process, `own` its settings in the environment, `code`
        the Python that it runs.
        """
        self.port = free_port()
        self.count = count
        self.running = [
            NewProcess(code(i), words(i, self), devices, **own(i)) for i in range(count)
        ]

    def place(self, i: int) -> list[str]:
        """Flags of one of them."""
        shared = [f"--coordinator=localhost:{self.port}", f"--processes={self.count}", "--wait=150"]
        return [*shared, f"--process={i}"] if self.count > 1 else []

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.running:
            process.kill()

    def send(self, what: signal.Signals) -> None:
        for process in self.running:
            process.send_signal(what)

    def results(self, seconds: float = 200) -> list[Result]:
        return [process.result(seconds) for process in self.running]


def train(
    texts: Path,
    workdir: Path,
    processes: int,
    devices: int,
    each: Any = lambda _: {},
    before: Any = lambda _: "",
    **changes: Any,
) -> Processes:
    """A training run; `each` gives the settings of one process, `before` lines of Python that it
    runs first.
    """

    def words(i: int, started: Processes) -> list[str]:
        settings = flags(texts, **{**RUN, **changes, **each(i)})
        return ["train", f"--workdir={workdir}", *settings, *started.place(i)]

    return Processes(processes, devices, words, code=lambda i: f"{before(i)}\n{COMMAND}")


def evaluate(
    workdir: Path,
    processes: int,
    devices: int,
    *words: str,
    each: Any = lambda _: [],
    before: str = "",
) -> Processes:
    """A score of a run's newest checkpoint; `each` gives the words of one process, `before` are
    lines of Python that all run first.
    """

    def all_words(i: int, started: Processes) -> list[str]:
        return ["evaluate", f"--workdir={workdir}", *words, *each(i), *started.place(i)]

    return Processes(processes, devices, all_words, code=lambda _: f"{before}\n{COMMAND}")


def wait_for(folder: Path, pattern: str, ready: Any = lambda _: True, seconds: float = 150) -> None:
    """Until a file of the folder that has this name is ready."""
    deadline = time.monotonic() + seconds
    while not any(map(ready, folder.glob(pattern))):
        assert time.monotonic() < deadline, pattern
        time.sleep(0.05)


def expect(results: list[Result], code: int, line: str) -> None:
    assert [
        (result.code, result.err.strip().splitlines()[-1], result.out) for result in results
    ] == [(code, line, "")] * len(results)
