"""Every experiment of a folder, several seeds each, and one table of what came out.

A run is a process of its own, so that one that fails leaves the others, and has a workdir of its
own, so that a sweep that was stopped goes on where it stood. Files in the sweep's workdir:
`sweep.md`, `sweep.csv`, `sweep.png`.
"""

import ast
import csv
import functools
import io
import json
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
from etils import epath

from allattn import config as configuration
from allattn.errors import UserError
from allattn.model import ModelConfig, forward_flops
from allattn.storage import checkpoint
from allattn.train import jsonl

COLUMNS = (
    *(
        "config",
        "parameters",
        "MFLOP",
    ),  # required products of training on a token, with the spans of the end
    *("steps", "tokens", "dev", "test", "unit", "seeds", "seconds", "published", "failed"),
)
SUBMITTED = "submitted; remove the file `submitted` from its workdir to submit it again"
STEPS = (
    "train.steps",
    "train.finetune_steps",
)  # may differ when a run goes on, but not between compared ones


class Job(NamedTuple):
    """One training run."""

    config: Path
    seed: int
    workdir: epath.Path


class Result(NamedTuple):
    """What one run came to: its last scores, or why there are none."""

    job: Job
    scores: dict[str, Any]  # of scores.json; empty: none
    rows: list[dict[str, Any]]  # of its log
    failed: str

    @property
    def unit(self) -> str:
        """Bits per symbol of bytes and characters, perplexity of words."""
        return "ppl" if "ppl_words" in self.scores else "bpc"

    @property
    def tokens_per_step(self) -> int:
        return self.scores["trained_tokens"] // self.scores["step"]

    @property
    def logged(self) -> list[dict[str, Any]]:
        """The rows that tell of training steps."""
        return [row for row in self.rows if "tokens_per_s" in row]


def sweep(
    configs: str,
    workdir: str,
    seeds: int = 3,
    budget: int = 0,
    overrides: Mapping[str, str] | None = None,
    launcher: str = "",
    only: str = "*",
) -> str:
    """Run what has not been run yet, and write the table after each run.

    Args:
      configs: folder of experiment files; those that begin with "_" are parts of others.
      workdir: folder or bucket URL of the sweep.
      seeds: runs of each experiment, with seeds 0, 1, ...
      budget: tokens that every run trains on, with its file's share at a tenth of the rate; 0: as
        the file says.
      overrides: values as text, by dotted name, for every run.
      launcher: words before the training command, such as a script of launch/ that submits it and
        returns; such runs are collected by calling again. "": one after the other, here.
      only: pattern of the names of the files to run, such as "*_tiny".

    Returns:
      The table, in Markdown.

    Raises:
      UserError: no experiment in the folder, or some runs failed: the others were made all the
        same.
    """
    files = sorted(
        path for path in Path(configs).glob(f"{only}.py") if not path.name.startswith("_")
    )
    if not files or seeds < 1 or budget < 0:
        expected = f"a folder with experiment files ({only}.py), --seeds of at least 1 and --budget of at least 0"
        raise UserError(
            f"--configs: expected {expected}, found {len(files)} in {configs}, {seeds} and {budget}"
        )
    taken = [name for name in ("seed", *(STEPS if budget else ())) if name in (overrides or {})]
    if taken:
        raise UserError(
            f"--config.{taken[0]}: a sweep sets it from --seeds and --budget, found it given as well"
        )
    folder = epath.Path(workdir)
    jobs = [
        Job(file, seed, folder / f"{file.stem}-seed{seed}")
        for file in files
        for seed in range(seeds)
    ]
    results = {job: Result(job, {}, [], "not yet run") for job in jobs}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        words = shlex.split(launcher)
    except (OSError, ValueError) as error:
        raise UserError(f"--workdir={workdir}, --launcher={launcher}: {error}") from error
    for job in sorted(
        jobs, key=lambda job: job.seed
    ):  # every experiment once, before any of them again
        results[job] = _result(job, budget, dict(overrides or {}), words)
        text = write(folder, list(results.values()))
    failed = [
        f"{r.job.workdir.name}: {r.failed}"
        for r in results.values()
        if r.failed and r.failed != SUBMITTED
    ]
    if failed:
        raise UserError(
            f"{len(failed)} of {len(jobs)} runs failed, the others are in {folder / 'sweep.md'}: {failed}"
        )
    return text


