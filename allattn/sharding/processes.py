"""Several processes that work on one model: how they find each other, agree, wait for each other and stop together.

The coordination service of `jax.distributed` carries short texts between them, before any device is
used.
"""

import functools
import itertools
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
from jax._src.distributed import global_state as _state  # the key-value store has no public name
from jax.experimental import multihost_utils

from allattn.errors import RunError, UserError, first_line

T = TypeVar("T")

FOREVER_MS = (
    7 * 24 * 3600 * 1000
)  # a lead that dies ends the others through the service, so this is never waited out
SHUTDOWN_SECONDS = 60
TOGETHER_MS = 10_000  # how far apart processes may be that come to the same end by themselves
_calls = itertools.count()  # every process asks the same questions in the same order
_asked = itertools.count(1)  # and as often whether to stop; never the same number twice


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    wait: int = 300,
) -> None:
    """Join the other processes of this run; to be called before JAX is first used.

    Without arguments the processes of a Cloud TPU slice, of SLURM, of Open MPI before 5 and of a
    Kubernetes job are found by `jax.distributed`; where there are none of these, this process is
    alone and nothing happens. `processes` 1 without a coordinator is alone wherever it runs.

    Args:
      coordinator: "host:port" at which process 0 can be reached; process 0 opens the port.
      processes: how many there are.
      process: which of them this is, from 0.
      wait: seconds until all must be there; after that every process that is there says so and
        exits with code 1.

    Raises:
      UserError: arguments that do not go together, or an MPI whose processes cannot be found.
    """
    given = (coordinator, processes, process)
    if given in ((None, 1, None), (None, 1, 0)):
        return
    if given != (None, None, None):
        _check(*given)
    options: dict[str, Any] = {"cluster_detection_method": "deactivate"} if processes else {}
    watch = threading.Timer(
        wait, functools.partial(_give_up, given, wait)
    )  # JAX itself would abort with a stack trace
    watch.daemon = True
    watch.start()
    try:
        jax.distributed.initialize(
            *given,
            initialization_timeout=wait + 60,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
            **options,
        )
    except ValueError as error:
        if processes or "coordinator_address should be defined" not in str(error):
            raise
    except RuntimeError as error:  # such as a port that is taken
        if not processes and "before any JAX calls" in str(error):
            return  # called by a program that uses JAX already, which is then alone
        raise RunError(
            f"process {process} of {processes}, coordinator {coordinator}: {first_line(error)}"
        ) from error
    finally:
        watch.cancel()
    if count() == 1 and not processes:
        _refuse_strangers()


def _refuse_strangers() -> None:
    """Each of several processes of one command would take itself for the only one, and do all of the work."""

    def refuse(name: str, expected: str) -> None:
        told = "--coordinator, --processes and --process (alone: --processes=1)"
        raise UserError(
            f"{name}={os.environ[name]}: expected {expected}, or {told}, found none of them"
        )

    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        size = os.environ.get(name, "")
        if size.isdecimal() and int(size) > 1:
            refuse(name, "an Open MPI before 5")
    pod = {
        "KUBERNETES_SERVICE_HOST",
        "JOB_COMPLETION_INDEX",
    } <= os.environ.keys()  # of how many, is not said
    if pod and _client() is None:  # JAX finds the one pod of a small TPU slice
        refuse("JOB_COMPLETION_INDEX", "the package kubernetes and the right to list pods")


def _check(coordinator: str | None, processes: int | None, process: int | None) -> None:
    if coordinator is None or processes is None or process is None:
        raise UserError(
            "expected --coordinator, --processes and --process together, or --processes=1, found only some of them"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"--coordinator: expected HOST:PORT, found {coordinator!r}")
    if not 0 <= process < processes:
        raise UserError(
            f"--process: expected a number from 0 to --processes - 1 = {processes - 1}, found {process}"
        )


def _give_up(given: tuple, wait: int) -> None:
    """End this process from another thread, since the one that waits does so inside JAX."""
    coordinator, processes, process = given
    who = "this process" if process is None else f"process {process} of {processes}"
    where = f" at {coordinator}" if coordinator else ""
    expected = (
        f"expected all processes at the coordinator{where} within {wait} s, found some missing"
    )
    advice = "start those, raise --wait, or work alone with --processes=1"
    print(f"allattn: {who}: {expected}; {advice}", file=sys.stderr, flush=True)
    os._exit(1)


def count() -> int:
    """How many processes there are; does not touch the devices, as `jax.process_count` does."""
    return _state.num_processes


def index() -> int:
    """Which of them this is."""
    return _state.process_id


def _client() -> Any:
    return _state.client


