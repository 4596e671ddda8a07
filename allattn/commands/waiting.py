"""How far a long piece of work is, on standard error."""

import sys
import time


class Waiting:
    """A live line on a terminal, elsewhere a line now and then; nothing for short work.

    Args:
      what: the work, in a word.
      unit: what is counted.
      after: seconds before anything is shown.
      every: least seconds between two lines where there is no terminal.
    """

    def __init__(self, what: str, unit: str, after: float = 3.0, every: float = 10.0) -> None:
        self._what = what
        self._unit = unit
        self._live = sys.stderr.isatty()
        # A live line may change often, a file is not to fill with lines.
        self._every = every
        wait = every
        if self._live:
            self._every = 0.2
            wait = after
        self._next = time.monotonic() + wait
        self._begin: tuple[int, float] | None = None

    def __call__(self, done: int, total: int) -> None:
        """Show it if it is time.

        Args:
          done: how much has been done.
          total: how much there is.
        """
        now = time.monotonic()
        # What came before the first call, such as compiling, tells nothing of the speed.
        if self._begin is None:
            self._begin = (done, now)
        # Most calls come too early.
        if now < self._next:
            return
        self._next = now + self._every
        text = f"{self._what}: {done:,} of {total:,} {self._unit}, {self._left(done, total, now)}"
        # A live line is written over the one before it.
        if self._live:
            print(f"\r{text}\x1b[K", end="", file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def _left(self, done: int, total: int, now: float) -> str:
        first, begin = self._begin or (done, now)
        # Nothing tells the speed yet.
        if done == first:
            return f"{done / max(1, total):.0%}"
        seconds = int((now - begin) / (done - first) * (total - done))
        return f"about {seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d} left"

    def __enter__(self) -> "Waiting":
        return self

    def __exit__(self, *_: object) -> None:
        """Take the live line away."""
        if self._live:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def unseen(done: int, total: int) -> None:
    """Shows nothing: what other processes than the first do."""
