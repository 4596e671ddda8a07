"""Several processes on this machine, over gloo: the numbers of one, and an end with a message for all.

Dimension key: B row of the batch.
"""

import http.server
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import Result, flags, write_texts

from allattn import data
from benchmarks.processes import at_once

ROOT = Path(__file__).resolve().parents[1]
# Four devices or more share rows, heads and parameters; nothing depends on the number of steps.
RUN = {"model__width": 32, "model__heads": 2, "train__batch": 8, "train__finetune_steps": 0, "checkpoint__every": 10}
RUN |= {"evaluate__every": 100_000, "optimizer__schedule": "constant", "model__dropout": 0.2}
LONG = 10_000  # repetitions of a text that make it take ten seconds to score, or longer


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


@pytest.fixture(autouse=True)
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes share what is prepared, and leave nothing behind."""
    monkeypatch.setenv("ALLATTN_DATA_DIR", str(tmp_path / "prepared"))


def prepared_texts(folder: Path) -> Path:
    """Texts that are prepared already, so that a process has nothing to say of that."""
    texts = write_texts(folder)
    data.prepare("files", texts)
    return texts


class Processes:
    """`count` processes of one program; those that are left when the test ends are killed."""

    def __init__(self, count: int, devices: int, words: Any) -> None:
        self.port, self.count = free_port(), count
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.running = [
            subprocess.Popen([sys.executable, *words(i, self)], cwd=ROOT, env=environment, **pipes)
            for i in range(count)
        ]

    def place(self, i: int) -> list[str]:
        """Flags of one of them."""
        shared = [f"--coordinator=localhost:{self.port}", f"--processes={self.count}", "--wait=150"]
        return [*shared, f"--process={i}"] if self.count > 1 else []

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        self.send(signal.SIGKILL)
        for process in self.running:
            process.communicate()

    def send(self, what: signal.Signals) -> None:
        for process in self.running:
            process.send_signal(what)

    def results(self, seconds: float = 200) -> list[Result]:
        found = [process.communicate(timeout=seconds) for process in self.running]
        return [Result(p.returncode, said(out), err) for p, (out, err) in zip(self.running, found, strict=True)]


def said(out: str) -> str:
    """What a process printed, without what gloo says of its connections."""
    return "".join(line for line in out.splitlines(keepends=True) if not line.startswith("[Gloo]"))


def train(
    texts: Path, workdir: Path, processes: int, devices: int, each: Any = lambda _: {}, **changes: Any
) -> Processes:
    """A training run; `each` gives the settings of one process."""

    def words(i: int, started: Processes) -> list[str]:
        settings = flags(texts, **{**RUN, **changes, **each(i)})
        return ["-m", "allattn", "train", f"--workdir={workdir}", *settings, *started.place(i)]

    return Processes(processes, devices, words)


def losses(workdir: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["nll"] for row in rows if "nll" in row}


def wait_for(folder: Path, pattern: str, ready: Any = lambda _: True, seconds: float = 150) -> None:
    """Until a file of the folder that has this name is ready."""
    deadline = time.monotonic() + seconds
    while not any(map(ready, folder.glob(pattern))):
        assert time.monotonic() < deadline, pattern
        time.sleep(0.05)


def test_killed_and_resumed_on_other_meshes(tmp_path: Path) -> None:
    """2 processes x 4 devices are killed and go on as 4 x 2 and as 1 x 8: the losses of one process and one device."""
    texts, workdir, other = prepared_texts(tmp_path), tmp_path / "run", tmp_path / "other"
    with train(texts, workdir, 2, 4, train__steps=100_000, mesh__fsdp=2, mesh__tensor=2) as first:
        wait_for(workdir, "checkpoints/20")
        first.send(signal.SIGKILL)
        first.results()
    saved = max(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal())
    shutil.copytree(workdir, other)
    whole = {"train__steps": saved + 5}
    with train(texts, workdir, 4, 2, mesh__fsdp=4, **whole) as second, train(texts, other, 1, 8, **whole) as third:
        for result in (*second.results(), *third.results()):
            assert result.code == 0, result.err[-2000:]
    with train(texts, tmp_path / "alone", 1, 1, **whole) as alone:
        assert alone.results()[0].code == 0
    expected = losses(tmp_path / "alone")
    assert list(expected) == list(range(1, saved + 6))
    for resumed in (workdir, other):
        found = losses(resumed)
        assert {step: found[step] for step in expected} == pytest.approx(expected, rel=2e-5)


def test_a_machine_that_is_taken_away(tmp_path: Path) -> None:
    """SIGTERM to one of two processes: both save and exit with 75; the run goes on; only process 0 writes logs."""
    texts, workdir = prepared_texts(tmp_path), tmp_path / "run"
    with train(texts, workdir, 2, 1, train__steps=100_000, checkpoint__every=100_000) as both:
        wait_for(workdir, "metrics.jsonl")
        both.running[1].send_signal(signal.SIGTERM)
        results = both.results()
    assert [result.code for result in results] == [75, 75]
    lines = {result.err.strip().splitlines()[-1] for result in results}
    (saved,) = [int(path.name) for path in (workdir / "checkpoints").iterdir()]
    assert lines == {f"allattn: stopped at step {saved}: this machine is being taken away; run again to go on"}
    assert results[1].out == "" and len(list(workdir.glob("events*"))) == 1
    with train(texts, workdir, 1, 2, train__steps=saved + 2) as again:
        (result,) = again.results()
    assert result.code == 0 and result.last()["step"] == saved + 2
    assert sorted(losses(workdir)) == list(range(1, saved + 3))


def test_a_single_process_that_is_taken_away_while_it_scores(tmp_path: Path) -> None:
    """The state is saved without a score on dev."""
    texts, workdir = prepared_texts(tmp_path), tmp_path / "run"
    (texts / "valid.txt").write_bytes((texts / "valid.txt").read_bytes() * LONG)
    changes = {"train__steps": 100_000, "evaluate__every": 3, "checkpoint__every": 100_000}
    with train(texts, workdir, 1, 1, **changes) as run:
        wait_for(workdir, "metrics.jsonl", lambda path: path.read_text().count("\n") >= 3)  # written before scoring
        run.send(signal.SIGTERM)
        (result,) = run.results(60)
    assert result.code == 75 and "stopped at step 3" in result.err
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["3"]


def evaluate(workdir: Path, processes: int, devices: int, *words: str, each: Any = lambda _: []) -> Processes:
    """A score of a run's newest checkpoint; `each` gives the words of one process."""

    def all_words(i: int, started: Processes) -> list[str]:
        return ["-m", "allattn", "evaluate", f"--workdir={workdir}", *words, *each(i), *started.place(i)]

    return Processes(processes, devices, all_words)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run of one process; its texts are beside it."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALLATTN_DATA_DIR", str(folder / "prepared"))
        with train(prepared_texts(folder), folder / "run", 1, 1, train__steps=4) as run:
            assert run.results()[0].code == 0
    return folder / "run"


