"""The log of a run as TensorBoard's event files, in its workdir.

tensorboardX writes them without TensorFlow, which would take seconds to import and, on a GPU, the
memory that it reserves for itself. Of tensorboardX the writer that works at once is used: the one
above it hands events to a thread, which says nothing of a full disk, and a flush does not wait for.

Imports of tensorboardX are inside the functions: it imports PyTorch where that is installed, and
who imports allattn need not wait for it.
"""

import tempfile
import time
from collections.abc import Mapping
from typing import Any

from etils import epath

from allattn.storage import paths


class EventFileWriter:
    """Scalars and texts as an event file of this start.

    In a bucket, where nothing can be appended, the file is kept on this machine and copied whole at
    each flush.

    Args:
      workdir: folder or bucket URL of the event files; it exists.
      first_step: updates made before this start. What older files say of later steps was lost with
        the process that wrote them, and TensorBoard no longer shows it.
    """

    def __init__(self, workdir: str, first_step: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        self._folder = epath.Path(workdir)
        # Where the file grows, if not in the folder itself.
        self._local: tempfile.TemporaryDirectory | None = None
        folder = self._folder
        if paths.is_url(workdir):
            self._local = tempfile.TemporaryDirectory()
            folder = epath.Path(self._local.name)

        # TensorBoard reads files in the order of their names, which begin with whole seconds: the
        # suffix orders, and tells apart, two starts of one second.
        self._writer = EventsWriter(f"{folder}/events", f".{time.time_ns()}")

        # Everything from this step on is dropped from what was read before.
        begin = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add(first_step + 1, session_log=begin)

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Write the numbers of a step."""
        # To TensorBoard a number is a value of its own, whose tag is its name.
        for tag, value in scalars.items():
            self._add_value(step, tag, simple_value=float(value))

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Write texts, such as samples."""
        from tensorboardX.proto import summary_pb2, tensor_pb2, tensor_shape_pb2, types_pb2

        # To TensorBoard a text is a tensor of one string, with a note for the plugin "text".
        one = tensor_shape_pb2.TensorShapeProto.Dim(size=1)
        shape = tensor_shape_pb2.TensorShapeProto(dim=[one])
        plugin = summary_pb2.SummaryMetadata.PluginData(plugin_name="text")
        metadata = summary_pb2.SummaryMetadata(plugin_data=plugin)
        for tag, text in texts.items():
            tensor = tensor_pb2.TensorProto(
                dtype=types_pb2.DT_STRING,
                tensor_shape=shape,
                string_val=[text.encode("utf-8", "replace")],
            )
            self._add_value(step, tag, tensor=tensor, metadata=metadata)

    def _add_value(self, step: int, tag: str, **value: Any) -> None:
        """Write one value of a step."""
        from tensorboardX.proto import summary_pb2

        # A summary has any number of values; this one has one.
        summary = summary_pb2.Summary(value=[summary_pb2.Summary.Value(tag=tag, **value)])
        self._add(step, summary=summary)

    def _add(self, step: int, **what: Any) -> None:
        """Write one event: a step, a time, and what there was."""
        from tensorboardX.proto import event_pb2

        event = event_pb2.Event(wall_time=time.time(), step=int(step), **what)
        self._writer.write_event(event)

    def flush(self) -> None:
        """Bring everything to the disk or the bucket."""
        self._writer.flush()
        # Whole files: a bucket takes no less.
        if self._local:
            for file in epath.Path(self._local.name).iterdir():
                (self._folder / file.name).write_bytes(file.read_bytes())

    def close(self) -> None:
        """Flush and close the file."""
        self.flush()
        self._writer.close()
        if self._local:
            self._local.cleanup()
