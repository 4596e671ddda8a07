"""clu's metric writers where TensorFlow is not installed, and must not be imported where it is.

clu writes TensorBoard's event files by way of TensorFlow: seconds of import, and on a GPU the
memory that TensorFlow reserves for itself. TensorBoard brings a writer of its own that needs none
of it. So one module of clu is replaced before clu's package is first imported:

    clu.metric_writers -> clu.metric_writers.tf.summary_writer -> tensorflow
                          ^ replaced by `TensorBoardWriter`

tests/train/test_metrics.py holds that nothing imports TensorFlow.
"""

import sys
import tempfile
import time
import types
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from allattn.storage import paths
from allattn.train.jsonl import JsonlWriter


class TensorBoardWriter:
    """Scalars and texts as TensorBoard event files, without TensorFlow.

    Stands for the one class for which clu's metric writers need TensorFlow, and so has those
    methods of its interface that are called here. In a bucket, where nothing can be appended, the
    file is kept on this machine and copied whole at each flush.

    Args:
      logdir: folder or bucket URL of the event files.
    """

    def __init__(self, logdir: str) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._folder = epath.Path(logdir)
        # Where the file grows, if not in the folder itself.
        self._local: tempfile.TemporaryDirectory | None = None
        folder = str(logdir)
        if paths.is_url(logdir):
            self._local = tempfile.TemporaryDirectory()
            folder = self._local.name
        self._writer = EventFileWriter(folder)

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Write the numbers of a step."""
        for tag, value in scalars.items():
            self._add(step, tag, simple_value=float(value))

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Write texts, such as samples."""
        from tensorboard.compat.proto import summary_pb2, tensor_pb2, tensor_shape_pb2, types_pb2

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
            self._add(step, tag, tensor=tensor, metadata=metadata)

    def _add(self, step: int, tag: str, **value: Any) -> None:
        """Write one value of a step."""
        from tensorboard.compat.proto import event_pb2, summary_pb2

        # An event is a step, a time and a summary of values, of which this has one.
        summary = summary_pb2.Summary(value=[summary_pb2.Summary.Value(tag=tag, **value)])
        event = event_pb2.Event(wall_time=time.time(), step=int(step), summary=summary)
        self._writer.add_event(event)

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


# clu finds this module where it looks for its own.
_replacement = types.ModuleType("clu.metric_writers.tf.summary_writer")
_replacement.SummaryWriter = TensorBoardWriter  # type: ignore[attr-defined]
sys.modules.setdefault(_replacement.__name__, _replacement)

# Where TensorBoard finds a module of this name, it uses its own stub of TensorFlow, even where
# TensorFlow is installed.
sys.modules.setdefault("tensorboard.compat.notf", types.ModuleType("notf"))

from clu import metric_writers  # noqa: E402  (only now can it be imported without TensorFlow)


def create_writer(workdir: str) -> metric_writers.MetricWriter:
    """Writer of event files and JSONL; on processes other than the first, of nothing.

    Args:
      workdir: folder or bucket URL; it exists.
    """
    # All processes measure the same, so one writes.
    if jax.process_index():
        return metric_writers.MultiWriter([])
    return metric_writers.MultiWriter(
        [metric_writers.SummaryWriter(str(workdir)), JsonlWriter(workdir)]
    )
