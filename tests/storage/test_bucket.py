"""A run whose texts, prepared data, workdir and logs are in a bucket: trained, resumed, evaluated,
sampled.
"""

import dataclasses
import hashlib
import importlib.util
import json
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from command_line import Result, call, process
from etils import epath
from several_processes import Processes
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_checkpoint import abstract, save

from allattn import RunError, UserError
from allattn.data import builders, prepare
from allattn.storage import lock, paths
from allattn.storage.checkpoint import Checkpointer
from allattn.train import jsonl

# It is imported only where its settings have been made.
missing = importlib.util.find_spec("gcsfs") is None
pytestmark = pytest.mark.skipif(missing, reason="gcsfs is not installed: pip install -e '.[gcs]'")
ROOT = Path(__file__).resolve().parents[2]
TEXT = ("dataset.name=files", "dataset.data_dir=gs://bucket/texts", "model.vocab_size=0")
SIZES = (
    "train.block=16",
    "train.batch=4",
    "model.depth=1",
    "model.width=16",
    "model.heads=2",
    "model.persistent=4",
    "model.implementation=reference",
)
TIMES = (
    "model.span.limit=32",
    "checkpoint.every=4",
    "evaluate.every=4",
    "train.log_every=2",
    "train.finetune_steps=0",
)
FEW = ("checkpoint.keep=1",)  # so that some are removed
RATE = ("optimizer.schedule=constant",)  # which does not depend on the number of steps
SMALL = (
    "--config=configs/demo.py",
    *(f"--config.{field}" for field in TEXT + SIZES + TIMES + FEW + RATE),
)
Command = Callable[..., Result]
NewMachine = Callable[[], Path]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The bucket gs://bucket, served from memory to this process and to those that it starts."""
    port = tmp_path_factory.mktemp("bucket") / "port"
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tests/support/fake_bucket.py"), str(port)],
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 30
    while not port.exists() or not port.read_text():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    url = f"http://127.0.0.1:{port.read_text()}"
    settings = {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
    }
    settings["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # it would look for credentials
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        yield
    process.kill()


@pytest.fixture
def new_machine(server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NewMachine:
    """Gives this process an empty home, where nothing is cached."""
    monkeypatch.delenv("ALLATTN_DATA_DIR", raising=False)

    def make() -> Path:
        home = tmp_path / f"home{len(list(tmp_path.iterdir()))}"
        home.mkdir()
        monkeypatch.setenv("HOME", str(home))
        return home

    return make


# --- data -----------------------------------------------------------------------------------------


def set_source(monkeypatch: pytest.MonkeyPatch, text: bytes | None) -> None:
    """A text in the place of the standard library's; None: it must not be read."""

    def source() -> bytes:
        assert text is not None, "the data set was prepared again"
        return text

    monkeypatch.setattr(builders, "standard_library", source)


def text_of(url: str) -> bytes:
    """The test split of the small data set below, through the vocabulary and back."""
    found = prepare("stdlib", url)
    return found.vocabulary.decode(found.tokens("test")[:])


STDLIB = b"import abc\n" * 30_000


def test_prepared_data_in_a_bucket(
    new_machine: NewMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prepared on one machine, read on another; the file that marks a whole set is the last one to
    be written.
    """
    new_machine()
    set_source(monkeypatch, STDLIB)
    wanted = text_of("gs://bucket/data")
    url = "gs://bucket/data"
    set_source(monkeypatch, None)
    home = new_machine()
    assert text_of(url) == text_of(url + "/") == wanted
    found = prepare("stdlib", url)
    assert found.path.is_relative_to(home / ".cache/allattn/gs/bucket/data")
    there = epath.Path(url) / found.path.relative_to(home / ".cache/allattn/gs/bucket/data")
    assert sorted(path.name for path in there.iterdir()) == sorted(
        path.name for path in found.path.iterdir()
    )
    files = fsspec.filesystem("gcs")
    last = max(there.iterdir(), key=lambda path: int(files.info(str(path))["generation"]))
    assert last.name == paths.MARKER


def test_half_a_copy_is_not_taken(new_machine: NewMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    url = "gs://bucket/half"
    new_machine()
    set_source(monkeypatch, STDLIB)
    wanted = text_of(url)
    (marker,) = epath.Path(url).glob(f"stdlib/*/*/{paths.MARKER}")
    marker.unlink()  # what a process leaves that was killed in the middle of putting it there
    set_source(monkeypatch, None)
    assert (
        text_of(url) == wanted and marker.exists()
    )  # the machine that has it goes on with the copy
    marker.unlink()
    next(marker.parent.glob("*test*")).write_bytes(b"")
    set_source(monkeypatch, STDLIB)
    new_machine()
    assert text_of(url) == wanted and marker.exists()  # another prepares it anew
    set_source(monkeypatch, None)
    home = new_machine()
    half = (
        home / ".cache/allattn" / str(marker.parent.parent).replace("://", "/") / "incomplete.1.0.0"
    )
    half.mkdir(parents=True)  # what a process leaves that was killed in the middle of fetching it
    (half / paths.MARKER).write_text("{}")
    assert text_of(url) == wanted and not half.exists()


def test_the_default_folder_may_be_a_bucket(
    new_machine: NewMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_machine()
    monkeypatch.setenv("ALLATTN_DATA_DIR", "gs://bucket/default")
    set_source(monkeypatch, STDLIB)
    home = new_machine()
    assert prepare("stdlib").path.is_relative_to(home / ".cache/allattn/gs/bucket/default")
    assert list(epath.Path("gs://bucket/default/stdlib").glob(f"*/*/{paths.MARKER}"))
    monkeypatch.setenv("ALLATTN_DATA_DIR", str(home / "disk"))
    set_source(monkeypatch, None)
    assert prepare("stdlib", "gs://bucket/default").path.is_relative_to(
        home / "disk/gs/bucket/default"
    )


def test_archives_in_a_bucket(new_machine: NewMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    new_machine()
    text = bytes(range(97, 107)) * 99 + b"\nabcdefghi"
    members = {"enwik8": (f"md5:{hashlib.md5(text).hexdigest()}", len(text))}
    corpus = dataclasses.replace(builders.Enwik8.corpus, members=members, urls=())
    for name, value in (("corpus", corpus), ("sizes", (900, 50, 50)), ("expected_size", None)):
        monkeypatch.setattr(builders.Enwik8, name, value)
    with (
        epath.Path("gs://bucket/manual/enwik8.zip").open("wb") as file,
        zipfile.ZipFile(file, "w") as archive,
    ):
        archive.writestr("enwik8", text)
    found = prepare("enwik8", manual_dir="gs://bucket/manual")
    assert found.vocabulary.decode(found.tokens("test")[:]) == text[-50:] + b"\n"


MISTAKES = [
    ("--dataset=stdlib --data_dir=gs://other/data", "gs://other/data/stdlib/"),
    (
        "--dataset=files --data_dir=gs://other/texts",
        "gs://other/texts needs train.txt, valid.txt and test.txt; missing",
    ),
    (
        "--dataset=enwik8 --manual_dir=gs://other/manual",
        "manual_dir: gs://other/manual is not a folder",
    ),
    (
        "--dataset=enwik8 --manual_dir=nosuch://bucket/manual",
        "manual_dir: expected a path, or a URL that begins with",
    ),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES, ids=[words for words, _ in MISTAKES])
def test_mistake(
    new_machine: NewMachine, monkeypatch: pytest.MonkeyPatch, words: str, message: str
) -> None:
    """One line before any work is done."""
    new_machine()
    set_source(monkeypatch, None)
    found = call("data", *words.split())
    assert found.code == 2 and found.out == "", found
    assert found.err.startswith("allattn: ") and found.err.count("\n") == 1 and message in found.err


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (FileNotFoundError("gs://b"), UserError),
        (PermissionError("no"), UserError),
        (OSError("Forbidden: b"), UserError),
        (ImportError("Install s3fs"), UserError),
        (TimeoutError("late"), RunError),
        (ConnectionResetError("cut"), RunError),
        (RuntimeError("of a client"), RunError),
    ],
)
def test_what_clients_raise(error: Exception, kind: type[Exception]) -> None:
    """A launcher tries again what is no mistake: it ends with another exit code."""
    with pytest.raises(
        kind, match=f"gs://b/data: expected .* found {type(error).__name__}: {error}"
    ):
        with paths.reached(epath.Path("gs://b/data")):
            raise error


def test_no_such_bucket_for_a_workdir(server: None) -> None:
    """Refused at the start, and not when the first checkpoint is due."""
    with pytest.raises(UserError, match="gs://other/run: expected"):
        Checkpointer("gs://other/run")
    with pytest.raises(UserError, match="no checkpoint in gs://other/run"):
        Checkpointer("gs://other/run", create=False)


# --- a run ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def command(server: None, tmp_path_factory: pytest.TempPathFactory) -> Command:
    """Runs allattn with workdir gs://bucket/run, each time on a machine that has nothing.

    In this process; that each process finds the bucket is shown by two of them below.
    """
    for split in ("train", "valid", "test"):
        (epath.Path("gs://bucket/texts") / f"{split}.txt").write_text(
            "the quick brown fox jumps over the lazy dog\n" * 60
        )

    def run(name: str, *words: str) -> Result:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(ROOT)
            patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
            patch.setenv("ALLATTN_DATA_DIR", "gs://bucket/prepared")
            line = [name, "--workdir=gs://bucket/run", *words]
            if name == "train":
                line += SMALL
            return call(*line)

    return run


@pytest.fixture(scope="module")
def trained(command: Command) -> dict[str, Any]:
    """The scores of a run that was made in two starts."""
    half = command("train", "--config.train.steps=8")
    assert half.code == 0, half.err[-2000:]
    whole = command("train", "--config.train.steps=12")
    assert whole.code == 0 and "step 12" in whole.out, whole.err[-2000:]
    return whole.last()


def test_a_workdir_out_of_reach(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newcomer's mistake on a machine in a cloud: one line, and no launcher tries again.

    Once in a process of its own, where clients might have a last word.
    """
    found = {"other": command("train", "--workdir=gs://other/run")}
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ALLATTN_DATA_DIR", "gs://bucket/prepared")
    found["private"] = process("train", "--workdir=gs://private/run", *SMALL)
    for bucket, result in found.items():
        assert result.code == 2, result.err[-2000:]
        assert "Traceback" not in result.err and "step" not in result.out
        assert result.err.splitlines()[-1].startswith(f"allattn: gs://{bucket}/run")


def test_a_run_in_a_bucket(command: Command, trained: dict[str, Any]) -> None:
    again = command("train", "--config.train.steps=12")
    assert "gs://bucket/run is complete: 12 of 12 steps" in again.out
    assert command("evaluate").last() == trained
    best = command("evaluate", "--step=best", "--text=gs://bucket/texts/test.txt")
    assert best.last()["tokens"] == trained["tokens"]
    sample = command("generate", "--prompt=the ", "--length=8")
    assert sample.code == 0 and sample.out.startswith("the ")
    other = command("train", "--config.seed=7")
    assert other.code == 2 and "seed: 0 in the workdir, 7 now" in other.err


def test_what_a_run_leaves_in_a_bucket(trained: dict[str, Any], tmp_path: Path) -> None:
    """Rows and events of both starts, though nothing can be appended; the checkpoints that are kept
    and no others.
    """
    run = epath.Path("gs://bucket/run")
    for path in run.glob("events*"):
        path.copy(tmp_path / path.name)
    events = [event.step for event in EventAccumulator(str(tmp_path)).Reload().Scalars("nll")]
    assert (
        [row["step"] for row in jsonl.read_jsonl(str(run)) if "nll" in row]
        == events
        == [2, 4, 6, 8, 10, 12]
    )
    rows = {row["step"]: row["dev_nll"] for row in jsonl.read_jsonl(str(run)) if "dev_nll" in row}
    best = min(rows, key=lambda step: rows[step])
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"12", str(best)}
    assert json.loads((run / "scores.json").read_text())["nll"] == trained["nll"]


def test_damage_in_a_bucket(server: None) -> None:
    """It is named, the one before is taken instead, and what is damaged is set aside."""
    run = epath.Path("gs://bucket/damaged")
    with Checkpointer(str(run)) as checkpoints:
        for step in (10, 20):
            save(checkpoints, step)
    (file,) = [path for path in (run / "checkpoints/20/params/d").iterdir()][:1]
    content = file.read_bytes()
    file.write_bytes(bytes(len(content)))
    name = f"checkpoints/20/params/d/{file.name} is not as it was written"
    with Checkpointer(str(run), create=False) as checkpoints:
        assert checkpoints.resolve("sound") == 10
        with pytest.raises(UserError, match=name):
            checkpoints.restore_params(abstract({})[0], 20)
    with Checkpointer(str(run)) as checkpoints:
        assert checkpoints.restore_newest(abstract)[-1]["step"] == 10
        assert checkpoints.steps() == [10]
    aside = run / "checkpoints-damaged/20/params/d" / file.name
    assert aside.read_bytes() == bytes(len(content))


def test_the_lock_of_a_bucket(server: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Held, released, left by a process that is gone, and taken over."""
    monkeypatch.setattr(lock, "SETTLE", 0.05)
    url = "gs://bucket/locked"
    with Checkpointer(url):
        with pytest.raises(UserError, match=f"{url}: expected no other run there, found process"):
            Checkpointer(url)
        held = (epath.Path(url) / lock.NAME).read_text()
    assert not (epath.Path(url) / lock.NAME).exists()
    (epath.Path(url) / lock.NAME).write_text(held.replace('"began": "', '"began": "1'))
    with Checkpointer(url) as first:
        with pytest.raises(RunError, match=f"{url} was taken over by process"):
            with Checkpointer(url, force=True):
                save(first, 10)
                first.steps()


def test_two_processes_and_a_bucket(
    trained: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each on a machine that has nothing: process 0 prepares the data while the other waits; the
    scores of one.
    """
    monkeypatch.setenv("ALLATTN_DATA_DIR", "gs://bucket/prepared-by-two")

    def words(i: int, started: Processes) -> list[str]:
        run = [
            "train",
            "--workdir=gs://bucket/two",
            *SMALL,
            "--config.train.steps=12",
            "--config.checkpoint.every=6",
            "--config.evaluate.every=6",
        ]
        return [*run, *started.place(i)]

    with Processes(2, 1, words, own=lambda i: {"HOME": str(tmp_path / f"home{i}")}) as two:
        results = two.results()
    assert [result.code for result in results] == [0, 0], results[0].err[-2000:]
    scores = results[0].last()
    assert scores == {
        **trained,
        **{name: pytest.approx(trained[name], rel=1e-5) for name in ("nll", "bpc", "ppl")},
    }
    said = ["preparing files in" in result.out + result.err for result in results]
    assert said == [True, False] and results[1].out == ""
    fetched = tmp_path / "home1/.cache/allattn/gs/bucket/prepared-by-two"
    assert len(list(fetched.glob(f"files/*/*/{paths.MARKER}"))) == 1
    assert json.loads(epath.Path("gs://bucket/two/scores.json").read_text())["nll"] == scores["nll"]