@pytest.mark.parametrize("protocol", ["authors", "full"])
def test_several_processes_score_a_checkpoint(trained: Path, protocol: str) -> None:
    """2 processes x 2 devices find what one finds, by the rows that each reads; only process 0 says it."""
    words = ("--split=valid", f"--protocol={protocol}")
    with evaluate(trained, 1, 1, *words) as alone:
        (expected,) = alone.results()
    with evaluate(trained, 2, 2, *words) as both:
        results = both.results()
    assert [result.code for result in (expected, *results)] == [0, 0, 0], results[0].err[-2000:]
    found, score = results[0].last(), expected.last()
    assert found == score | {name: pytest.approx(score[name], rel=1e-6) for name in ("nll", "bpc", "ppl")}
    assert results[1].out == ""


def refused(each: Any, workdir: Path) -> str:
    """The line with which two processes refuse to score."""
    with evaluate(workdir, 2, 1, each=each) as two:
        results = two.results(60)
    line = results[0].err.strip().splitlines()[-1]
    assert [(result.code, result.err.strip().splitlines()[-1]) for result in results] == [(2, line)] * 2
    return line


def test_processes_that_would_score_different_things(trained: Path) -> None:
    line = refused(lambda i: [f"--split={('test', 'valid')[i]}"], trained)
    different = r"authors, step 4, valid of (files/byte-\w+/1.0.0) in place of authors, step 4, test of \1"
    assert re.fullmatch(f"allattn: process 1 has another task than process 0: {different}", line), line


