"""Processes that find each other without being told: Cloud TPU, GKE, Open MPI. (SLURM:
test_slurm.py.)
"""

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import ROOT, Result
from several_processes import Processes, expect, prepared_texts, train

from allattn.sharding import processes

pytestmark = pytest.mark.usefixtures("own_data_dir")

FOUND = """
import json, os, sys
import jax
from jax._src.clusters import cloud_tpu_cluster
cloud_tpu_cluster.running_in_cloud_tpu_vm = {tpu}
os.environ.pop("TPU_SKIP_MDS_QUERY", None)  # which is set where there are no chips
os.environ.update(json.loads(sys.argv[1]))
from allattn.sharding import processes
processes.start(wait=100)
jax.config.update("jax_num_cpu_devices", 1)
place = ({count}, int({rank}))
assert place == (processes.count(), processes.index()) == (jax.process_count(), jax.process_index())
processes.stop(0)
"""


class Metadata(http.server.BaseHTTPRequestHandler):
    """What Google's metadata server says to each worker of a slice of two; the port tells which of
    them asks.
    """

    def do_GET(self) -> None:
        found = {
            "agent-worker-number": str(self.server.worker),
            "worker-network-endpoints": "localhost,localhost",
        }
        found["tpu-env"] = "TYPE: 'V5LITE_POD'\n"
        text = found[self.path.rpartition("/")[2]].encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


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


def found_by(surroundings: Any, count: int = 2) -> list[Result]:
    """Processes without flags find each other, each in environment variables of its own, as on a
    TPU's machines.
    """

    def words(i: int, started: Processes) -> list[str]:
        values = {
            "JAX_COORDINATOR_PORT": str(started.port),
            "NO_PROXY": "localhost",
            **surroundings(i),
        }
        return [json.dumps(values)]

    def code(i: int) -> str:
        return FOUND.format(tpu=True, rank=i, count=count)

    with Processes(count, 1, words, code=code) as found:
        return found.results(100)


def test_a_cloud_tpu_slice(metadata: list[str]) -> None:
    results = found_by(lambda i: {"GCE_METADATA_IP": metadata[i]})
    assert [result.code for result in results] == [0, 0], results


POD = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}
TPU_POD = {
    "TPU_WORKER_HOSTNAMES": "localhost,localhost",
    "TPU_WORKER_ID": "0",
    "TPU_SKIP_MDS_QUERY": "1",
}
TPU_POD |= {
    "MEGASCALE_COORDINATOR_ADDRESS": "localhost",
    "MEGASCALE_NUM_SLICES": "1",
    "MEGASCALE_SLICE_ID": "0",
}


def test_a_tpu_slice_of_kubernetes() -> None:
    results = found_by(
        lambda i: {**POD, **TPU_POD, "JOB_COMPLETION_INDEX": str(i), "TPU_WORKER_ID": str(i)}
    )
    assert [result.code for result in results] == [0, 0], results


def test_the_one_pod_of_a_small_tpu_slice() -> None:
    """It is found, and alone."""
    (result,) = found_by(lambda _: {**POD, **TPU_POD, "TPU_WORKER_HOSTNAMES": "localhost"}, count=1)
    assert result.code == 0, result


def test_pods_that_jax_does_not_find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pod 0 too would train alone; the only pod of a job says that it is."""
    for name, value in POD.items():
        monkeypatch.setenv(name, value)
    with train(prepared_texts(tmp_path), tmp_path / "run", 1, 1) as run:
        (result,) = run.results()
    told = "--coordinator, --processes and --process (alone: --processes=1)"
    expected = f"the package kubernetes and the right to list pods, or {told}"
    expect([result], 2, f"allattn: JOB_COMPLETION_INDEX=0: expected {expected}, found none of them")
    assert not (tmp_path / "run").exists()
    processes.start(processes=1)


def open_mpi_4() -> bool:
    if not shutil.which("mpirun"):
        return False
    done = subprocess.run(["mpirun", "--version"], capture_output=True, text=True, check=False)
    return "(Open MPI) 4." in done.stdout


@pytest.mark.skipif(not open_mpi_4(), reason="Open MPI 4 is not installed (Debian 12: openmpi-bin)")
def test_open_mpi() -> None:
    program = FOUND.format(tpu=False, rank='os.environ["OMPI_COMM_WORLD_RANK"]', count=2)
    command = [
        "mpirun",
        "--allow-run-as-root",
        "--oversubscribe",
        "-n",
        "2",
        sys.executable,
        "-c",
        program,
        "{}",
    ]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_an_mpi_that_jax_does_not_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Processes that each took themselves for the only one would all write into one workdir."""
    monkeypatch.setenv(name, "4")
    with train(prepared_texts(tmp_path), tmp_path / "run", 1, 1) as run:
        (result,) = run.results()
    expected = (
        "an Open MPI before 5, or --coordinator, --processes and --process (alone: --processes=1)"
    )
    expect([result], 2, f"allattn: {name}=4: expected {expected}, found none of them")
    assert not (tmp_path / "run").exists()


def test_alone_in_an_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    processes.start(processes=1)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "")
    processes.start()
    assert processes.count() == 1
