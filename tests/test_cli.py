"""The command line from start to finish on a text of our own, and one line for every mistake."""

import doctest
import json
import math
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from command_line import ROOT, Result, call, flags, process

import allattn
from allattn import commands, config, experiments, train
from allattn.__main__ import main
from allattn.commands import waiting
from allattn.commands.command import Command

LETTERS = "abcdefghijklmn"
COMMANDS = tuple(command.name for command in commands.COMMANDS)


class Place(NamedTuple):
    """A folder with texts and a finished run."""

    folder: Path
    texts: Path
    run: Path
    trained: Result


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("cli")
    texts = folder / "texts"
    rng = np.random.default_rng(0)
    texts.mkdir()
    words = ["".join(rng.choice(list(LETTERS), 5)) for _ in range(20)]
    for split, count in (("train", 340), ("valid", 100), ("test", 100)):
        (texts / f"{split}.txt").write_text(" ".join(rng.choice(words, count)) + "\n")
    (folder / "own.txt").write_text(" ".join(words[:5]))
    (folder / "foreign.txt").write_text("abc abc? abc")
    (folder / "short.txt").write_text("abc")
    (folder / "empty.txt").write_text("")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALLATTN_DATA_DIR", str(folder / "prepared"))
        patch.chdir(ROOT)
        trained = call("train", f"--workdir={folder / 'run'}", *flags(texts))
        yield Place(folder, texts, folder / "run", trained)


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file under a folder with its size and time."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in files}


def dev_scores(run: Path) -> dict[int, float]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["dev_nll"] for row in rows if "dev_nll" in row}


# --- a run from start to finish -------------------------------------------------------------------


def test_train(place: Place) -> None:
    assert place.trained.code == 0
    scores = place.trained.last()
    assert set(scores) == {"split", "protocol", "step", "nll", "bpc", "ppl", "tokens"}
    assert (scores["split"], scores["protocol"], scores["step"], scores["tokens"]) == (
        "test",
        "authors",
        12,
        512,
    )
    assert scores["bpc"] == pytest.approx(scores["nll"] / math.log(2))
    assert scores["ppl"] == pytest.approx(math.exp(scores["nll"]))
    assert f"checkpoints: {place.run}/checkpoints" in place.trained.out.splitlines()
    assert sorted(dev_scores(place.run)) == [4, 8, 12]


def test_train_again_is_complete(place: Place) -> None:
    before = contents(place.run)
    again = call("train", f"--workdir={place.run}", *flags(place.texts))
    assert again.code == 0 and f"{place.run} is complete: 12 of 12 steps" in again.out
    assert again.last() == place.trained.last()
    assert contents(place.run) == before