def test_processes_that_would_score_different_texts(trained: Path, tmp_path: Path) -> None:
    """Or none: a mistake of one of them ends both at once, with the one line."""
    texts = [tmp_path / "0.txt", tmp_path / "1.txt"]
    for i, text in enumerate(texts):
        text.write_bytes((trained.parent / "texts" / "test.txt").read_bytes() * (i + 1))
    line = refused(lambda i: [f"--text={texts[i]}"], trained)
    assert re.search(r"has another task than process 0: .*, text \w{16} in place of .*, text \w{16}$", line), line
    texts[1].unlink()
    line = refused(lambda i: [f"--text={texts[i]}"], trained)
    assert f"another task than process 0: --text: expected a file, found none at {texts[1]} in place of" in line


def test_processes_that_would_score_different_checkpoints(trained: Path, tmp_path: Path) -> None:
    """Also of other parameters at the same step, or of none."""
    other = tmp_path / "other"
    shutil.copytree(trained, other)
    line = refused(lambda i: [f"--workdir={(trained, other)[i]}"], trained)
    assert line.startswith(f"allattn: process 1 has another workdir than process 0: {other}/checkpoints in place of")
    line = refused(lambda i: [f"--step={(4, 5)[i]}"], trained)
    assert "another checkpoint than process 0: no checkpoint of step 5 in" in line and line.endswith("in place of 4")
    line = refused(lambda i: ["--step=5"], trained)
    assert line.startswith("allattn: no checkpoint of step 5 in")


