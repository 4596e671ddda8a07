"""Every experiment of a folder, several seeds each, and one table of what came out.

A run is a process of its own, so that one that fails leaves the others, and has a workdir of its own, so that a sweep
that was stopped goes on where it stood. Files in the sweep's workdir: `sweep.md`, `sweep.csv`, `sweep.png`.
"""

import ast
import csv
import io
import json
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
from etils import epath

from allattn import config as configuration
from allattn import metrics
from allattn.errors import UserError

COLUMNS = ("config", "parameters", "steps", "tokens", "dev", "test", "unit", "seeds", "seconds", "published", "failed")
FINETUNE = 10  # of a budget's steps, one in so many belongs to the stage at a tenth of the rate


class Job(NamedTuple):
    """One training run."""

    config: Path
    seed: int
    workdir: epath.Path


class Result(NamedTuple):
    """What one run came to: its last scores, or why there are none."""

    job: Job
    scores: dict[str, Any] | None
    rows: list[dict[str, Any]]  # of its log
    failed: str


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
      budget: tokens that every run trains on, one tenth of them at a tenth of the rate; 0: as its file says.
      overrides: values as text, by dotted name, for every run.
      launcher: words before the training command, such as a script of launch/ that submits it and returns; such runs
        are collected by calling again. "": one after the other, here.
      only: pattern of the names of the files to run, such as "*_tiny".

    Returns:
      The table, in Markdown.

    Raises:
      UserError: no experiment in the folder, or some runs failed: the others were made all the same.
    """
    files = sorted(path for path in Path(configs).glob(f"{only}.py") if not path.name.startswith("_"))
    if not files or seeds < 1:
        expected = f"a folder with experiment files ({only}.py) and --seeds of at least 1"
        raise UserError(f"--configs: expected {expected}, found {len(files)} files in {configs}, {seeds} seeds")
    folder = epath.Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [Job(file, seed, folder / f"{file.stem}-seed{seed}") for file in files for seed in range(seeds)]
    results = {job: Result(job, None, [], "not yet run") for job in jobs}
    for job in sorted(jobs, key=lambda job: job.seed):  # every experiment once, before any of them again
        results[job] = _result(job, budget, dict(overrides or {}), shlex.split(launcher))
        text = write(folder, list(results.values()))
    failed = [f"{r.job.workdir.name}: {r.failed}" for r in results.values() if r.failed and r.failed != "submitted"]
    if failed:
        raise UserError(f"{len(failed)} of {len(jobs)} runs failed, the others are in {folder / 'sweep.md'}: {failed}")
    return text


def _result(job: Job, budget: int, overrides: dict[str, str], launcher: Sequence[str]) -> Result:
    """The result of a job, which is run unless it has ended before, with as many steps."""
    scores, failed = job.workdir / "scores.json", ""
    try:
        overrides |= {"seed": str(job.seed), **_budget(configuration.load(str(job.config), overrides), budget)}
        train = configuration.load(str(job.config), overrides).train
        steps = train.steps + train.finetune_steps
        if not scores.exists() or json.loads(scores.read_text())["step"] < steps:
            failed = _run(job, overrides, launcher)
    except UserError as error:
        failed = str(error)
    found = None if failed else json.loads(scores.read_text())
    return Result(job, found, [] if failed else metrics.read_jsonl(str(job.workdir)), failed)


def _budget(c: ml_collections.ConfigDict, tokens: int) -> dict[str, str]:
    """The steps that read so many tokens."""
    if not tokens:
        return {}
    steps = max(2, tokens // (c.train.batch * c.train.block))
    finetune = max(1, steps // FINETUNE)
    return {"train.steps": str(steps - finetune), "train.finetune_steps": str(finetune)}


def _run(job: Job, overrides: Mapping[str, str], launcher: Sequence[str]) -> str:
    """Train in a process of its own; returns why it failed, or "submitted", or nothing."""
    flags = [f"--config.{name}={value}" for name, value in overrides.items()]
    command = [sys.executable, "-m", "allattn", "train", f"--config={job.config}", f"--workdir={job.workdir}", *flags]
    job.workdir.mkdir(parents=True, exist_ok=True)
    submitted = job.workdir / "submitted"
    if launcher and submitted.exists():
        return "submitted"
    print(f"{job.workdir.name}: {'submitting' if launcher else 'training'}", flush=True)
    done = subprocess.run([*launcher, *command], capture_output=True, text=True, check=False)
    (job.workdir / "log.txt").write_text(done.stdout + done.stderr)
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1].removeprefix("allattn: ")
    if launcher:
        submitted.write_text(shlex.join(command))
    return "submitted" if launcher else ""


# --- the table ---------------------------------------------------------------------------------------------------


def write(folder: epath.Path, results: Sequence[Result]) -> str:
    """Write the table as Markdown and CSV, and the plot; returns the Markdown."""
    rows = list(_rows(results))
    text = "\n".join(["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)])
    text += "".join("\n| " + " | ".join(row[name] for name in COLUMNS) + " |" for row in rows) + "\n"
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
    scores, unit = [result.scores or {} for result in ended], _unit(ended[0])
    dev = [next(row[f"dev_{unit}"] for row in reversed(result.rows) if f"dev_{unit}" in row) for result in ended]
    return {
        "parameters": f"{scores[0]['parameters']:,}",
        "steps": str(scores[0]["step"]),
        "tokens": f"{scores[0]['trained_tokens']:,}",
        "dev": _spread(dev),
        "test": _spread([score[unit] for score in scores]),
        "unit": f"{unit}, {scores[0]['protocol']}",
        "seeds": str(len(ended)),
        "seconds": f"{statistics.mean(_seconds(result) for result in ended):.0f}",
    }


def _spread(values: Sequence[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{deviation}"


def _unit(result: Result) -> str:
    """Bits per symbol of bytes and characters, perplexity of words."""
    return "ppl" if "ppl_words" in (result.scores or {}) else "bpc"


def _seconds(result: Result) -> float:
    """Time spent training, without evaluations, however often the run was resumed."""
    logged = [row for row in result.rows if "tokens_per_s" in row]
    each = (result.scores or {})["trained_tokens"] / (result.scores or {})["step"]
    before = [0, *(row["step"] for row in logged)]
    return sum((row["step"] - b) * each / row["tokens_per_s"] for row, b in zip(logged, before, strict=False))


def _published(file: Path) -> str:
    """What the experiment's docstring says after "Published:"."""
    try:
        found = re.search(
            r"^Published:(.+?)(?=^\S|\Z)", ast.get_docstring(ast.parse(file.read_text())) or "", re.M | re.S
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
    names = list(dict.fromkeys(result.job.config.stem for result in ended))
    unit = _unit(ended[0])
    for number, name in enumerate(names):
        ours = [result for result in ended if result.job.config.stem == name]
        logged = [row for row in ours[0].rows if "tokens_per_s" in row]
        each = (ours[0].scores or {})["trained_tokens"] / (ours[0].scores or {})["step"]
        curves.plot(
            [row["step"] * each for row in logged], [row[unit] for row in logged], label=name, color=f"C{number}"
        )
        points.plot([(result.scores or {})[unit] for result in ours], [number] * len(ours), "o", color=f"C{number}")
    curves.set(xlabel="tokens", ylabel=f"training {unit}")
    curves.legend(fontsize="small")
    points.set(xlabel=f"test {unit}, one point a seed", yticks=range(len(names)), yticklabels=names)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=120)
    path.write_bytes(drawn.getvalue())
