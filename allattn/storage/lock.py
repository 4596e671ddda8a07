"""The lock on a workdir: one run writes there at a time.

    workdir/lock.json    who holds it: host, process, since when, and a number that grows

Process 0 of a run holds it, and raises the number every few seconds. Whoever finds a lock asks
whether its holder lives: a process of this machine is looked up, of another machine the number is
watched for a while. What a dead process has left is taken over, at once if it ran here.

A bucket can neither create an object once only nor replace one in a single step, and a process that
sleeps loses its lock without noticing. So who takes over looks again after a moment, and every
holder before each checkpoint: of two that believe to hold the lock, the later writer goes on.
"""

import contextlib
import dataclasses
import json
import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from etils import epath

from allattn.errors import RunError, UserError
from allattn.sharding import processes
from allattn.storage import paths

NAME = "lock.json"

# Seconds between two heartbeats.
BEAT = 10.0
# Seconds for which the heartbeat of a process on another machine is watched.
WATCH = 30.0
# Seconds after which two that took over at the same time know which of them was the later.
SETTLE = 0.5
# How many heartbeats of the former holder, begun before a lock was taken over, are outlived.
HEARTBEATS = 4


@dataclasses.dataclass(frozen=True)
class Holder:
    """What a lock says of the process that holds it."""

    host: str
    # Tells a machine, its last boot and a container apart, in which process numbers are its own.
    place: str
    process: int
    # When the process began, as the system counts: another process may get its number later.
    began: str
    # For the reader of a message.
    since: str
    # Of this lock alone.
    token: str
    beat: int = 0

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}, since {self.since}"


class WorkdirLock:
    """Holds a workdir for this run; a context manager, to be entered by every process of the run.

    Args:
      workdir: folder or bucket URL; a folder exists.
      force: take the lock over, whoever holds it.
    """

    def __init__(self, workdir: str, force: bool = False) -> None:
        self._workdir = workdir
        self._path = epath.Path(workdir) / NAME
        self._force = force
        self._mine = _this_process()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, daemon=True)

    def __enter__(self) -> "WorkdirLock":
        processes.first_on_leader("lock", self._take_on_leader)
        return self

    def __exit__(self, *_: object) -> None:
        if processes.index():
            return
        # The thread first, which would write the lock again.
        self._stop.set()
        self._thread.join()
        # A lock that stays is recognised as that of a process that is gone.
        with contextlib.suppress(OSError):
            if self._is_mine(_read(self._path)):
                self._path.unlink()

    def require_held(self) -> None:
        """Refuse to go on once another run has taken the workdir over.

        Raises:
          RunError: names the process that has it; on process 0 alone.
        """
        if processes.index():
            return
        # A file system that does not answer says nothing of the lock.
        with contextlib.suppress(OSError):
            found = _read(self._path)
            if found is not None and not self._is_mine(found):
                raise RunError(f"{self._workdir} was taken over by {found}")

    # --- taking it

    def _take_on_leader(self) -> None:
        if processes.index():
            return
        with paths.reached(self._path):
            found = _read(self._path)
            if found is not None and not self._force:
                self._refuse_living(found)
            self._take(found)
        self._thread.start()

    def _refuse_living(self, found: Holder) -> None:
        """Refuse a workdir whose holder lives.

        Raises:
          UserError: names the holder.
        """
        # Only here can the system be asked.
        if found.place == self._mine.place:
            lives = _lives(found)
        else:
            lives = self._watch(found)
        if lives:
            self._refuse(found)

    def _refuse(self, found: Holder) -> None:
        raise UserError(
            f"{self._workdir}: expected no other run there, found {found}; "
            f"stop that one, or take over with --force"
        )

    def _watch(self, found: Holder) -> bool:
        """Whether the heartbeat of a process on another machine goes on."""
        logging.warning("%s: watching for %g s whether %s still runs", self._path, WATCH, found)
        # One change is enough to know.
        end = time.monotonic() + WATCH
        while time.monotonic() < end:
            time.sleep(min(1.0, WATCH / 10))
            now = _read(self._path)
            if now != found:
                # Released meanwhile, or alive.
                return now is not None
        return False

    def _take(self, found: Holder | None) -> None:
        """Write the lock in the place of what was found, and see who was the last to do so."""
        text = self._text()
        # On a disk a file can be made once only, so the first is the only one.
        if found is None and not paths.is_url(self._path):
            try:
                with open(self._path, "x", encoding="utf-8") as file:
                    file.write(text)
                return
            except FileExistsError:
                pass
        # Also where a kill has left half a lock.
        found = _read(self._path)
        if found is not None and not self._force and _lives_here(found, self._mine):
            self._refuse(found)
        winner = self._write_last(text)
        # A heartbeat that had read the lock before may have hidden ours; its next sees ours.
        for _ in range(HEARTBEATS):
            if winner is None or not self._is_taken_from(winner, found):
                break
            winner = self._write_last(text)
        if winner is not None:
            self._refuse(winner)

    def _is_taken_from(self, winner: Holder, found: Holder | None) -> bool:
        """Whether who has the lock is the one it is taken from by force."""
        return self._force and found is not None and winner.token == found.token

    def _write_last(self, text: str) -> Holder | None:
        """Write the lock; whoever wrote it after that, since the last to write has it."""
        paths.replace(self._path, text)
        time.sleep(SETTLE)
        winner = _read(self._path)
        if self._is_mine(winner):
            return None
        return winner

    # --- holding it

    def _text(self) -> str:
        return json.dumps(dataclasses.asdict(self._mine)) + "\n"

    def _is_mine(self, found: Holder | None) -> bool:
        return found is not None and found.token == self._mine.token

    def _keep_beating(self) -> None:
        """Raise the number until the lock is released, or somebody else's."""
        while not self._stop.wait(BEAT):
            # A disk that is full or a network that is down may come back.
            with contextlib.suppress(Exception):
                found = _read(self._path)
                if found is not None and not self._is_mine(found):
                    return
                self._mine = dataclasses.replace(self._mine, beat=self._mine.beat + 1)
                paths.replace(self._path, self._text())


