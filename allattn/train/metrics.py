"""What a run reports: clu metrics, event files for TensorBoard, a JSONL file, and progress on the screen."""

import json
import math
import sys
import tempfile
import time
import types
from collections.abc import Mapping
from typing import Any

import flax
import jax
import numpy as np
from clu import metrics as clu_metrics
from etils import epath
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class TensorBoardWriter:
    """Scalars and texts as TensorBoard event files, without TensorFlow.

    Takes the place of the one class for which clu's metric writers need TensorFlow, and so has
    those methods of its interface that are called here. In a bucket, where nothing can be appended,
    the file is kept here and copied whole at each flush.

    Args:
      logdir: folder or bucket URL of the event files.
    """

    def __init__(self, logdir: str) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._folder = epath.Path(logdir)
        self._local = tempfile.TemporaryDirectory() if "://" in str(logdir) else None
        self._writer = EventFileWriter(self._local.name if self._local else str(logdir))

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Write the numbers of a step."""
        for tag, value in scalars.items():
            self._add(step, tag, simple_value=float(value))

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Write texts, such as samples."""
        from tensorboard.compat.proto import summary_pb2, tensor_pb2, tensor_shape_pb2, types_pb2

        shape = tensor_shape_pb2.TensorShapeProto(
            dim=[tensor_shape_pb2.TensorShapeProto.Dim(size=1)]
        )
        plugin = summary_pb2.SummaryMetadata(
            plugin_data=summary_pb2.SummaryMetadata.PluginData(plugin_name="text")
        )
        for tag, text in texts.items():
            tensor = tensor_pb2.TensorProto(
                dtype=types_pb2.DT_STRING,
                tensor_shape=shape,
                string_val=[text.encode("utf-8", "replace")],
            )
            self._add(step, tag, tensor=tensor, metadata=plugin)

    def _add(self, step: int, tag: str, **value: Any) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2

        summary = summary_pb2.Summary(value=[summary_pb2.Summary.Value(tag=tag, **value)])
        self._writer.add_event(
            event_pb2.Event(wall_time=time.time(), step=int(step), summary=summary)
        )

    def flush(self) -> None:
        """Bring everything to the disk or the bucket."""
        self._writer.flush()
        if self._local:
            for file in epath.Path(self._local.name).iterdir():
                (self._folder / file.name).write_bytes(file.read_bytes())

    def close(self) -> None:
        """Flush and close the file."""
        self.flush()
        self._writer.close()
        if self._local:
            self._local.cleanup()


_shim = types.ModuleType("clu.metric_writers.tf.summary_writer")
_shim.SummaryWriter = TensorBoardWriter  # type: ignore[attr-defined]
sys.modules.setdefault(_shim.__name__, _shim)
sys.modules.setdefault(
    "tensorboard.compat.notf", types.ModuleType("notf")
)  # not even where it is installed

from clu import metric_writers  # noqa: E402  (only now can it be imported without TensorFlow)


class JsonlWriter:
    """One JSON object per call, appended to metrics.jsonl; in a bucket, where nothing can be
    appended, a part file of its own for every start, written whole at each flush and when a minute
    has passed since the last."""

    every = 60.0  # seconds

    def __init__(self, workdir: str) -> None:
        folder = epath.Path(workdir)
        self._appends = "://" not in str(workdir)
        self._rows: list[str] = []
        self._written = time.monotonic()
        self._path = folder / (
            "metrics.jsonl" if self._appends else f"metrics-{time.time_ns()}.jsonl"
        )
        if self._appends and self._path.exists() and not self._path.read_bytes().endswith(b"\n"):
            self._rows.append(
                "\n"
            )  # a kill cut the last row short; the next one must not continue it

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Write the numbers of a step; what is not finite becomes null, as JSON has no word for it."""
        numbers = {name: float(value) for name, value in scalars.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        self._add(step, finite)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Write texts beside the numbers."""
        self._add(step, texts)

    def _add(self, step: int, row: Mapping[str, Any]) -> None:
        self._rows.append(json.dumps({"step": int(step), **row}) + "\n")
        if self._appends or time.monotonic() - self._written >= self.every:
            self.flush()

    def flush(self) -> None:
        """Bring everything to the disk or the bucket."""
        self._written = time.monotonic()
        if self._appends:
            with self._path.open("a") as file:
                file.write("".join(self._rows))
            self._rows.clear()
        elif self._rows:
            self._path.write_text("".join(self._rows))

    def close(self) -> None:
        """Flush."""
        self.flush()


