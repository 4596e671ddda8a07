"""Several processes that train one model: how they find each other, agree, wait for each other and stop together.

The coordination service of `jax.distributed` carries short texts between them, before any device is used.
"""

import functools
import itertools
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax._src.distributed import global_state as _state  # the key-value store has no public name
from jax.experimental import multihost_utils

from allattn.errors import RunError, UserError

T = TypeVar("T")

FOREVER_MS = 7 * 24 * 3600 * 1000  # a lead that dies ends the others through the service, so this is never waited out
SHUTDOWN_SECONDS = 60
_calls = itertools.count()  # every process asks the same questions in the same order


def start(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None, wait: int = 300
) -> None:
    """Join the other processes of this run; to be called before JAX is first used.

    Without arguments the processes of a Cloud TPU slice, of SLURM, Open MPI and of a Kubernetes job are found by
    `jax.distributed`; where there are none of these, this process is alone and nothing happens.

    Args:
      coordinator: "host:port" at which process 0 can be reached; process 0 opens the port.
      processes: how many there are.
      process: which of them this is, from 0.
      wait: seconds until all must be there; after that every process that is there says so and exits with code 1.

    Raises:
      UserError: arguments that do not go together, or an MPI whose processes cannot be found.
    """
    given = (coordinator, processes, process)
    if given != (None, None, None):
        _check(*given)
    options: dict[str, Any] = {"cluster_detection_method": "deactivate"} if processes else {}
    watch = threading.Timer(wait, functools.partial(_give_up, given, wait))  # JAX itself would abort with a stack trace
    watch.daemon = True
    watch.start()
    try:
        jax.distributed.initialize(
            *given, initialization_timeout=wait + 60, shutdown_timeout_seconds=SHUTDOWN_SECONDS, **options
        )
    except ValueError as error:
        if processes or "coordinator_address should be defined" not in str(error):
            raise
    except RuntimeError as error:  # such as a port that is taken
        if not processes and "before any JAX calls" in str(error):
            return  # called by a program that uses JAX already, which is then alone
        raise RunError(f"process {process} of {processes}, coordinator {coordinator}: {_first_line(error)}") from error
    finally:
        watch.cancel()
    if count() == 1 and not processes:
        _refuse_strangers()


def _refuse_strangers() -> None:
    """Each of several processes that took itself for the only one would write into the same workdir."""
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if int(os.environ.get(name, 1)) > 1:
            expected = "the processes of an Open MPI before 5, or --coordinator, --processes and --process"
            raise UserError(f"{name}={os.environ[name]}: expected {expected}, found none of them")


def _check(coordinator: str | None, processes: int | None, process: int | None) -> None:
    if coordinator is None or processes is None or process is None:
        raise UserError("expected --coordinator, --processes and --process together, found only some of them")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"--coordinator: expected HOST:PORT, found {coordinator!r}")
    if not 0 <= process < processes:
        raise UserError(f"--process: expected a number from 0 to --processes - 1 = {processes - 1}, found {process}")


def _give_up(given: tuple, wait: int) -> None:
    """End this process from another thread, since the one that waits does so inside JAX."""
    coordinator, processes, process = given
    who = "this process" if process is None else f"process {process} of {processes}"
    where = f" at {coordinator}" if coordinator else ""
    expected = f"expected all processes at the coordinator{where} within {wait} s"
    print(f"allattn: {who}: {expected}, found some missing; start those, or raise --wait", file=sys.stderr, flush=True)
    os._exit(1)


def count() -> int:
    """How many processes there are; does not touch the devices, as `jax.process_count` does."""
    return _state.num_processes


def index() -> int:
    """Which of them this is."""
    return _state.process_id


def _client() -> Any:
    return _state.client


def lead(name: str, action: Callable[[], T]) -> T:
    """Do something on process 0 first, such as preparing data, and then on the others.

    Args:
      name: of what is done, for the service.
      action: what every process does; where disks are shared, process 0 has done it for the others.

    Returns:
      What the action gives on this process.

    Raises:
      UserError, RunError: on every process, if process 0 meets one.
    """
    if count() == 1:
        return action()
    key = f"allattn/{next(_calls)}/{name}"
    if index():
        kind, _, text = _client().blocking_key_value_get(key, FOREVER_MS).partition(":")
        if kind:
            raise {"UserError": UserError, "RunError": RunError}[kind](text)
        return action()
    try:
        done = action()
    except (UserError, RunError) as error:
        kind = "UserError" if isinstance(error, UserError) else "RunError"
        _client().key_value_set(key, f"{kind}:{error}")
        raise
    _client().key_value_set(key, ":")
    return done


def other(theirs: str, mine: str) -> str:
    """That two texts differ, "" if they do not."""
    return "" if mine == theirs else f"{mine} in place of {theirs}"


def agree(name: str, mine: str, differences: Callable[[str, str], str] = other) -> None:
    """Refuse, on every process, to go on if one was started with another text than process 0.

    Args:
      name: of the text, as in "configuration".
      mine: the text of this process.
      differences: from the texts of process 0 and of this one to what differs, "" if nothing does.

    Raises:
      UserError: names a process that differs, and in what.
    """
    if count() == 1:
        return
    key, client = f"allattn/{next(_calls)}/{name}", _client()
    if index():
        theirs = client.blocking_key_value_get(f"{key}/0", FOREVER_MS)
        client.key_value_set(f"{key}/{index()}", f":{differences(theirs, mine)}")
    else:
        client.key_value_set(f"{key}/0", mine)
        found = [client.blocking_key_value_get(f"{key}/{i}", FOREVER_MS)[1:] for i in range(1, count())]
        odd = next((i for i, differs in enumerate(found) if differs), None)
        where = "" if odd is None else f"process {odd + 1} has another {name} than process 0: {found[odd]}"
        client.key_value_set(f"{key}/verdict", f":{where}")
    verdict = client.blocking_key_value_get(f"{key}/verdict", FOREVER_MS)[1:]
    if verdict:
        raise UserError(verdict)


class Preemption:
    """Whether this run's machines are about to be taken away (SIGTERM); all processes learn of it at the same call.

    Use as a context manager around the calls; every process must make the same ones.
    """

    def __init__(self) -> None:
        self.reached = False
        self._calls = itertools.count(1)
        self._alone = count() == 1
        self._before: Any = None

    def __enter__(self) -> "Preemption":
        if self._alone and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "reached", True))
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def __call__(self) -> bool:
        """Ask once more; once true, it stays true."""
        if not self._alone and not self.reached:
            self.reached = multihost_utils.reached_preemption_sync_point(next(self._calls))
        return self.reached


def stop(code: int) -> None:
    """End this process with an exit code; alone: do nothing.

    Where all come to the same end they wait for each other, since one that leaves without a word looks like a crash
    and the service then aborts the others. After an error, which only this process may have met, it leaves at once.
    """
    if count() == 1:
        return
    error = sys.exc_info()[1]
    if error is not None:
        traceback.print_exc()
        where = f"process {index()} of {count()}"
        print(f"allattn: {where} failed, perhaps since another stopped: {_first_line(error)}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if error is None:
        jax.distributed.shutdown()
    os._exit(code)  # without what libraries do at exit, which may wait for processes that are gone


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