# --- processes -----------------------------------------------------------------------------------


def _this_process() -> Holder:
    # A container may have the name of its machine, and process numbers of its own.
    host = socket.gethostname()
    parts = [host, _first_line("/proc/sys/kernel/random/boot_id")]
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return Holder(
        host=host,
        place=" ".join(parts),
        process=os.getpid(),
        began=_began(os.getpid()),
        since=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        token=uuid.uuid4().hex,
    )


def _first_line(file: str) -> str:
    """What the system says in a file; "" where it has none."""
    try:
        return Path(file).read_text(encoding="utf8").splitlines()[0]
    except (OSError, IndexError):
        return ""


def _began(process: int) -> str:
    """When a process began; "" for one that is gone, or where the system does not say."""
    # The name in brackets may hold anything; what follows has a fixed order.
    fields = _first_line(f"/proc/{process}/stat").rpartition(")")[2].split()
    # A zombie has ended, and waits for its parent to notice.
    if len(fields) < 20 or fields[0] in "ZX":
        return ""
    return fields[19]


def _lives(found: Holder) -> bool:
    """Whether a process of this machine that held a lock still runs."""
    if found.began:
        return _began(found.process) == found.began
    # A system without /proc, where another process may have got the number.
    try:
        os.kill(found.process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _lives_here(found: Holder, here: Holder) -> bool:
    return found.place == here.place and _lives(found)


def _read(path: epath.Path) -> Holder | None:
    """Who holds a lock; None if there is none, or one that was never written to its end."""
    # Another process may be writing it just now.
    for _ in range(10):
        try:
            return _parse(path.read_text(encoding="utf8"))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError):
            time.sleep(0.05)
    return None


def _parse(text: str) -> Holder:
    # A later version may say more.
    values: dict[str, Any] = json.loads(text)
    names = [field.name for field in dataclasses.fields(Holder)]
    return Holder(**{name: values[name] for name in names})
