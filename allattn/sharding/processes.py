"""Several processes that work on one model: how they join, agree, wait for each other and stop.

The coordination service of `jax.distributed`, which process 0 runs, keeps short texts under keys.
A process writes a key once, and another one waits until it is there. No device is used. Every
process makes the same calls in the same order, so the number of a call names its keys.

`first_on_leader`: process 0 acts before the others.

    process 0, the leader             key                        processes 1, 2, ...
    action()
    "" or the error       --------->  allattn/0/run  --------->  raise the same error, or action()

`require_same_text` and `require_same_result`: all stop if one of them differs from process 0.

    process 0, the leader             key                        process i
    its own text          --------->  .../data set/0  -------->  compares it with its own text
    reads all answers     <---------  .../data set/i  <--------  what differs, "" if nothing
    the first difference  --------->  .../data set/verdict --->
    raise it                                                     raise it

Without these a process that found a mistake would end alone, and the others would wait for it in
the next collective until the service aborts all of them with a stack trace. Held by
tests/sharding/test_processes*.py.
"""

import functools
import itertools
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import jax
from jax._src.distributed import global_state as _state  # the key-value store has no public name
from jax.experimental import multihost_utils

from allattn import signals
from allattn.errors import PreemptedError, RunError, StoppedByKeyboard, UserError, first_line

T = TypeVar("T")

# The service ends the others when a leader dies, so this limit is never reached.
READ_TIMEOUT_MS = 7 * 24 * 3600 * 1000

# How long a process that is done waits for the others to be done.
SHUTDOWN_SECONDS = 60

# How long a process that found a mistake waits for the others to finish, too.
FINISH_TIMEOUT_MS = 10_000

# The number of the next call; every process counts the same calls.
_calls = itertools.count()

# The number of the next question whether to stop; never the same number twice.
_preemption_checks = itertools.count(1)


# --- joining -------------------------------------------------------------------------------------


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    wait: int = 300,
) -> None:
    """Join the other processes of this run; to be called before JAX is first used.

    Without arguments `jax.distributed` finds the processes of a Cloud TPU slice, of SLURM, of Open
    MPI before version 5 and of a Kubernetes job. Where there are none of these, this process works
    alone and nothing happens. With `processes` 1 and no coordinator it works alone wherever it
    runs.

    Args:
      coordinator: "host:port" at which process 0 can be reached; process 0 opens the port.
      processes: how many there are.
      process: which of them this is, from 0.
      wait: seconds until all must be there; after that every process that is there says so and
        exits with code 1.

    Raises:
      UserError: arguments that do not go together, or an MPI whose processes cannot be found.
      RunError: the coordination service cannot start, as when its port is taken.
    """
    # One process on request: there is nobody to join.
    if coordinator is None and processes == 1 and process in (None, 0):
        return
    by_flags = (coordinator, processes, process) != (None, None, None)
    if by_flags:
        _check_flags(coordinator, processes, process)
    # If a process is missing this one ends with a line. JAX would abort with a stack trace, later.
    end = functools.partial(_end_for_missing, coordinator, processes, process, wait)
    timer = threading.Timer(wait, end)
    timer.daemon = True
    timer.start()
    try:
        _initialize(coordinator, processes, process, wait)
    except ValueError as error:
        # JAX found no surroundings that it knows: this process works alone.
        if by_flags or "coordinator_address should be defined" not in str(error):
            raise
    except RuntimeError as error:
        # Called by a program that uses JAX already, which then works alone.
        if not by_flags and "before any JAX calls" in str(error):
            return
        who = f"process {process} of {processes}, coordinator {coordinator}"
        raise RunError(f"{who}: {first_line(error)}") from error
    finally:
        timer.cancel()
    # Alone, though nobody said so: make sure that this is not one of several.
    if count() == 1 and not by_flags:
        _refuse_unknown_launchers()