def _result(job: Job, budget: int, overrides: dict[str, str], launcher: Sequence[str]) -> Result:
    """The result of a job, which is run unless it has ended before."""
    try:
        overrides |= {
            "seed": str(job.seed),
            **_budget(configuration.load(str(job.config), overrides), budget),
        }
        _check_same(job, configuration.load(str(job.config), overrides))
        scores, failed = _scores(job), ""
        if not scores:
            failed = _run(job, overrides, launcher)
            scores = _scores(job)
    except UserError as error:
        scores, failed = {}, str(error)
    return Result(job, scores, jsonl.read_jsonl(str(job.workdir)) if scores else [], failed)


def _budget(c: ml_collections.ConfigDict, tokens: int) -> dict[str, str]:
    """The steps that read so many tokens, with the file's own share at a tenth of the rate; warm-up is not scaled."""
    configuration.check_ranges(c, "train.")
    if not tokens:
        return {}
    steps, tenth = max(1, tokens // (c.train.batch * c.train.block)), c.train.finetune_steps
    finetune = steps * tenth // max(1, c.train.steps + tenth)
    return dict(zip(STEPS, (str(steps - finetune), str(finetune)), strict=True))


def _check_same(job: Job, c: ml_collections.ConfigDict) -> None:
    """Refuse to report a run under settings that it was not started with; the first start notes them."""
    if c.train.steps + c.train.finetune_steps < 1:
        raise UserError("train.steps: expected at least 1 step in a sweep, found 0")
    noted = job.workdir / "started.json"
    if not noted.exists():
        job.workdir.mkdir(parents=True, exist_ok=True)
        noted.write_text(configuration.to_json(c))
    free = tuple(name for name in configuration.FREE if name not in STEPS)
    changed = configuration.changed_fields(configuration.from_json(noted.read_text()), c, free)
    if changed:
        raise UserError(
            f"{job.workdir} was started with other settings: {'; '.join(changed)}; choose another --workdir"
        )


def _scores(job: Job) -> dict[str, Any]:
    """The scores that a run left at its end; empty if it has not ended."""
    try:
        return json.loads((job.workdir / "scores.json").read_text())
    except (OSError, ValueError):  # none, or cut short by a kill
        return {}


def _run(job: Job, overrides: Mapping[str, str], launcher: Sequence[str]) -> str:
    """Train in a process of its own; returns why it failed, or SUBMITTED, or nothing."""
    flags = [f"--config.{name}={value}" for name, value in overrides.items()]
    command = [
        sys.executable,
        "-m",
        "allattn",
        "train",
        f"--config={job.config}",
        f"--workdir={job.workdir}",
        *flags,
    ]
    submitted = job.workdir / "submitted"
    if launcher and submitted.exists():
        return SUBMITTED
    print(f"{job.workdir.name}: {'submitting' if launcher else 'training'}", flush=True)
    try:
        code, printed = _watched([*launcher, *command], job.workdir / "log.txt")
    except OSError as error:
        raise UserError(f"--launcher: {error}") from error
    if code:
        return (printed.strip().splitlines() or [f"exit code {code}"])[-1].removeprefix("allattn: ")
    if launcher:
        submitted.write_text(shlex.join(command))
    return SUBMITTED if launcher else ""


def _watched(command: Sequence[str], log: epath.Path) -> tuple[int, str]:
    """Run a command; its exit code and what it printed, which also grows in the log where that is a local file."""
    local = log if "://" not in str(log) else epath.Path(tempfile.mkdtemp()) / log.name
    with local.open("w") as file:
        code = subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, check=False
        ).returncode
    printed = local.read_text()
    if local != log:
        log.write_text(printed)
        local.parent.rmtree()
    return code, printed


# --- the table
#
#
# ---------------------------------------------------------------------------------------------------


