"""The logs of a run: its event files and its JSON lines."""

from collections.abc import Mapping
from typing import Any

import jax

from allattn.storage import paths
from allattn.train.event_files import EventFileWriter
from allattn.train.jsonl import JsonlWriter


class Logs:
    """Writes rows as TensorBoard's event files and as JSON lines, side by side.

    All processes measure the same, so the first one writes; on the others nothing happens.

    Args:
      workdir: folder or bucket URL; it exists.
      first_step: updates made before this start. Rows of later steps that an earlier start has left
        count no longer.

    Raises:
      RunError: by each method as well; a log cannot be written, as on a full disk.
    """

    def __init__(self, workdir: str, first_step: int) -> None:
        # The first process alone.
        self._workdir = workdir
        self._writers: list[EventFileWriter | JsonlWriter] = []
        if not jax.process_index():
            with paths.written(workdir):
                self._writers.append(EventFileWriter(workdir, first_step))
                self._writers.append(JsonlWriter(workdir, first_step))

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Write the numbers of a step."""
        for writer in self._writers:
            with paths.written(self._workdir):
                writer.write_scalars(step, scalars)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Write texts, such as samples, of a step."""
        for writer in self._writers:
            with paths.written(self._workdir):
                writer.write_texts(step, texts)

    def flush(self) -> None:
        """Bring everything to the disk or the bucket."""
        for writer in self._writers:
            with paths.written(self._workdir):
                writer.flush()

    def close(self) -> None:
        """Flush and close the files."""
        for writer in self._writers:
            with paths.written(self._workdir):
                writer.close()
