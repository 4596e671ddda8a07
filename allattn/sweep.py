"""Every experiment of a folder, several seeds each, and one table of what came out.

A run is a process of its own, so that one that fails leaves the others, and has a workdir of its
own, so that a sweep that was stopped resumes where it stood:

    workdir/sweep.md  sweep.csv  sweep.png     the table, and the learning curves
    workdir/EXPERIMENT-seedN/                  the workdir of one run, and beside its own files
        started.json                           the configuration that it was first started with
        submitted                              the command that a launcher has queued
        log.txt                                what the run, or its launcher, printed
"""

import ast
import csv
import functools
import io
import json
import math
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
from allattn import config_checks, experiments
from allattn.errors import UserError
from allattn.model import ModelConfig, forward_flops
from allattn.storage import checkpoint, paths
from allattn.train import jsonl

# MFLOP: required products of training on a token, with the spans of the end.
COLUMNS = (
    "config",
    "parameters",
    "MFLOP",
    "steps",
    "tokens",
    "dev",
    "test",
    "unit",
    "seeds",
    "seconds",
    "published",
    "failed",
)
# What the table needs of scores.json, and what kind of number each is.
NEEDED_SCORES: dict[str, Any] = {
    "step": int,
    "trained_tokens": int,
    "parameters": int,
    "bpc": int | float,
    "ppl": int | float,
}
# Why a run has no scores that is no failure.
SUBMITTED = "submitted; remove the file `submitted` from its workdir to submit it again"
# May differ when a run is resumed, but not between compared ones.
STEPS = ("train.steps", "train.finetune_steps")


class Job(NamedTuple):
    """One training run."""

    # The experiment's file.
    config: Path
    seed: int
    workdir: epath.Path


