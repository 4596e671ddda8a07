"""A run whose workdir is a bucket: trained, resumed, evaluated, sampled."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("gcsfs", reason="gcsfs is not installed: pip install -e '.[gcs]'")
ROOT = Path(__file__).resolve().parents[1]
TEXT = ("dataset.name=files", "model.vocab_size=0")
SIZES = ("train.block=16", "train.batch=4", "model.depth=1", "model.width=16", "model.heads=2", "model.persistent=4")
TIMES = ("model.span.limit=32", "checkpoint.every=4", "evaluate.every=4", "train.log_every=2", "train.finetune_steps=0")
SMALL = ("--config=configs/demo.py", *(f"--config.{field}" for field in TEXT + SIZES + TIMES))
Command = Callable[..., subprocess.CompletedProcess]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """Runs allattn with workdir gs://bucket/run, served from memory."""
    folder = tmp_path_factory.mktemp("bucket")
    for split in ("train", "valid", "test"):
        (folder / f"{split}.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    server = subprocess.Popen(
        [sys.executable, str(ROOT / "tests/fake_bucket.py"), str(folder / "port")], stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 30
    while not (folder / "port").exists() or not (folder / "port").read_text():
        assert time.monotonic() < deadline and server.poll() is None
        time.sleep(0.05)
    url = f"http://127.0.0.1:{(folder / 'port').read_text()}"
    environment = {
        **{**os.environ, "JAX_PLATFORMS": "cpu", "HOME": str(folder)},
        **{"STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url, "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none"},
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # it would look for credentials
    }

    def run(name: str, *words: str) -> subprocess.CompletedProcess:
        words = (name, "--workdir=gs://bucket/run", *words)
        if name == "train":
            words += (*SMALL, f"--config.dataset.data_dir={folder}")
        line = [sys.executable, "-m", "allattn", *words]
        return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)

    run.environment = environment  # type: ignore[attr-defined]
    yield run
    server.kill()


READ = """
import json, tempfile
from etils import epath
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from allattn import metrics
folder, local = epath.Path("gs://bucket/run"), tempfile.mkdtemp()
logged = [row["step"] for row in metrics.read_jsonl(str(folder)) if "nll" in row]
for path in folder.glob("events*"):
    (epath.Path(local) / path.name).write_bytes(path.read_bytes())
events = [event.step for event in EventAccumulator(local).Reload().Scalars("nll")]
print(json.dumps([logged, events]))
"""


def test_a_run_in_a_bucket(command: Command) -> None:
    half = command("train", "--config.train.steps=8")
    assert half.returncode == 0, half.stderr[-2000:]
    whole = command("train", "--config.train.steps=12")
    assert whole.returncode == 0 and "step 12" in whole.stdout, whole.stderr[-2000:]
    scores = json.loads(whole.stdout.splitlines()[-1])
    again = command("train", "--config.train.steps=12")
    assert "gs://bucket/run is complete: 12 of 12 steps" in again.stdout
    assert json.loads(command("evaluate").stdout.splitlines()[-1]) == scores
    assert json.loads(command("evaluate", "--step=best").stdout.splitlines()[-1])["tokens"] == scores["tokens"]
    sample = command("generate", "--prompt=the ", "--length=8")
    assert sample.returncode == 0 and sample.stdout.startswith("the ")
    other = command("train", "--config.seed=7")
    assert other.returncode == 2 and "seed: 0 in the workdir, 7 now" in other.stderr


def test_logs_in_a_bucket(command: Command) -> None:
    """Rows and events of both starts are all there, though nothing can be appended."""
    if command("train", "--config.train.steps=12").returncode:
        pytest.fail("the run of the test before is missing")
    line = [sys.executable, "-c", READ]
    done = subprocess.run(line, cwd=ROOT, env=command.environment, capture_output=True, text=True, timeout=100)  # type: ignore[attr-defined]
    logged, events = json.loads(done.stdout.splitlines()[-1])
    assert logged == events == [2, 4, 6, 8, 10, 12]