def write(folder: epath.Path, results: Sequence[Result]) -> str:
    """Write the table as Markdown and CSV, and the plot; returns the Markdown."""
    rows = list(_rows(results))
    text = "\n".join(["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)])
    text += (
        "".join("\n| " + " | ".join(row[name] for name in COLUMNS) + " |" for row in rows) + "\n"
    )
    lines = io.StringIO()
    writer = csv.DictWriter(lines, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    (folder / "sweep.md").write_text(text)
    (folder / "sweep.csv").write_text(lines.getvalue())
    _plot(folder / "sweep.png", [result for result in results if result.scores])
    return text


def _rows(results: Sequence[Result]) -> Iterator[dict[str, str]]:
    """A row for every experiment: means over its seeds, with their standard deviation."""
    for file in dict.fromkeys(result.job.config for result in results):
        ours = [result for result in results if result.job.config == file]
        ended = [result for result in ours if result.scores]
        row = dict.fromkeys(COLUMNS, "") | {"config": file.stem, "published": _published(file)}
        row["failed"] = "; ".join(dict.fromkeys(result.failed for result in ours if result.failed))
        yield row | (_figures(ended) if ended else {})


def _figures(ended: Sequence[Result]) -> dict[str, str]:
    first, unit = ended[0].scores, ended[0].unit
    dev = [
        next(row[f"dev_{unit}"] for row in reversed(result.rows) if f"dev_{unit}" in row)
        for result in ended
    ]
    return {
        "parameters": f"{first['parameters']:,}",
        "MFLOP": f"{statistics.mean(_flops(result) for result in ended) / 1e6:.3g}",
        "steps": str(first["step"]),
        "tokens": f"{first['trained_tokens']:,}",
        "dev": _spread(dev),
        "test": _spread([result.scores[unit] for result in ended]),
        "unit": f"{unit}, {first['protocol']}",
        "seeds": str(len(ended)),
        "seconds": f"{statistics.mean(_seconds(result) for result in ended):.0f}",
    }


def _flops(result: Result) -> float:
    """Required products of training on one token (`forward_flops`), with the reach that the heads have at the end."""
    c = _checkpointed(result.job.workdir)
    return 3 * forward_flops(
        ModelConfig.from_config(c), result.logged[-1]["mean_reach"], c.train.block
    )


@functools.cache
def _checkpointed(workdir: epath.Path) -> ml_collections.ConfigDict:
    """The configuration of a run, with the size of the vocabulary that it found."""
    with checkpoint.Checkpointer(workdir, create=False) as checkpoints:
        return configuration.from_json(checkpoints.restore_meta()["config"])


def _spread(values: Sequence[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{deviation}"


def _seconds(result: Result) -> float:
    """Time spent training, without evaluations, however often the run was resumed."""
    before = [0, *(row["step"] for row in result.logged)]
    pairs = zip(result.logged, before, strict=False)
    return sum((row["step"] - b) * result.tokens_per_step / row["tokens_per_s"] for row, b in pairs)


def _published(file: Path) -> str:
    """What the experiment's docstring says after "Published:"."""
    try:
        found = re.search(
            r"^Published:(.+?)(?=^\S|\Z)",
            ast.get_docstring(ast.parse(file.read_text())) or "",
            re.M | re.S,
        )
    except SyntaxError:
        return ""
    return " ".join(found[1].split()) if found else ""


def _plot(path: epath.Path, ended: Sequence[Result]) -> None:
    """Learning curves of the first seeds, and the test scores of all."""
    if not ended:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    curves, points = figure.subplots(1, 2)
    names, unit = list(dict.fromkeys(result.job.config.stem for result in ended)), ended[0].unit
    for number, name in enumerate(names):
        ours, color = [result for result in ended if result.job.config.stem == name], f"C{number}"
        logged, each = ours[0].logged, ours[0].tokens_per_step
        curves.plot(
            [row["step"] * each for row in logged],
            [row[unit] for row in logged],
            label=name,
            color=color,
        )
        points.plot(
            [result.scores[unit] for result in ours], [number] * len(ours), "o", color=color
        )
    curves.set(xlabel="tokens", ylabel=f"training {unit}")
    curves.legend(fontsize="small")
    points.set(xlabel=f"test {unit}, one point a seed", yticks=range(len(names)), yticklabels=names)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=120)
    path.write_bytes(drawn.getvalue())