def create_writer(workdir: str) -> metric_writers.MetricWriter:
    """Writes event files and JSONL into workdir; on processes other than the first, nothing.

    Args:
      workdir: folder or bucket URL; it exists.
    """
    if jax.process_index():
        return metric_writers.MultiWriter([])
    return metric_writers.MultiWriter(
        [metric_writers.SummaryWriter(str(workdir)), JsonlWriter(workdir)]
    )


def read_jsonl(workdir: str) -> list[dict[str, Any]]:
    """The rows of a run in the order of their steps.

    What a resumed run did again replaces the older row: of rows of one step that begin with the
      same name (nll,
    dev_nll), the newest counts. A row that a kill cut short is passed over.

    Args:
      workdir: folder or bucket URL of the run.
    """
    rows: dict[tuple[int, str | None], dict[str, Any]] = {}
    for path in sorted(epath.Path(workdir).glob("metrics*.jsonl")):
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            name = next((name for name in row if name != "step"), None)
            rows[row["step"], name] = row
    return sorted(rows.values(), key=lambda row: row["step"])


@flax.struct.dataclass
class TrainMetrics(clu_metrics.Collection):
    """Metrics of one or several steps, merged; spans and reach in tokens, nll in nats."""

    nll: clu_metrics.Average.from_output("nll")  # type: ignore[valid-type]
    gradient_norm: clu_metrics.LastValue.from_output("gradient_norm")  # type: ignore[valid-type]
    mean_span: clu_metrics.LastValue.from_output("mean_span")  # type: ignore[valid-type]
    max_span: clu_metrics.LastValue.from_output("max_span")  # type: ignore[valid-type]
    mean_reach: clu_metrics.LastValue.from_output("mean_reach")  # type: ignore[valid-type]
    persistent_mass: clu_metrics.Average.from_output("persistent_mass")  # type: ignore[valid-type]


def summarise(
    values: Mapping[str, Any],
    seconds: float,
    tokens: int,
    flops: float = 0.0,
    peak_flops: float = 0.0,
) -> dict[str, float]:
    """The numbers of an interval as they are logged.

    Args:
      values: from `TrainMetrics.compute()`.
      seconds: length of the interval.
      tokens: tokens read in it.
      flops: required FLOPs of it.
      peak_flops: FLOP/s that all devices together could do; 0: unknown.

    Returns:
      The values and bpc, ppl, tokens_per_s, and mfu if the peak is known.
    """
    found = {name: float(value) for name, value in values.items()}
    found |= {"bpc": found["nll"] / math.log(2), "ppl": float(np.exp(min(found["nll"], 700.0)))}
    found["tokens_per_s"] = tokens / seconds
    if peak_flops:
        found["mfu"] = flops / seconds / peak_flops
    return found


class RunProgress:
    """Progress of a run on the screen: a live line on a terminal, otherwise one line now and then.

    Args:
      total: steps of the run.
      every: least seconds between lines where there is no terminal.
      unit: of the scores that are shown, bpc or ppl.
    """

    def __init__(self, total: int, every: float = 10.0, unit: str = "bpc") -> None:
        self._total, self._every, self._last, self._unit = total, every, -math.inf, unit
        columns = (
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("{task.fields[line]}"),
        )
        self._bar = Progress(
            *columns, TimeRemainingColumn(), transient=False, disable=bool(jax.process_index())
        )
        self._live = sys.stdout.isatty()
        self._begin: tuple[int, float] | None = None

    def __enter__(self) -> "RunProgress":
        if self._live:
            self._bar.start()
        self._task = self._bar.add_task("train", total=self._total, line="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._bar.stop()

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Show how far the run is and its latest numbers."""
        unit, form = self._unit, "{:.3f}" if self._unit == "bpc" else "{:.6g}"  # e100 at the start
        names = (
            (unit, f"{form} {unit}"),
            ("tokens_per_s", "{:,.0f} tokens/s"),
            (f"dev_{unit}", f"dev {form} {unit}"),
        )
        line = "  ".join(text.format(values[name]) for name, text in names if name in values)
        self._bar.update(self._task, completed=step, line=line)
        now = time.monotonic()
        self._begin = self._begin or (step, now)
        if not self._live and now - self._last >= self._every and not jax.process_index():
            self._last = now
            print(f"step {step}/{self._total}  {line}  ETA {self._eta(step, now)}", flush=True)

    def _eta(self, step: int, now: float) -> str:
        first, begin = self._begin or (step, now)
        if step == first:
            return "-"
        seconds = int((now - begin) / (step - first) * (self._total - step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"

    def message(self, text: str) -> None:
        """Print a line above the progress."""
        if jax.process_index():
            return
        if self._live:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)