def test_a_score_that_is_interrupted(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM to one of two processes that score: both end with 75."""
    (tmp_path / "long.txt").write_bytes((trained.parent / "texts" / "valid.txt").read_bytes() * LONG)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "programs"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    with evaluate(trained, 2, 1, f"--text={tmp_path}/long.txt") as two:
        wait_for(tmp_path, "programs/jit_score_block*")
        two.running[1].send_signal(signal.SIGTERM)
        results = two.results(60)
    expect(results, 75, "allattn: stopped while scoring: this machine is being taken away; run again to score")


def expect(results: list[Result], code: int, line: str) -> None:
    assert [(result.code, result.err.strip().splitlines()[-1], result.out) for result in results] == [
        (code, line, "")
    ] * len(results)


def test_different_configurations(tmp_path: Path) -> None:
    texts, workdir = prepared_texts(tmp_path), tmp_path / "run"
    with train(texts, workdir, 3, 1, each=lambda i: {"seed": int(i == 2), "train__batch": 6}) as three:
        found = "process 2 has another configuration than process 0: seed: 0 on process 0, 1 there"
        expect(three.results(), 2, f"allattn: {found}")
    assert not workdir.exists()


def test_different_texts(tmp_path: Path) -> None:
    """Each process may have its data in a place of its own, but they must be the same data."""
    texts = [prepared_texts(tmp_path), tmp_path / "other"]
    shutil.copytree(*texts)
    (texts[1] / "valid.txt").write_bytes((texts[0] / "valid.txt").read_bytes()[::-1])
    data.prepare("files", texts[1])
    with train(texts[0], tmp_path / "run", 2, 1, each=lambda i: {"dataset__data_dir": texts[i]}) as two:
        results = two.results()
    line = results[0].err.strip().splitlines()[-1]
    name = r"files/byte-\w+/1.0.0"
    assert re.fullmatch(rf"allattn: process 1 has another data set than process 0: {name} in place of {name}", line)
    expect(results, 2, line)
    assert not (tmp_path / "run").exists()


def test_a_mistake_that_process_0_finds(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    with train(tmp_path / "texts", tmp_path / "run", 2, 1) as two:
        results = two.results()
    line = results[0].err.strip().splitlines()[-1]
    assert "train.txt" in line
    expect(results, 2, line)


def test_workdir_that_is_not_shared(tmp_path: Path) -> None:
    texts = prepared_texts(tmp_path)

    def words(i: int, started: Processes) -> list[str]:
        place = [f"--coordinator=localhost:{started.port}", "--processes=2", f"--process={i}"]
        return ["-m", "allattn", "train", f"--workdir={tmp_path}/run{i}", *flags(texts), *place]

    with Processes(2, 1, words) as two:
        there, here = (f"{tmp_path}/run{i}/checkpoints" for i in (1, 0))
        line = f"allattn: process 1 has another workdir than process 0: {there} in place of {here}"
        expect(two.results(), 2, line)


def test_a_process_that_never_comes(tmp_path: Path) -> None:
    """Process 0 of 2 without the other, and process 1 without a coordinator: a message and exit code 1, in time."""

    def words(i: int, started: Processes) -> list[str]:
        place = [f"--coordinator=localhost:{free_port()}", "--processes=2", f"--process={i}", "--wait=3"]
        return ["-m", "allattn", "train", "--config=configs/demo.py", f"--workdir={tmp_path}/run", *place]

    began = time.monotonic()
    with Processes(2, 1, words) as strangers:
        for i, result in enumerate(strangers.results(60)):
            assert result.code == 1 and not (tmp_path / "run").exists()
            assert result.err.startswith(
                f"allattn: process {i} of 2: expected all processes at the coordinator at local"
            )
            assert result.err.count("\n") == 1
    assert time.monotonic() - began < 60


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--coordinator=localhost", "--processes=2", "--process=0"), "--coordinator: expected HOST:PORT, found 'loc"),
        (("--processes=2", "--process=0"), "expected --coordinator, --processes and --process together, or"),
        (("--coordinator=a:1", "--processes=2", "--process=2"), "--process: expected a number from 0 to --processes"),
    ],
)
def test_flags_that_do_not_go_together(tmp_path: Path, words: tuple[str, ...], line: str) -> None:
    line_of = [sys.executable, "-m", "allattn", "train", "--config=configs/demo.py", f"--workdir={tmp_path}/run"]
    done = subprocess.run([*line_of, *words], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith(f"allattn: {line}") and done.stderr.count("\n") == 1


# --- found by themselves -----------------------------------------------------------------------------------------

FOUND = """
import os, sys
import jax
from jax._src.clusters import cloud_tpu_cluster
cloud_tpu_cluster.running_in_cloud_tpu_vm = {tpu}
os.environ.pop("TPU_SKIP_MDS_QUERY", None)  # which is set where there are no chips
os.environ.update({surroundings})
from allattn import distributed
distributed.start(wait=100)
jax.config.update("jax_num_cpu_devices", 1)
assert (2, int({rank})) == (distributed.count(), distributed.index()) == (jax.process_count(), jax.process_index())
distributed.stop(0)
"""


class Metadata(http.server.BaseHTTPRequestHandler):
    """What Google's metadata server says to each worker of a slice of two; the port tells which of them asks."""

    def do_GET(self) -> None:
        found = {"agent-worker-number": str(self.server.worker), "worker-network-endpoints": "localhost,localhost"}
        found["tpu-env"] = "TYPE: 'V5LITE_POD'\n"
        text = found[self.path.rpartition("/")[2]].encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def metadata() -> Iterator[list[str]]:
    """Addresses of the metadata servers of two workers."""
    servers = [http.server.ThreadingHTTPServer(("localhost", 0), Metadata) for _ in range(2)]
    for number, server in enumerate(servers):
        server.worker = number  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
    yield [f"localhost:{server.server_port}" for server in servers]
    for server in servers:
        server.shutdown()
        server.server_close()


def found_by(surroundings: Any) -> list[Result]:
    """Two processes without flags find each other, each in environment variables of its own, as on a TPU's machines."""

    def words(i: int, started: Processes) -> list[str]:
        values = {"JAX_COORDINATOR_PORT": str(started.port), "NO_PROXY": "localhost", **surroundings(i)}
        return ["-c", FOUND.format(surroundings=values, tpu=True, rank=i)]

    with Processes(2, 1, words) as two:
        return two.results(100)


def test_a_cloud_tpu_slice(metadata: list[str]) -> None:
    results = found_by(lambda i: {"GCE_METADATA_IP": metadata[i]})
    assert [result.code for result in results] == [0, 0], results


def test_a_tpu_slice_of_kubernetes() -> None:
    names = {"TPU_WORKER_HOSTNAMES": "localhost,localhost", "TPU_SKIP_MDS_QUERY": "1"}
    slice_ = {"MEGASCALE_COORDINATOR_ADDRESS": "localhost", "MEGASCALE_NUM_SLICES": "1", "MEGASCALE_SLICE_ID": "0"}
    results = found_by(lambda i: {**names, **slice_, "TPU_WORKER_ID": str(i)})
    assert [result.code for result in results] == [0, 0], results


def open_mpi_4() -> bool:
    if not shutil.which("mpirun"):
        return False
    done = subprocess.run(["mpirun", "--version"], capture_output=True, text=True, check=False)
    return "(Open MPI) 4." in done.stdout


@pytest.mark.skipif(not open_mpi_4(), reason="Open MPI 4 is not installed (Debian 12: openmpi-bin)")
def test_open_mpi() -> None:
    program = FOUND.format(surroundings={}, tpu=False, rank='os.environ["OMPI_COMM_WORLD_RANK"]')
    command = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, "-c", program]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_an_mpi_that_jax_does_not_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Processes that each took themselves for the only one would all write into one workdir."""
    monkeypatch.setenv(name, "4")
    with train(prepared_texts(tmp_path), tmp_path / "run", 1, 1) as run:
        (result,) = run.results()
    expected = "an Open MPI before 5, or --coordinator, --processes and --process (alone: --processes=1)"
    expect([result], 2, f"allattn: {name}=4: expected {expected}, found none of them")
    assert not (tmp_path / "run").exists()


def test_alone_in_an_mpi(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    monkeypatch.setenv("PMI_SIZE", "")
    with evaluate(trained, 1, 1, "--processes=1") as alone:
        assert alone.results()[0].code == 0


ROWS = """
import sys
import jax, numpy as np
from jax.sharding import AxisType, Mesh
from allattn import distributed, sharding
distributed.start(f"localhost:{sys.argv[2]}", 2, int(sys.argv[1]))
devices = np.array(jax.devices())[[0, 2, 1, 3]].reshape(4, 1, 1)
rows = sharding.Rows(Mesh(devices, sharding.AXES, axis_types=(AxisType.Auto,) * 3), 8)
assert rows.local.tolist() == ([0, 1, 4, 5], [2, 3, 6, 7])[jax.process_index()]
placed_B = rows.place(10 * rows.local)
for shard in placed_B.addressable_shards:
    assert np.asarray(shard.data).tolist() == [10 * i for i in range(8)[shard.index[0]]], shard
distributed.stop(0)
"""


def test_rows_of_a_process_with_others_between() -> None:
    """On a mesh that takes the devices of two processes in turn, each reads its own rows and they land in place."""
    with Processes(2, 2, lambda i, started: ["-c", ROWS, str(i), str(started.port)]) as two:
        assert [result.code for result in two.results()] == [0, 0]


@pytest.mark.skipif(sys.platform != "linux", reason="CPU seconds of threads are read from Linux")
def test_no_process_has_more_to_do_where_there_are_more() -> None:
    """2 and 4 processes train together, 8 rows each: the program of each has the FLOPs of one by itself."""
    words = ["--config.model.depth=1", "--steps=1"]
    alone = at_once(1, ["--alone", *words])["flops"]
    assert alone > 1e5
    assert [at_once(count, words)["flops"] / alone for count in (2, 4)] == pytest.approx([1, 1], rel=1e-3)