def test_train_longer(place: Place, tmp_path: Path) -> None:
    """A finished run resumes if it is given more steps."""
    shutil.copytree(place.run, tmp_path / "run")
    longer = call(
        "train", f"--workdir={tmp_path}/run", *flags(place.texts, train__finetune_steps=4)
    )
    assert longer.code == 0 and longer.last()["step"] == 14
    rows = [
        json.loads(row) for row in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [row["step"] for row in rows if "nll" in row] == list(range(1, 15))


def test_train_from_the_parameters_of_another_run(place: Place, tmp_path: Path) -> None:
    """Before its first step such a run has the other's score; its learning rate and spans are its
    own.
    """
    there = {
        "train__init_from": place.run,
        "optimizer__learning_rate": 1e-3,
        "train__finetune_steps": 0,
    }
    new = f"--workdir={tmp_path}/new"
    untrained = call("train", new, *flags(place.texts, **there, train__steps=0)).last()
    assert untrained == {**place.trained.last(), "step": 0}
    trained = call("train", new, *flags(place.texts, **there, train__steps=3)).last()
    assert trained["step"] == 3 and 0 < abs(trained["nll"] - untrained["nll"]) < 0.1
    there["train__init_from"] = tmp_path / "gone"  # not looked at again
    assert call("train", new, *flags(place.texts, **there, train__steps=3)).last() == trained


def test_train_from_another_vocabulary(place: Place, tmp_path: Path) -> None:
    """As many symbols, but others."""
    (tmp_path / "texts").mkdir()
    for split in ("train", "valid", "test"):
        text = (place.texts / f"{split}.txt").read_text()
        (tmp_path / "texts" / f"{split}.txt").write_text(text.replace("a", "z"))
    found = call(
        "train", f"--workdir={tmp_path}/new", *flags(tmp_path / "texts", train__init_from=place.run)
    )
    assert found.code == 2 and not (tmp_path / "new").exists()
    line = f"allattn: train.init_from: {place.run}: expected the vocabulary of files, found another"
    assert found.err.splitlines()[-1] == f"{line}: symbol 1 is 'a' there, 'z' here"


def test_profile(place: Place, tmp_path: Path) -> None:
    """Three steps are traced, also where the run ends before the third."""
    for steps in (3, 9):
        new = tmp_path / f"new{steps}"
        found = call(
            "train", f"--workdir={new}", *flags(place.texts, train__profile=2, train__steps=steps)
        )
        assert found.code == 0 and len(list(new.rglob("*.xplane.pb"))) == 1


@pytest.mark.parametrize("step", [None, "8", "best"])
def test_evaluate_repeats_the_score_of_training(place: Place, step: str | None) -> None:
    scores = dev_scores(place.run)
    wanted = {None: 12, "8": 8, "best": min(scores, key=lambda s: scores[s])}[step]
    words = [] if step is None else [f"--step={step}"]
    found = call("evaluate", f"--workdir={place.run}", "--split=valid", *words).last()
    assert (found["split"], found["protocol"], found["step"]) == ("valid", "authors", wanted)
    assert found["nll"] == scores[wanted]


def test_python_does_what_the_commands_do(place: Place) -> None:
    scores = allattn.evaluate(place.run, "valid", step="best")
    assert (
        scores == call("evaluate", f"--workdir={place.run}", "--split=valid", "--step=best").last()
    )
    pieces = list(allattn.generate(place.run, "abc", length=9, temperature=0.5, top_k=3, seed=4))
    words = ["--prompt=abc", "--length=9", "--temperature=0.5", "--top_k=3", "--seed=4"]
    assert len(pieces) == 9
    assert (
        "abc" + b"".join(pieces).decode() + "\n"
        == call("generate", f"--workdir={place.run}", *words).out
    )


@pytest.mark.parametrize("first", ["allattn", "allattn.run, allattn.train, allattn.evaluation"])
def test_public_names_in_any_order_of_imports(first: str) -> None:
    """Every public name is a function or an exception, whatever was imported before."""
    program = (
        f"import {first}\n"
        "from allattn import evaluate\n"
        "assert evaluate is allattn.evaluate\n"
        "for name in allattn.__all__: assert callable(getattr(allattn, name)), name\n"
        "for call in (allattn.evaluate, lambda folder: allattn.generate(folder, 'a')):\n"
        "    try: call('nowhere')\n"
        "    except allattn.UserError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.count("no checkpoint in nowhere") == 2, done.stderr


@pytest.mark.parametrize("name", sorted(allattn._HOMES.keys() - {"train_and_evaluate"}))
def test_examples_of_docstrings(place: Place, name: str) -> None:
    """What they print is as they say, of a run in `workdir`."""
    function = getattr(allattn, name)
    names = {**vars(sys.modules[function.__module__]), "workdir": str(place.run)}
    names["allattn"] = allattn
    (example,) = doctest.DocTestFinder(recurse=False).find(function, name, globs=names)
    assert example.examples
    runner = doctest.DocTestRunner(verbose=False)
    assert runner.run(example).failed == 0


def test_learned_spans(place: Place) -> None:
    """In tokens, as the log has them."""
    spans_XH = allattn.load(place.run).spans_XH()
    last = allattn.read_metrics(place.run)[-2]
    assert spans_XH.shape == (1, 2) and last["step"] == 12
    assert spans_XH.mean() == pytest.approx(last["mean_span"]) and spans_XH.max() == pytest.approx(
        last["max_span"]
    )


def test_evaluate_full(place: Place) -> None:
    found = call("evaluate", f"--workdir={place.run}", "--split=valid", "--protocol=full").last()
    assert (found["protocol"], found["tokens"]) == ("full", 599)
    assert 0 < abs(found["nll"] - dev_scores(place.run)[12]) < 0.05


def test_evaluate_text(place: Place) -> None:
    text = place.folder / "own.txt"  # 29 bytes and the closing newline
    found = call("evaluate", f"--workdir={place.run}", f"--text={text}", "--protocol=full").last()
    assert (found["split"], found["tokens"]) == (str(text), 29)
    same = call("evaluate", f"--workdir={place.run}", f"--text={place.texts}/test.txt").last()
    assert same["nll"] == place.trained.last()["nll"]


def test_evaluate_data_elsewhere(place: Place, tmp_path: Path) -> None:
    (tmp_path / "moved").symlink_to(place.texts)
    found = call("evaluate", f"--workdir={place.run}", f"--data_dir={tmp_path}/moved").last()
    assert found["nll"] == place.trained.last()["nll"]


def test_generate_samples(place: Place) -> None:
    """Several texts, each with a seed one higher, and an empty line between two."""
    words = ["generate", f"--workdir={place.run}", "--prompt=abc", "--length=9"]
    texts = [call(*words, f"--seed={seed}").out for seed in (3, 4)]
    assert call(*words, "--seed=3", "--samples=2").out == "\n".join(texts)


def test_generate_from_a_file(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes of the file or of standard input, line ends included."""
    (tmp_path / "prompt").write_bytes(b"abc\nab")
    words = ["generate", f"--workdir={place.run}", "--length=9"]
    typed = call(*words, "--prompt=abc\nab").out
    assert call(*words, f"--prompt_file={tmp_path}/prompt").out == typed
    for flag in ("--prompt=-", "--prompt_file=-"):
        with (tmp_path / "prompt").open() as file:
            monkeypatch.setattr("sys.stdin", file)
            assert call(*words, flag).out == typed


def test_progress(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Lines where there is no terminal, one that changes where there is; nothing at first."""
    times = iter([0, 1, 2, 11, 12, 22, 0, 0, 4, 5])
    monkeypatch.setattr(waiting, "time", SimpleNamespace(monotonic=lambda: next(times)))
    with waiting.Waiting("scoring", "blocks") as progress:
        for done in range(5):
            progress(done, 100)
    first, second = capsys.readouterr().err.splitlines()
    assert first == "scoring: 2 of 100 blocks, about 0:08:10 left"
    assert second == "scoring: 4 of 100 blocks, about 0:08:24 left"

    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with waiting.Waiting("scoring", "blocks") as progress:
        for done in range(3):
            progress(done, 2000)
    out = capsys.readouterr().err
    assert "\n" not in out and out.endswith("\r\x1b[K")
    assert "scoring: 1 of 2,000 blocks" in out


def test_progress_of_both_commands(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """On standard error, beside what they print; all of it is done at the end."""
    monkeypatch.setattr(waiting.Waiting.__init__, "__defaults__", (-1.0, -1.0))
    scored = call("evaluate", f"--workdir={place.run}")
    assert scored.last() == place.trained.last()
    assert "scoring: 0 of " in scored.err
    drawn = call("generate", f"--workdir={place.run}", "--prompt=abc", "--length=5")
    assert "text 1 of 1: 7 of 7 symbols" in drawn.err and len(drawn.out) == 9


def test_generate(place: Place) -> None:
    words = ["generate", f"--workdir={place.run}", "--prompt=abc", "--length=30"]
    first = call(*words, "--seed=1")
    again = call(*words, "--seed=1")
    assert (
        first.code == 0
        and first.out.startswith("abc")
        and first.out.endswith("\n")
        and len(first.out) == 34
    )
    assert set(first.out) <= set(LETTERS + " \n")
    assert first.out == again.out != call(*words, "--seed=2").out
    assert call(*words, "--temperature=0").out == call(*words, "--top_k=1").out


# --- the configuration of an experiment


def test_config(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every field with its meaning, and a mark on those that the file or a setting changes."""
    monkeypatch.chdir(ROOT)
    found = call("config", "--config=configs/demo.py", "--config.model.heads=4")
    assert (found.code, found.err) == (0, "")
    settings = [line.split("  # ")[0].rstrip() for line in found.out.splitlines()]
    assert settings[:2] == ["  seed = 0", "* dataset.name = 'stdlib'"]
    assert {"* model.heads = 4", "* model.span.loss = 0.0", "  mesh.data = -1"} <= set(settings)


def test_config_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    """The text that a checkpoint has."""
    monkeypatch.chdir(ROOT)
    found = call("config", "--config=configs/demo.py", "--config.seed=3", "--json")
    loaded = allattn.load_config("configs/demo.py", {"seed": "3"})
    assert found.code == 0
    assert found.out == config.to_json(loaded) + "\n"


def changes(*words: str) -> dict[str, str]:
    """The fields that these words make different from configs/base.py."""
    found = call("config", *words)
    assert (found.code, found.err) == (0, ""), found.err
    lines = [line.split("  # ")[0] for line in found.out.splitlines() if line[0] == "*"]
    return dict(line.removeprefix("* ").rstrip().split(" = ") for line in lines)


def test_forms_of_settings() -> None:
    """Those of ml_collections' flags: a separate word, a tuple as Python writes it, booleans."""
    assert changes("--config.model.depth", "3", "--config.seed=4") == {
        "seed": "4",
        "model.depth": "3",
    }
    assert changes("--config.train.init_from", "-x") == {"train.init_from": "'-x'"}
    for text in ("20,40", "(20,40)", "(20, 40,)", "[20,40]"):
        cutoffs = changes("--config.model.adaptive_io.cutoffs", text)
        assert cutoffs == {"model.adaptive_io.cutoffs": "(20, 40)"}
    assert changes("--noconfig.model.span.adaptive", "--config=base") == {
        "model.span.adaptive": "False"
    }
    # After a truth value the next word is a word of its own.
    assert changes("--config.model.adaptive_io.tied", "--config.seed", "1") == {"seed": "1"}


OWN = """
from ml_collections import config_dict
from allattn.configs import base

def get_config(size="7"):
    c = base.get_config().unlock()
    c.seed = int(size)
    c.own = config_dict.ConfigDict()
    c.own.flag = False
    c.own.nothing = None
    c.own.names = ("a", "b")
    c.own.open = config_dict.placeholder(int)
    c.own.needed = config_dict.required_placeholder(float)
    return c
"""


def test_fields_of_an_experiment_of_ones_own(tmp_path: Path) -> None:
    """An argument of get_config(), placeholders that are filled or not, None, and texts."""
    file = tmp_path / "mine.py"
    file.write_text(OWN)
    needed = ["--config.own.needed", "2"]
    assert changes(f"--config={file}:12", *needed) == {
        "seed": "12",
        "own.flag": "False",
        "own.names": "('a', 'b')",
        "own.needed": "2.0",
        "own.nothing": "None",
        "own.open": "None",
    }
    words = ["--config.own.flag", "--config.own.nothing=3", "--config.own.names=x,y"]
    found = changes("--config", str(file), *needed, *words, "--config.own.open=4")
    assert (found["seed"], found["own.flag"], found["own.nothing"]) == ("7", "True", "3")
    assert (found["own.names"], found["own.open"]) == ("('x', 'y')", "4")

    # A placeholder has the type that it was made with, and a required one is not left open.
    for word, message in (
        ("--config.own.open=x", "--config.own.open: expected int, found 'x'"),
        ("--config.own.needed=None", "--config.own.needed: expected a value (float)"),
    ):
        refused = call("config", f"--config={file}", word)
        assert refused.code == 2 and message in refused.err


def test_fields_with_comments() -> None:
    """Without an experiment those of base.py; also where a command is asked for its help."""
    plain = call("config")
    assert plain.out.startswith("  seed = 0 ") and "# layers\n" in plain.out
    assert call("train", "--help=config").out == plain.out
    demo = call("train", "--config", "demo", "--help=config", "--workdir=x")
    assert demo.out == call("config", "--config=demo").out != plain.out


def test_configs() -> None:
    """Every experiment with its parameters; the papers' with hardware and score."""
    blocks = call("configs").out.split("\n")
    assert [name for name in blocks if name and name[0] != " "] == sorted(
        experiments.names(), key=lambda name: ("/" in name, name)
    )
    for name in set(experiments.names()) - {"base"}:
        summary = experiments.summary(name)
        assert "parameters" in summary and ("published" in summary) >= ("_tiny" not in name) - (
            name == "demo"
        )
    assert experiments.summary("wikitext103")["published"].endswith("(arXiv 1907.01470).")


def test_verbose(place: Place) -> None:
    """The lines of the libraries, of which there are none otherwise."""
    assert "orbax" in process("evaluate", f"--workdir={place.run}", "--verbose").err


# --- help and mistakes ----------------------------------------------------------------------------


NO_WORKDIR = ([], ["config"], ["configs"], ["compile"], ["data"])


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=lambda c: " ".join(c))
def test_help(command: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    out = capsys.readouterr().out
    assert caught.value.code == 0 and out.startswith(f"usage: {' '.join(['allattn', *command])}")
    assert "--workdir" in out or command in NO_WORKDIR


def test_no_command_teaches() -> None:
    """Every command, with an example."""
    out = call().out
    for command in commands.COMMANDS:
        assert command.summary[:30] in out and f"  {command.example}\n" in out


@pytest.mark.parametrize("command", commands.COMMANDS, ids=lambda command: command.name)
def test_examples(command: Command) -> None:
    """The flags of every example are right."""
    arguments, overrides = commands.flags.parse(commands.COMMANDS, shlex.split(command.example)[1:])
    assert arguments.chosen is command
    assert bool(overrides) == ("--config." in command.example)


def test_help_has_the_defaults(capsys: pytest.CaptureFixture) -> None:
    for words in (["generate", "--help"], ["sweep", "--help"]):
        with pytest.raises(SystemExit):
            main(words)
    out = " ".join(capsys.readouterr().out.split())
    for default in ("draw (default: 200)", "all (default: 0)", "experiment (default: 3)"):
        assert default in out


def test_version(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert (caught.value.code, capsys.readouterr().out) == (0, f"allattn {allattn.__version__}\n")


def test_help_is_quick() -> None:
    began = time.monotonic()
    assert process("generate", "--help").code == 0
    assert time.monotonic() - began < 2


def test_a_process_writes_one_line(place: Place) -> None:
    """Nothing of the libraries stands beside the message, and nothing at all where there is no
    mistake.
    """
    found = process("generate", f"--workdir={place.run}", "--prompt=a?c")
    assert (found.code, found.out) == (2, "")
    assert found.err == "allattn: byte b'?' at offset 1 is none of the vocabulary's 16 symbols\n"
    found = process("evaluate", f"--workdir={place.run}")
    assert (found.code, found.err) == (0, "")
    assert found.last() == pytest.approx(
        place.trained.last()
    )  # a device per core, and sums in their order


def test_closed_output(place: Place) -> None:
    """A reader such as `head` may leave before the end."""
    words = [
        sys.executable,
        "-m",
        "allattn",
        "generate",
        f"--workdir={place.run}",
        "--prompt=a",
        "--length=2000",
    ]
    with subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as running:
        assert running.stdout and running.stderr
        assert running.stdout.read(3)[:1] == b"a"
        running.stdout.close()
        assert running.stderr.read() == b"allattn: the output was closed before the end\n"
        assert running.wait() == 1


TRAIN = "train --workdir={folder}/new"
SCORE = "evaluate --workdir={run}"
WRITE = "generate --workdir={run}"
MISTAKES = [
    # words, settings, a piece of the message
    ("", {}, "expected a command, one of train, evaluate,"),
    ("trian", {}, "unknown argument 'trian'; did you mean train?"),
    ("qqq", {}, "unknown argument 'qqq'; `allattn --help` lists"),
    ("train", {}, "required: --workdir"),
    ("train --confg=demo", {}, "unknown argument '--confg=demo'; did you mean --config=demo?"),
    ("train --confg.seed 3", {}, "'--confg.seed'; did you mean --config.seed?"),
    ("train --steps=60", {}, "'--steps=60'; did you mean --config.train.steps=60?"),
    ("config --depth 2", {}, "unknown argument '--depth'; did you mean --config.model.depth?"),
    ("evaluate --steps=60", {}, "'--steps=60'; did you mean --step=60?"),
    ("evaluate --spilt=test", {}, "did you mean --split=test?"),
    ("train --workdir= --config=demo", {}, "--workdir: expected a path, found nothing"),
    ("train --workdir={folder}/new --config=", {}, "--config: expected a path, found nothing"),
    ("evaluate --workdir={texts}/train.txt", {}, "expected a folder, found the file {texts}/train"),
    ("config --config=dmo", {}, "found no file dmo; did you mean --config=demo?"),
    ("config --config=demo:large", {}, "get_config() takes 0 positional arguments"),
    ("config --config.seed", {}, "--config.seed: expected a value, as in --config.seed=VALUE"),
    ("config --config.seed --verbose", {}, "--config.seed: expected a value"),
    ("config --config.model.span.adaptive no", {}, "unknown argument 'no'"),
    ("config --noconfig.seed", {}, "--noconfig.seed: expected a truth value's name"),
    ("config --noconfig.model.span.adaptive=3", {}, "unknown argument '--noconfig.model.span"),
    ("config --config={folder}/none.py", {}, "found no file"),
    ("config --config=configs/demo.py stray", {}, "unknown argument 'stray'"),
    ("config --config=configs/demo.py --config.model.widht=3", {}, "did you mean --config.model."),
    ("config --config=configs/demo.py --config.model.width=wide", {}, "expected int"),
    ("config --config=configs/demo.py --config.train.batch=0", {}, "train.batch: expected at"),
    ("config --config=configs/demo.py --config.model.heads=3", {}, "a divisor of model.width 128"),
    (f"{TRAIN} --config={{folder}}/none.py", None, "found no file"),
    (
        "train --workdir={folder}/new --config=gs://bucket/a.py",
        None,
        "expected a file on this machine",
    ),
    (f"{TRAIN} stray", {}, "unknown argument 'stray'"),
    (TRAIN, {"model__widht": 3}, "did you mean --config.model.width?"),
    (TRAIN, {"model__width": "wide"}, "expected int"),
    (TRAIN, {"train__accumulation": 3}, "train.batch: expected a multiple of"),
    (TRAIN, {"train__accumulation": 0}, "train.accumulation: expected at least 1, found 0"),
    (TRAIN, {"train__block": 0}, "train.block: expected at least 1, found 0"),
    (TRAIN, {"train__block": 5000}, "a row has 510 and needs 5001"),
    (TRAIN, {"train__init_from": "{folder}/none"}, "no checkpoint in {folder}/none"),
    (
        TRAIN,
        {"train__init_from": "{run}", "model__width": 32},
        "configuration, found width: 16 there, 32 here",
    ),
    (TRAIN, {"model__span__limit": 0}, "model.span.limit: expected at least 1, found 0"),
    (TRAIN, {"model__span__init": 2}, "model.span.init: expected a number in [0, 1], found 2.0"),
    (TRAIN, {"model__span__check_every": 1}, "model.span.check_every: expected at least"),
    (TRAIN, {"model__vocab_size": 7}, "16 symbols in files; found 7"),
    (TRAIN, {"dataset__name": "enwik9"}, "unknown data set 'enwik9': did you mean 'enwik8'?"),
    (TRAIN, {"dataset__data_dir": "{folder}/none"}, "found nothing at "),
    (TRAIN, {"dataset__unit": "line"}, "unit must be byte or word or bpe, found 'line'"),
    (
        TRAIN,
        {"model__layer": "transformer_xl"},
        "model.feed_forward: expected at least 1 with transformer_xl",
    ),
    (TRAIN, {"mesh__data": 3}, "mesh: expected data x fsdp x tensor = 1 devices"),
    ("train --workdir={run}", {"model__width": 32}, "model.width: 16 in the workdir, 32 now"),
    (
        "train --workdir=s3://bucket/run",
        {},
        "workdir: expected a folder or a URL such as gs://bucket/run",
    ),
    (
        "train --workdir={texts}/train.txt",
        {},
        "--workdir: expected a folder, found the file {texts}/train.txt",
    ),
    ("train --workdir={run}", {"seed": 1}, "seed: 0 in the workdir, 1 now"),
    ("evaluate --workdir={folder}/new", {}, "no checkpoint in {folder}/new"),
    ("generate --workdir={folder}/new --prompt=a", {}, "no checkpoint in {folder}/new"),
    ("evaluate --workdir={texts}", {}, "no checkpoint in {texts}"),
    ("evaluate --workdir={run}/checkpoints", {}, "expected the folder that holds it, {run}\n"),
    (
        f"{SCORE} --step=5",
        {},
        "no checkpoint of step 5 in {run}: expected best, sound or one of [4, 8, 12]",
    ),
    (f"{SCORE} --step=-1", {}, "no checkpoint of step -1"),
    (f"{SCORE} --step=worst", {}, "no checkpoint of step worst"),
    (f"{SCORE} --split=dev", {}, "invalid choice: 'dev'"),
    (f"{SCORE} --protocol=ful", {}, "invalid choice: 'ful'"),
    (
        f"{SCORE} --protocol=xl",
        {},
        "protocol xl: expected model.layer transformer_xl, found all_attention",
    ),
    (f"{SCORE} --seed=1", {}, "unknown argument '--seed=1'"),
    (f"{SCORE} --config.model.width=3", {}, "unknown argument '--config.model.width=3'"),
    (f"{SCORE} --data_dir={{folder}}/none", {}, "found nothing at "),
    (f"{SCORE} --text={{folder}}/none.txt", {}, "--text: expected a file"),
    (f"{SCORE} --text={{folder}}", {}, "--text: expected a file"),
    (f"{SCORE} --text={{folder}}/foreign.txt", {}, "byte b'?' at offset 7"),
    (f"{SCORE} --text={{folder}}/short.txt", {}, "authors: expected at least 136 tokens, found 4"),
    (
        f"{SCORE} --text={{folder}}/empty.txt --protocol=full",
        {},
        "full: expected at least 2 tokens, found 0",
    ),
    (WRITE, {}, "one of the arguments --prompt --prompt_file is required"),
    (f"{WRITE} --prompt=a --prompt_file=b", {}, "not allowed with argument --prompt"),
    (f"{WRITE} --prompt_file={{folder}}/none", {}, "--prompt_file: expected a file, found"),
    (f"{WRITE} --prompt_file={{folder}}", {}, "--prompt_file: expected a file, found"),
    (f"{WRITE} --prompt=a --samples=0", {}, "--samples: expected at least 1, found 0"),
    (f"{WRITE} --prompt=", {}, "--prompt: expected at least one symbol"),
    (f"{WRITE} --prompt=ab?", {}, "byte b'?' at offset 2"),
    (f"{WRITE} --prompt=a\udcff", {}, "byte b'\\xff' at offset 1"),
    (f"{WRITE} --prompt=a --length=-1", {}, "length -1"),
    (f"{WRITE} --prompt=a --length=x", {}, "invalid int value: 'x'"),
    (f"{WRITE} --prompt=a --temperature=nan", {}, "temperature nan"),
    (f"{WRITE} --prompt=a --top_p=0", {}, "top_p 0.0"),
    (f"{WRITE} --prompt=a --seed=99999999999999999999", {}, "--seed: expected"),
    ("data --dataset=enwik9", {}, "did you mean 'enwik8'?"),
    ("data --dataset=files", {}, "needs data_dir"),
    (
        "data --dataset=enwik8 --manual_dir={folder}/none",
        {},
        "manual_dir: {folder}/none is not a folder",
    ),
    ("data --dataset=text8 --manual_dir={texts}", {}, "no text8.zip, in {texts}"),
]


@pytest.mark.parametrize(
    ("words", "settings", "message"), MISTAKES, ids=[f"{w[:40]} {s}" for w, s, _ in MISTAKES]
)
def test_mistake(place: Place, words: str, settings: dict | None, message: str) -> None:
    """Exit code 2, one line that says what is wrong, and nothing created or changed."""
    names = {"folder": place.folder, "texts": place.texts, "run": place.run}
    given = [word.format(**names) for word in words.split()]
    if "--workdir" in words and words.startswith("train") and settings is not None:
        given += [word.format(**names) for word in flags(place.texts, **settings)]
    before = contents(place.run)
    found = call(*given)
    assert found.code == 2, found
    assert (
        found.err.startswith("allattn: ")
        and found.err.count("\n") == 1
        and found.err.endswith("\n")
    )
    assert message.format(**names) in found.err
    assert not words.startswith(("evaluate", "generate")) or found.out == ""
    assert contents(place.run) == before and not (place.folder / "new").exists()


def test_transformer_xl(place: Place, tmp_path: Path) -> None:
    """Trained across the stream's wrap, scored by its own protocol with lengths of its own, sampled
    from.
    """
    xl = {
        "model__layer": "transformer_xl",
        "model__persistent": 0,
        "model__feed_forward": 16,
        "model__dropout": 0.1,
    }
    xl |= {"model__span__adaptive": False, "evaluate__protocol": "xl", "evaluate__target_length": 7}
    xl |= {
        "evaluate__memory_length": 20,
        "evaluate__clamp_length": 9,
        "train__steps": 34,
        "train__finetune_steps": 0,
    }
    xl |= {"checkpoint__every": 34, "evaluate__every": 34}
    trained = call("train", f"--workdir={tmp_path}", *flags(place.texts, **xl)).last()
    found = call("evaluate", f"--workdir={tmp_path}", "--protocol=xl").last()
    assert found == trained and found["tokens"] == 590 and 0.5 < found["bpc"] < 4
    written = call("generate", f"--workdir={tmp_path}", "--prompt=ab", "--length=9").out
    assert written.startswith("ab") and len(written) == 12


def test_home_folder_in_a_workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shell leaves ~ alone in --workdir=~/run."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert f"expected {tmp_path}/run/checkpoints" in call("evaluate", "--workdir=~/run").err


def test_loss_that_is_not_a_number(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 1; the message names the step; the checkpoint from before stands, and the run
    resumes from it.
    """
    advance = train.Trainer.step

    def poison(self: train.Trainer, state: train.TrainState, *rest: Any) -> Any:
        if int(state.step) == 5:
            state.params["io"]["bias"] = state.params["io"]["bias"] * np.nan
        return advance(self, state, *rest)

    monkeypatch.setattr(train.Trainer, "step", poison)
    words = ["train", f"--workdir={tmp_path}/run", *flags(place.texts)]
    found = call(*words)
    assert (found.code, found.err) == (
        1,
        "allattn: the loss of step 6 is not a number; the last good checkpoint is that of step 4\n",
    )
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["4"]
    monkeypatch.setattr(train.Trainer, "step", advance)
    assert call(*words).last() == place.trained.last()