_KINDS: dict[str, type[Exception]] = {"UserError": UserError, "RunError": RunError}


def _kind(error: Exception) -> str:
    return "UserError" if isinstance(error, UserError) else "RunError"


def first_on_leader(name: str, action: Callable[[], T]) -> T:
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
            raise _KINDS[kind](text)
        return action()
    try:
        done = action()
    except (UserError, RunError) as error:
        _client().key_value_set(key, f"{_kind(error)}:{error}")
        raise
    _client().key_value_set(key, ":")
    return done


def describe_difference(theirs: str, mine: str) -> str:
    """That two texts differ, "" if they do not."""
    return "" if mine == theirs else f"{mine} in place of {theirs}"


def require_same_text(
    name: str, mine: str, differences: Callable[[str, str], str] = describe_difference
) -> None:
    """Refuse, on every process, to go on if one was started with another text than process 0.

    Args:
      name: of the text, as in "configuration".
      mine: the text of this process.
      differences: from the texts of process 0 and of this one to what differs, "" if nothing does.

    Raises:
      UserError: names a process that differs, and in what.
    """
    _agree(f"allattn/{next(_calls)}/{name}", name, mine, differences)


def require_same_result(name: str, action: Callable[[], T], text: Callable[[T], str]) -> T:
    """Do something on every process, and refuse on all of them to go on if one fails or finds something else.

    Args:
      name: of what is found, as in "checkpoint".
      action: what every process does.
      text: what must be the same of its result.

    Returns:
      What the action gives on this process.

    Raises:
      UserError, RunError: on every process; what this process met if all met the same, else which
        process differs, and in what.
    """
    key, error, found = (
        f"allattn/{next(_calls)}/{name}",
        None,
        None,
    )  # before the action, which may fail between calls
    try:
        found = action()
        mine = text(found)
    except (UserError, RunError) as met:
        error, mine = met, str(met)
    _agree(key, name, mine, describe_difference, _kind(error) if error else "")
    if error:
        raise error
    return cast(T, found)


def _agree(
    key: str, name: str, mine: str, differences: Callable[[str, str], str], kind: str = ""
) -> None:
    """Refuse on every process what differs; `kind`: of the error that this one met, if it did."""
    if count() == 1:
        return

    def say(what: str | int, kind: str, text: str) -> None:
        _client().key_value_set(f"{key}/{what}", f"{kind}:{text}")

    def hear(what: str | int) -> tuple[str, str]:
        kind, _, text = _client().blocking_key_value_get(f"{key}/{what}", FOREVER_MS).partition(":")
        return kind, text

    if index():
        say(index(), kind, differences(hear(0)[1], mine))
    else:
        say(0, kind, mine)
        heard = [(i, *hear(i)) for i in range(1, count())]
        odd, theirs, differs = next((answer for answer in heard if answer[2]), (0, "", ""))
        found = differs and f"process {odd} has another {name} than process 0: {differs}"
        kind = (
            "RunError" if "RunError" in (kind, theirs) else "UserError"
        )  # what failed may go well the next time
        say("verdict", kind, found)
    kind, found = hear("verdict")
    if found:
        raise _KINDS[kind](found)


class Preemption:
    """Whether this run's machines are about to be taken away (SIGTERM); all processes learn of it at the same call.

    Use as a context manager around the calls; every process must make the same ones.
    """

    def __init__(self) -> None:
        self.reached = False
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
            self.reached = multihost_utils.reached_preemption_sync_point(next(_asked))
        return self.reached


def stop(code: int) -> None:
    """End this process with an exit code; alone: do nothing.

    Where all come to the same end they wait for each other, since one that leaves without a word
    looks like a crash and the service then aborts the others. A mistake or failure that perhaps
    only this process met waits a few seconds for the others to come to it as well, and an error
    that nobody foresaw does not wait.
    """
    if count() == 1:
        return
    error = sys.exc_info()[1]
    if error is not None:
        traceback.print_exc()
        where = f"process {index()} of {count()}"
        print(
            f"allattn: {where} failed, perhaps since another stopped: {first_line(error)}",
            file=sys.stderr,
        )
    sys.stdout.flush()
    sys.stderr.flush()
    if error is None and (code == 0 or _all_stop()):
        jax.distributed.shutdown()
    os._exit(code)  # without what libraries do at exit, which may wait for processes that are gone


def _all_stop() -> bool:
    """Whether the others come to an end too; without them JAX would wait longer, and then abort."""
    try:
        _client().wait_at_barrier("allattn/stop", TOGETHER_MS)
    except jax.errors.JaxRuntimeError:  # somebody is late, or gone
        return False
    return True
