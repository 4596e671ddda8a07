"""The signals that stop a run, and the command `train` where it has no loop yet to obey them.

    signal            what it means                  exit code
    SIGTERM, SIGHUP   as of a machine taken away     75
    SIGINT            Ctrl-C                         130

Until a run has something to save, the first of them ends the command at once. Then the loop takes
it (`sharding.processes.Preemption`), saves and stops; only a second one ends the command at once.

Python calls handlers in the main thread, between two of its own instructions: not while that thread
compiles or waits for a device. And what a handler raises may be lost, as in JAX's callback of the
garbage collector. So nothing is raised here, and a thread watches beside the main one.

Nothing here imports JAX: the command installs this before it does.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

# Exit codes by signal.
STOPPING = {signal.SIGTERM: 75, signal.SIGHUP: 75, signal.SIGINT: 130}

Handlers = dict[signal.Signals, Any]


def install(handler: Callable, numbers: Iterable[signal.Signals] = STOPPING) -> Handlers:
    """Handle signals, but for those that this process is to ignore, as under nohup.

    Args:
      handler: called with the number and a frame.
      numbers: which signals.

    Returns:
      What handled them before, for `restore`.
    """
    before: Handlers = {}
    for number in numbers:
        if signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, handler)
    return before


def restore(handlers: Handlers) -> None:
    """Let signals be handled as they were before `install`."""
    for number, handler in handlers.items():
        # None: by a library, not by Python, which cannot bring it back.
        if handler is not None:
            signal.signal(number, handler)


def end_at_once(number: int, _: Any = None) -> NoReturn:
    """End this process with a line and the exit code of a signal."""
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    # A live line on the screen has hidden the terminal's cursor.
    if os.isatty(1):
        os.write(1, b"\x1b[?25h\n")
    # Not by print: the main thread may be in the middle of one.
    os.write(2, f"allattn: ended at once by {name}; run again to resume\n".encode())
    os._exit(STOPPING[signal.Signals(number)])


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
    """Within, a signal that stops ends this process, unless a loop takes the first one."""
    # Python allows handlers in the main thread alone.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # Python's own handler, below all Python code, writes the number of each signal into the pipe.
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    descriptor = signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    handlers = install(end_at_once)
    threading.Thread(target=_watch, args=(readable,), daemon=True).start()
    try:
        yield
    finally:
        restore(handlers)
        signal.set_wakeup_fd(descriptor)
        os.close(writable)


def _watch(readable: int) -> None:
    """End this process where the main thread cannot, until the pipe is closed."""
    noted = False
    while received := os.read(readable, 1):
        number = received[0]
        if number not in STOPPING:
            continue
        # The second signal, or the first while no loop has taken them.
        if noted or signal.getsignal(number) is end_at_once:
            end_at_once(number)
        noted = True
        if os.isatty(2):
            os.write(2, b"allattn: stopping after this step; once more ends at once\n")
    os.close(readable)
