"""The log of a run as JSON lines, `metrics.jsonl` in its workdir."""

import json
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from allattn.errors import UserError
from allattn.storage import paths

# Marks the row of a start that resumed: rows of later steps above it were lost with their process.
RESUMED = "resumed"


class JsonlWriter:
    """One JSON object per call, appended to metrics.jsonl.

    In a bucket nothing can be appended: there every start has a part file of its own,
    metrics-TIME.jsonl, written whole at each flush and when a minute has passed since the last.

    Args:
      workdir: folder or bucket URL; it exists.
      first_step: updates made before this start. After an earlier start a row of its own says so,
        and takes back what that one has written of later steps.
    """

    # Seconds between writes into a bucket.
    every = 60.0

    def __init__(self, workdir: str, first_step: int) -> None:
        self._appends = not paths.is_url(workdir)
        # Rows that are not written yet; in a bucket, all rows of this start.
        self._rows: list[str] = []
        self._write_time = time.monotonic()

        name = "metrics.jsonl"
        if not self._appends:
            name = f"metrics-{time.time_ns()}.jsonl"
        self._path = epath.Path(workdir) / name

        # A kill cut the last row short; the next one must not continue it.
        if self._appends and self._path.exists() and not self._path.read_bytes().endswith(b"\n"):
            self._rows.append("\n")
        # In a workdir where nothing was logged before, there is nothing to take back.
        if paths.matching(epath.Path(workdir), "metrics*.jsonl"):
            self._add(first_step, {RESUMED: True})

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Write the numbers of a step; JSON has no word for NaN or infinity, which become null."""
        row: dict[str, float | None] = {}
        for name, value in scalars.items():
            number = float(value)
            row[name] = number if math.isfinite(number) else None
        self._add(step, row)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Write texts beside the numbers."""
        self._add(step, texts)

    def _add(self, step: int, row: Mapping[str, Any]) -> None:
        # The step first, which `read_jsonl` skips to find the kind of the row.
        self._rows.append(json.dumps({"step": int(step), **row}, allow_nan=False) + "\n")
        if self._appends or time.monotonic() - self._write_time >= self.every:
            self.flush()

    def flush(self) -> None:
        """Bring everything to the disk or the bucket."""
        # A file grows by the new rows; an object in a bucket is replaced by all rows so far.
        self._write_time = time.monotonic()
        text = "".join(self._rows)
        if self._appends:
            with self._path.open("a", encoding="utf8") as file:
                file.write(text)
            self._rows.clear()
        elif self._rows:
            self._path.write_text(text, encoding="utf8")

    def close(self) -> None:
        """Flush."""
        self.flush()


def read_jsonl(workdir: str) -> list[dict[str, Any]]:
    """The rows of a run in the order of their steps.

    What a resumed run did again replaces what was written before: its start takes back the rows of
    all later steps, and of rows of one step that begin with the same name (nll, dev_nll), the
    newest counts. Lines that are no rows are passed over, such as one that a kill cut short.

    Args:
      workdir: folder or bucket URL of the run.

    Returns:
      One dictionary per row, "step" and numbers or texts by name; none before anything is logged.

    Raises:
      UserError: no such folder.

    Example:
      >>> rows = allattn.read_metrics(workdir)
      >>> [row["step"] for row in rows if "dev_nll" in row]
      [4, 8, 12]
    """
    folder = epath.Path(workdir)
    with paths.reached(folder):
        files = paths.matching(folder, "metrics*.jsonl")
        if not files and not folder.exists():
            raise UserError(f"{workdir}: expected the workdir of a run, found nothing")

    rows: dict[tuple[int, str | None], dict[str, Any]] = {}
    # The names of part files hold their times, so sorted they are in the order of the starts.
    for path in files:
        for row in _rows(path):
            # Of a later start the row stands later, and replaces the older one here.
            first_name = next((name for name in row if name != "step"), None)
            if first_name == RESUMED:
                rows = {key: kept for key, kept in rows.items() if key[0] <= row["step"]}
            else:
                rows[row["step"], first_name] = row
    return sorted(rows.values(), key=lambda row: row["step"])


def _rows(path: epath.Path) -> Iterator[dict[str, Any]]:
    """The rows of one file; lines of another kind are passed over."""
    try:
        lines = path.read_bytes().splitlines()
    except IsADirectoryError:
        return
    for line in lines:
        # Errors of JSON and of Unicode are both ValueErrors; brackets may be nested too deep.
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and type(row.get("step")) is int:
            yield row
