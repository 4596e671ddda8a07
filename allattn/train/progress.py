"""Progress of a run on the screen."""

import math
import sys
import time
from collections.abc import Mapping

import jax
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class RunProgress:
    """Progress of a run on the screen: a live line on a terminal, otherwise one line now and then.

    Processes other than the first show nothing.

    Args:
      total: steps of the run.
      every: least seconds between lines where there is no terminal.
      unit: of the scores that are shown, bpc or ppl.
    """

    def __init__(self, total: int, every: float = 10.0, unit: str = "bpc") -> None:
        self._total = total
        self._every = every
        self._unit = unit
        self._shows = not jax.process_index()

        # On a terminal.
        self._live = sys.stdout.isatty()
        self._bar = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("{task.fields[line]}"),
            TimeRemainingColumn(),
            transient=False,
            disable=not self._shows,
        )

        # Elsewhere: the first step that was shown and its time, from which the end is foretold,
        # and the time of the last line.
        self._begin: tuple[int, float] | None = None
        self._line_time = -math.inf

    def __enter__(self) -> "RunProgress":
        if self._live:
            self._bar.start()
        self._task = self._bar.add_task("train", total=self._total, line="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._bar.stop()

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Show how far the run is and its latest numbers.

        Args:
          step: updates made.
          values: by name; of them the training score, tokens_per_s and the dev score are shown.
        """
        line = self._line(values)
        self._bar.update(self._task, completed=step, line=line)
        now = time.monotonic()
        if self._begin is None:
            self._begin = (step, now)

        # A log file is not to fill with lines.
        due = now - self._line_time >= self._every
        if self._shows and not self._live and due:
            self._line_time = now
            print(f"step {step}/{self._total}  {line}  ETA {self._eta(step, now)}", flush=True)

    def _line(self, values: Mapping[str, float]) -> str:
        """The numbers, in words."""
        unit = self._unit
        # A perplexity may be e100 at the start, bits per symbol are never many.
        score = "{:.3f}" if unit == "bpc" else "{:.6g}"
        formats = {
            unit: f"{score} {unit}",
            "tokens_per_s": "{:,.0f} tokens/s",
            f"dev_{unit}": f"dev {score} {unit}",
        }
        shown = [text.format(values[name]) for name, text in formats.items() if name in values]
        return "  ".join(shown)

    def _eta(self, step: int, now: float) -> str:
        """Time until the end at the mean speed so far, h:mm:ss."""
        # Steps before this start, of a run that was resumed, tell nothing of its speed.
        first_step, begin = self._begin or (step, now)
        if step == first_step:
            return "-"
        seconds_per_step = (now - begin) / (step - first_step)
        seconds = int(seconds_per_step * (self._total - step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"

    def message(self, text: str) -> None:
        """Print a line above the progress."""
        if not self._shows:
            return
        if self._live:
            # Brackets in a text are its own, not rich's markup.
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)