def _check_flags(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Refuse arguments of `start` that do not go together."""
    if coordinator is None or processes is None or process is None:
        flags = "--coordinator, --processes and --process together, or --processes=1"
        raise UserError(f"expected {flags}, found only some of them")
    # The host may be an IPv6 address, which has colons itself.
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"--coordinator: expected HOST:PORT, found {coordinator!r}")
    if not 0 <= process < processes:
        numbers = f"a number from 0 to --processes - 1 = {processes - 1}"
        raise UserError(f"--process: expected {numbers}, found {process}")


def _initialize(
    coordinator: str | None, processes: int | None, process: int | None, wait: int
) -> None:
    """`jax.distributed.initialize`, which finds the processes itself where no flags name them."""
    # Flags come first: what SLURM or a pod says is then not looked at.
    options: dict[str, Any] = {}
    if processes is not None:
        options["cluster_detection_method"] = "deactivate"
    jax.distributed.initialize(
        coordinator,
        processes,
        process,
        initialization_timeout=wait + 60,
        shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        **options,
    )


def _end_for_missing(
    coordinator: str | None, processes: int | None, process: int | None, wait: int
) -> None:
    """End this process from another thread, since the first one waits inside JAX."""
    who = "this process"
    if process is not None:
        who = f"process {process} of {processes}"
    where = f" at {coordinator}" if coordinator else ""
    expected = (
        f"expected all processes at the coordinator{where} within {wait} s, found some missing"
    )
    advice = "start those, raise --wait, or work alone with --processes=1"
    print(f"allattn: {who}: {expected}; {advice}", file=sys.stderr, flush=True)
    os._exit(1)


def _refuse_unknown_launchers() -> None:
    """Refuse to work alone where a launcher that JAX does not know may have started several.

    Each of the processes would take itself for the only one, and do all of the work.
    """
    # An MPI says how many processes it has started.
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        size = os.environ.get(name, "")
        if size.isdecimal() and int(size) > 1:
            _refuse_launcher(name, "an Open MPI before 5")
    # A pod of an indexed Kubernetes job is not told how many pods there are. JAX does find the one
    # pod of a small TPU slice, and then there is a client of the service.
    in_pod = {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= os.environ.keys()
    if in_pod and _client() is None:
        _refuse_launcher(
            "JOB_COMPLETION_INDEX", "the package kubernetes and the right to list pods"
        )


def _refuse_launcher(variable: str, expected: str) -> None:
    flags = "--coordinator, --processes and --process (alone: --processes=1)"
    value = os.environ[variable]
    raise UserError(f"{variable}={value}: expected {expected}, or {flags}, found none of them")


def count() -> int:
    """The number of processes; unlike `jax.process_count` it does not touch the devices."""
    return _state.num_processes


def index() -> int:
    """The number of this process, from 0."""
    return _state.process_id


# --- messages ------------------------------------------------------------------------------------


class Message(NamedTuple):
    """What one process writes for another."""

    # "UserError" or "RunError" if it met an error, else "".
    error: str
    # The error's message, or what the call is about.
    text: str


# The errors that end all processes with one line, by the name that a message has.
_ERRORS: dict[str, type[Exception]] = {"UserError": UserError, "RunError": RunError}


def _write_message(key: str, message: Message) -> None:
    _client().key_value_set(key, f"{message.error}:{message.text}")


def _read_message(key: str) -> Message:
    """Wait for the message under a key."""
    error, _, text = _client().blocking_key_value_get(key, READ_TIMEOUT_MS).partition(":")
    return Message(error, text)


def _raise_error(message: Message) -> None:
    """Raise the error that another process met."""
    raise _ERRORS[message.error](message.text)


def _error_name(error: Exception) -> str:
    return "UserError" if isinstance(error, UserError) else "RunError"


def _client() -> Any:
    """The client of the coordination service; None in a process that works alone."""
    return _state.client


# --- agreeing ------------------------------------------------------------------------------------


def first_on_leader(name: str, action: Callable[[], T]) -> T:
    """Do something on process 0 first, such as preparing data, and then on the others.

    Args:
      name: what is done, as a part of the key in the service.
      action: what every process does; where disks are shared, process 0 has done it for the others.

    Returns:
      The result of the action on this process.

    Raises:
      UserError, RunError: on every process, if process 0 meets one.
    """
    if count() == 1:
        return action()
    key = f"allattn/{next(_calls)}/{name}"
    if index() == 0:
        return _tell(key, action, lambda _: "")
    # The others wait for the leader, and fail as it does.
    _hear(key)
    return action()


def text_of_leader(name: str, action: Callable[[], str]) -> str:
    """What process 0 alone finds out, on every process.

    Args:
      name: what is found out, as a part of the key in the service.
      action: what process 0 does.

    Raises:
      UserError, RunError: on every process, if process 0 meets one.
    """
    if count() == 1:
        return action()
    key = f"allattn/{next(_calls)}/{name}"
    if index() == 0:
        return _tell(key, action, str)
    return _hear(key)


def _tell(key: str, action: Callable[[], T], text: Callable[[T], str]) -> T:
    """Do something on the leader, and write how it went, so that nobody waits for what failed."""
    try:
        result = action()
    except (UserError, RunError) as error:
        _write_message(key, Message(_error_name(error), str(error)))
        raise
    _write_message(key, Message("", text(result)))
    return result


def _hear(key: str) -> str:
    """What the leader has written; raises the error that it met."""
    message = _read_message(key)
    if message.error:
        _raise_error(message)
    return message.text


def describe_difference(leader_text: str, own_text: str) -> str:
    """How the text of a process differs from that of process 0; "" if it does not."""
    return "" if own_text == leader_text else f"{own_text} instead of {leader_text}"


def require_same_text(
    name: str, own_text: str, differences: Callable[[str, str], str] = describe_difference
) -> None:
    """Refuse to continue, on every process, if one has another text than process 0.

    Args:
      name: what the text is, as in "configuration".
      own_text: the text of this process.
      differences: function from the texts of process 0 and of this process to what differs, "" if
        nothing does.

    Raises:
      UserError: on every process; names a process that differs, and in what.
    """
    key = f"allattn/{next(_calls)}/{name}"
    _compare_with_leader(key, name, Message("", own_text), differences)


def require_same_result(name: str, action: Callable[[], T], text: Callable[[T], str]) -> T:
    """Do something on every process, and refuse to continue if one fails or has another result.

    Args:
      name: what the result is, as in "checkpoint".
      action: what every process does.
      text: function from a result to the text that must be the same on all processes.

    Returns:
      The result of the action on this process.

    Raises:
      UserError, RunError: on every process; the error of this process if all met the same, else
        which process differs, and in what.
    """
    # Before the action: it may fail on one process between calls of its own.
    key = f"allattn/{next(_calls)}/{name}"
    result: T | None = None
    own_error: UserError | RunError | None = None
    try:
        result = action()
        message = Message("", text(result))
    except (UserError, RunError) as error:
        own_error = error
        message = Message(_error_name(error), str(error))
    _compare_with_leader(key, name, message, describe_difference)
    # All processes met the same error, or none.
    if own_error is not None:
        raise own_error
    return cast(T, result)


def _compare_with_leader(
    key: str, name: str, own: Message, differences: Callable[[str, str], str]
) -> None:
    """Raise the same error on every process if the message of one differs from that of process 0.

    The head of this file draws who writes what.

    Args:
      key: prefix of the keys of this call.
      name: what is compared, for the error.
      own: the text of this process, and the kind of error that it met.
      differences: as for `require_same_text`.
    """
    if count() == 1:
        return
    # Each process compares with the leader itself, and answers with the difference alone.
    if index() > 0:
        leader = _read_message(f"{key}/0")
        answer = Message(own.error, differences(leader.text, own.text))
        _write_message(f"{key}/{index()}", answer)
    else:
        _write_message(f"{key}/0", own)
        answers = [_read_message(f"{key}/{process}") for process in range(1, count())]
        _write_message(f"{key}/verdict", _verdict(name, own, answers))
    # Process 0 reads its own verdict, so that all do the same.
    verdict = _read_message(f"{key}/verdict")
    if verdict.text:
        _raise_error(verdict)


def _verdict(name: str, own: Message, answers: list[Message]) -> Message:
    """What process 0 tells all: the first difference and the kind of error, or an empty text."""
    for process, answer in enumerate(answers, start=1):
        if not answer.text:
            continue
        # A RunError ends with an exit code on which launchers try again: the next time what failed
        # may go well.
        failed = "RunError" in (own.error, answer.error)
        error = "RunError" if failed else "UserError"
        text = f"process {process} has another {name} than process 0: {answer.text}"
        return Message(error, text)
    return Message("", "")


# --- stopping ------------------------------------------------------------------------------------


class Preemption:
    """Whether this run is to stop: its machines are taken away (SIGTERM, SIGHUP), or Ctrl-C.

    All processes learn of it at the same call, so that all of them save at the same step, whichever
    of them the signal came to. Use it as a context manager around the calls; every process must
    make the same ones.

        with Preemption() as preemption:
            while not preemption():
                ...

    The first signal is noted; a second one does what it did outside. Where the first was Ctrl-C, a
    PreemptedError leaves the context as StoppedByKeyboard, at the process that it came to: that one
    ends with 130, others with 75. In threads other than the main one no signal is seen.

    Attributes:
      reached: the last answer.
    """

    def __init__(self) -> None:
        self.reached = False
        self._alone = count() == 1
        self._first: signal.Signals | None = None
        self._before: signals.Handlers = {}

    def __enter__(self) -> "Preemption":
        # With several processes JAX handles SIGTERM, and tells all of them.
        numbers = [number for number in signals.STOPPING if self._alone or number != signal.SIGTERM]
        # Python allows handlers in the main thread alone.
        if threading.current_thread() is threading.main_thread():
            self._before = signals.install(self._on_signal, numbers)
        return self

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        signals.restore(self._before)
        # Programs and notebooks know an interrupt by this class.
        if isinstance(error, PreemptedError) and self._first == signal.SIGINT:
            raise StoppedByKeyboard(f"{error.what} by Ctrl-C; {error.advice}") from None

    def __call__(self) -> bool:
        """Ask once more; once true, it stays true."""
        if not self._alone and not self.reached:
            check = next(_preemption_checks)
            self.reached = multihost_utils.reached_preemption_sync_point(check)
        return self.reached

    def _on_signal(self, number: int, _: object) -> None:
        # Who sends a second one does not want to wait.
        if self._first is not None:
            signals.restore(self._before)
            signal.raise_signal(number)
            return
        # Nothing is raised: the loop asks when it can save.
        self._first = signal.Signals(number)
        if self._alone:
            self.reached = True
        else:
            # JAX takes it from here, as if this machine were taken away.
            os.kill(os.getpid(), signal.SIGTERM)


def stop(code: int) -> None:
    """End this process with an exit code; does nothing in a process that works alone.

    Processes that all come to the same end wait for each other: one that leaves without a word
    looks like a crash, and the service then aborts the others. After a mistake or failure that
    perhaps only this process met it waits a few seconds for the others to come to it as well.
    After an error that nobody foresaw it does not wait.

    Args:
      code: the exit code; the exception that is being handled, if there is one, was not foreseen.
    """
    if count() == 1:
        return
    # An unforeseen error: Python would print it at exit, which `os._exit` leaves out.
    error = sys.exc_info()[1]
    if error is not None:
        traceback.print_exc()
        who = f"process {index()} of {count()}"
        reason = f"perhaps since another stopped: {first_line(error)}"
        print(f"allattn: {who} failed, {reason}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    # Wait for the others, where they can be expected to come.
    if error is None and (code == 0 or _others_finish()):
        jax.distributed.shutdown()
    # Leave out what libraries do at exit, which may wait for processes that are gone.
    os._exit(code)


def _others_finish() -> bool:
    """Whether the other processes finish, too; without them JAX would wait longer, then abort."""
    try:
        _client().wait_at_barrier("allattn/stop", FINISH_TIMEOUT_MS)
    except jax.errors.JaxRuntimeError:
        # A process is late, or gone.
        return False
    return True