class Result(NamedTuple):
    """What one run came to: its last scores, or why there are none."""

    job: Job
    # Of scores.json; empty: none.
    scores: dict[str, Any]
    # Of its log.
    rows: list[dict[str, Any]]
    # Why there are no scores; "": there are.
    failed: str

    @property
    def unit(self) -> str:
        """Bits per symbol of bytes and characters, perplexity of words."""
        # Only words have a perplexity of words.
        return "ppl" if "ppl_words" in self.scores else "bpc"

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one update, of all rows."""
        return self.scores["trained_tokens"] // self.scores["step"]

    @property
    def logged(self) -> list[dict[str, Any]]:
        """The rows that tell of training steps, not of evaluations."""
        return [row for row in self.rows if isinstance(row.get("tokens_per_s"), int | float)]


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
      launcher: what comes before the training command, such as a script of launch/ that submits it
        and returns; such runs are collected by calling again. "": one after the other, here.
      only: pattern of the names of the files to run, such as "*_tiny".

    Returns:
      The table, in Markdown.

    Raises:
      UserError: no experiment in the folder, or some runs failed: the others were made all the
        same.
    """
    # Refuse mistakes before the first run.
    files = _experiments(configs, only, seeds, budget)
    overrides = dict(overrides or {})
    _check_overrides(overrides, budget)
    folder = epath.Path(workdir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        launcher_words = shlex.split(launcher)
    except (OSError, ValueError) as error:
        raise UserError(f"--workdir={workdir}, --launcher={launcher}: {error}") from error

    # The order of the table: by experiment, then by seed.
    jobs = [
        Job(file, seed, folder / f"{file.stem}-seed{seed}")
        for file in files
        for seed in range(seeds)
    ]
    results = {job: Result(job, {}, [], "not yet run") for job in jobs}

    # The order of running: every experiment once, before any of them again.
    for job in sorted(jobs, key=lambda job: job.seed):
        results[job] = _result(job, budget, overrides, launcher_words)
        text = write(folder, list(results.values()))
    _refuse_failures(list(results.values()), folder)
    return text


def _experiments(configs: str, only: str, seeds: int, budget: int) -> list[Path]:
    """The files to run; refuses a sweep of nothing."""
    for flag, number, least in (("--seeds", seeds, 1), ("--budget", budget, 0)):
        if number < least:
            raise UserError(f"{flag}: expected at least {least}, found {number}")
    # A folder of ours goes by its name as well.
    folder = Path(configs)
    if not folder.exists():
        folder = experiments.FOLDER / configs
    pattern = f"{only}.py"
    files = sorted(path for path in folder.glob(pattern) if not path.name.startswith("_"))
    if not files:
        expected = f"a folder with experiment files ({pattern})"
        raise UserError(f"--configs: expected {expected}, found none in {configs}")
    return files


def _check_overrides(overrides: Mapping[str, str], budget: int) -> None:
    """Refuse to set what the sweep itself sets."""
    own_fields = ["seed"]
    if budget:
        own_fields += STEPS
    for name in own_fields:
        if name in overrides:
            raise UserError(
                f"--config.{name}: a sweep sets it from --seeds and --budget, "
                f"found it given as well"
            )


def _refuse_failures(results: Sequence[Result], folder: epath.Path) -> None:
    """Report runs that failed, after all others were made."""
    failed = [
        f"{result.job.workdir.name}: {result.failed}"
        for result in results
        if result.failed and result.failed != SUBMITTED
    ]
    if failed:
        raise UserError(
            f"{len(failed)} of {len(results)} runs failed, "
            f"the others are in {folder / 'sweep.md'}: {failed}"
        )


# --- a run ---------------------------------------------------------------------------------------


def _result(job: Job, budget: int, overrides: Mapping[str, str], launcher: Sequence[str]) -> Result:
    """The result of a job, which is run unless it has ended before."""
    try:
        # The budget depends on the batch, which the overrides may set.
        shared = configuration.load(str(job.config), dict(overrides))
        own = {"seed": str(job.seed), **_budget(shared, budget)}
        run_overrides = {**overrides, **own}
        _check_same(job, configuration.load(str(job.config), run_overrides))

        scores = _scores(job)
        failed = ""
        if not scores:
            failed = _run(job, run_overrides, launcher)
            scores = _scores(job)
    except UserError as error:
        return Result(job, {}, [], str(error))
    rows = jsonl.read_jsonl(str(job.workdir)) if scores else []
    return Result(job, scores, rows, failed)


def _budget(c: ml_collections.ConfigDict, tokens: int) -> dict[str, str]:
    """The steps that read so many tokens, as overrides; a budget of 0 leaves the file's.

    The fine-tune stage keeps the share of steps that the file gives it; warm-up is not scaled.
    """
    train = c.train
    config_checks.check_ranges(c, "train.")
    if not tokens:
        return {}
    # Rounded down, but for one step at least.
    steps = max(1, tokens // (train.batch * train.block))
    file_steps = max(1, train.steps + train.finetune_steps)
    finetune = steps * train.finetune_steps // file_steps
    return {"train.steps": str(steps - finetune), "train.finetune_steps": str(finetune)}


def _check_same(job: Job, c: ml_collections.ConfigDict) -> None:
    """Refuse to report a run under settings that it was not started with.

    The first start notes them.
    """
    if c.train.steps + c.train.finetune_steps < 1:
        raise UserError("train.steps: expected at least 1 step in a sweep, found 0")
    note = job.workdir / "started.json"
    if not note.exists():
        with paths.written(note):
            job.workdir.mkdir(parents=True, exist_ok=True)
            paths.replace(note, configuration.to_json(c))

    # A single run may be lengthened, but a table compares runs of one length.
    free = tuple(name for name in config_checks.MAY_CHANGE_ON_RESUMING if name not in STEPS)
    started = configuration.from_json(note.read_text(encoding="utf8"))
    changed = configuration.changed_fields(started, c, free)
    if changed:
        raise UserError(
            f"{job.workdir} was started with other settings: {'; '.join(changed)}; "
            f"choose another --workdir"
        )


def _scores(job: Job) -> dict[str, Any]:
    """The scores that a run left at its end; empty if it has not ended.

    Raises:
      UserError: what lies there is no file, or holds something else.
    """
    path = job.workdir / "scores.json"
    with paths.reached(path):
        if not path.exists():
            return {}
        content = path.read_bytes()
    # A kill has cut it short, or a crash has left zeros: the run writes it again.
    try:
        scores = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    _check_scores(path, scores)
    return scores


def _check_scores(path: epath.Path, scores: Any) -> None:
    """Refuse what no run has written, and scores that are not finite."""
    if not isinstance(scores, dict):
        raise UserError(f"{path}: expected an object, found {scores!r:.80}")
    for name, kind in NEEDED_SCORES.items():
        score: Any = scores.get(name)
        # A truth value is a whole number to Python.
        is_number = isinstance(score, kind) and not isinstance(score, bool)
        if not is_number or not 0 <= score < math.inf:
            raise UserError(f"{path}: expected a number as {name}, found {score!r:.80}")
    if not scores["step"]:
        raise UserError(f"{path}: expected at least 1 step, found 0")


def _run(job: Job, overrides: Mapping[str, str], launcher: Sequence[str]) -> str:
    """Train in a process of its own; returns why it failed, or SUBMITTED, or nothing."""
    # Queued by an earlier call, and perhaps running by now.
    submitted = job.workdir / "submitted"
    if launcher and submitted.exists():
        return SUBMITTED
    flags = [f"--config.{name}={value}" for name, value in overrides.items()]
    train = [sys.executable, "-m", "allattn", "train"]
    command = [*train, f"--config={job.config}", f"--workdir={job.workdir}", *flags]

    action = "submitting" if launcher else "training"
    print(f"{job.workdir.name}: {action}", flush=True)
    try:
        code, printed = _run_logged([*launcher, *command], job.workdir / "log.txt")
    except OSError as error:
        raise UserError(f"--launcher: {error}") from error

    # A command of ours says why it failed in its last line.
    if code:
        lines = printed.strip().splitlines() or [f"exit code {code}"]
        return lines[-1].removeprefix("allattn: ")
    if launcher:
        submitted.write_text(shlex.join(command), encoding="utf8")
        return SUBMITTED
    return ""


def _run_logged(command: Sequence[str], log: epath.Path) -> tuple[int, str]:
    """Run a command; returns its exit code and what it printed.

    The log grows while the command runs, or in a bucket is copied there when it has ended.
    """
    local = log
    if paths.is_url(log):
        local = epath.Path(tempfile.mkdtemp()) / log.name
    # Errors in the same file, in the order in which they came.
    with local.open("w", encoding="utf8") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        try:
            process.wait()
        except KeyboardInterrupt:
            # The terminal has told the run as well, which saves its state.
            process.wait()
            raise KeyboardInterrupt("stopped by Ctrl-C; run again to resume") from None
    # A run prints in the locale's encoding.
    printed = local.read_bytes().decode("utf8", "replace")
    if local != log:
        log.write_text(printed, encoding="utf8")
        local.parent.rmtree()
    return process.returncode, printed


# --- the table -----------------------------------------------------------------------------------


def write(folder: epath.Path, results: Sequence[Result]) -> str:
    """Write the table as Markdown and CSV, and the plot; returns the Markdown."""
    rows = list(_rows(results))
    text = _markdown(rows)

    # The same for programs.
    lines = io.StringIO()
    writer = csv.DictWriter(lines, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)

    # Each is replaced as a whole, since there is one after every run.
    with paths.written(folder):
        paths.replace(folder / "sweep.md", text)
        paths.replace(folder / "sweep.csv", lines.getvalue())
        _plot(folder / "sweep.png", [result for result in results if result.scores])
    return text


def _markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """A table of the columns, with a line under their names."""
    # The names, the rule under them, then a line for every experiment.
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for row in rows:
        lines.append("| " + " | ".join(row[name] for name in COLUMNS) + " |")
    return "\n".join(lines) + "\n"


def _rows(results: Sequence[Result]) -> Iterator[dict[str, str]]:
    """A row for every experiment: means over its seeds, with their standard deviation."""
    for file in dict.fromkeys(result.job.config for result in results):
        of_file = [result for result in results if result.job.config == file]
        ended = [result for result in of_file if result.scores]
        row = dict.fromkeys(COLUMNS, "")
        row["config"] = file.stem
        row["published"] = _published(file)
        # All seeds often fail for the same reason.
        reasons = dict.fromkeys(result.failed for result in of_file if result.failed)
        row["failed"] = "; ".join(reasons)
        if ended:
            row |= _figures(ended)
        yield row


def _figures(ended: Sequence[Result]) -> dict[str, str]:
    """The numbers of an experiment's row, from its runs that have ended."""
    first = ended[0].scores
    unit = ended[0].unit
    test = [result.scores[unit] for result in ended]
    dev = [score for result in ended for score in _last_dev(result)]
    figures = {
        "parameters": f"{first['parameters']:,}",
        "steps": str(first["step"]),
        "tokens": f"{first['trained_tokens']:,}",
        "dev": _spread(dev),
        "test": _spread(test),
        "unit": f"{unit}, {first['protocol']}",
        "seeds": str(len(ended)),
    }

    # What a log tells, of the runs that have one: it may have been lost.
    logged = [result for result in ended if result.logged]
    if logged:
        figures["MFLOP"] = f"{statistics.mean(_flops(result) for result in logged) / 1e6:.3g}"
        figures["seconds"] = f"{statistics.mean(_seconds(result) for result in logged):.0f}"
    return figures


def _last_dev(result: Result) -> list[float]:
    """The last score on dev, in the unit that the run reports; none in a run without one."""
    name = f"dev_{result.unit}"
    scores = [row[name] for row in result.rows if row.get(name) is not None]
    return scores[-1:]


def _flops(result: Result) -> float:
    """Required products of training on one token, with the reach that the heads have at the end."""
    c = _checkpointed(result.job.workdir)
    model = ModelConfig.from_config(c)
    mean_reach = result.logged[-1]["mean_reach"]
    # Gradients of states and of parameters cost a forward pass each.
    return 3 * forward_flops(model, mean_reach, c.train.block)


@functools.cache
def _checkpointed(workdir: epath.Path) -> ml_collections.ConfigDict:
    """The configuration of a run, with the size of the vocabulary of its data."""
    with checkpoint.Checkpointer(workdir, create=False) as checkpoints:
        return configuration.from_json(checkpoints.restore_meta()["config"])


def _spread(values: Sequence[float]) -> str:
    """Mean over the seeds, with the standard deviation of several; "" without any."""
    # No run has logged it.
    if not values:
        return ""
    mean = f"{statistics.mean(values):.4f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values):.4f}"


def _seconds(result: Result) -> float:
    """Time spent training, without evaluations, however often the run was resumed."""
    seconds = 0.0
    step_before = 0
    # A row tells the speed since the row before it.
    for row in result.logged:
        tokens = (row["step"] - step_before) * result.tokens_per_step
        seconds += tokens / row["tokens_per_s"]
        step_before = row["step"]
    return seconds


def _published(file: Path) -> str:
    """What the experiment's docstring says after "Published:", on one line; "" without it."""
    try:
        docstring = ast.get_docstring(ast.parse(file.read_bytes()))
    except SyntaxError:
        return ""
    # Until the next line that is not indented, or the end.
    match = re.search(r"^Published:(.+?)(?=^\S|\Z)", docstring or "", re.M | re.S)
    if match is None:
        return ""
    return " ".join(match[1].split())


# --- the plot ------------------------------------------------------------------------------------


def _plot(path: epath.Path, ended: Sequence[Result]) -> None:
    """Learning curves of the first seeds, and the test scores of all."""
    if not ended:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    curves, points = figure.subplots(1, 2)
    names = list(dict.fromkeys(result.job.config.stem for result in ended))
    unit = ended[0].unit
    for number, name in enumerate(names):
        color = f"C{number}"
        of_file = [result for result in ended if result.job.config.stem == name]

        # A curve over tokens: experiments may differ in the tokens of a step.
        first = of_file[0]
        tokens = [row["step"] * first.tokens_per_step for row in first.logged]
        curves.plot(tokens, [row[unit] for row in first.logged], label=name, color=color)

        # A point for every seed.
        scores = [result.scores[unit] for result in of_file]
        points.plot(scores, [number] * len(scores), "o", color=color)

    curves.set(xlabel="tokens", ylabel=f"training {unit}")
    curves.legend(fontsize="small")
    points.set(xlabel=f"test {unit}, one point a seed", yticks=range(len(names)), yticklabels=names)

    # Drawn in memory, as matplotlib cannot write into a bucket.
    image = io.BytesIO()
    figure.savefig(image, dpi=120)
    path.write_bytes(image.getvalue())
