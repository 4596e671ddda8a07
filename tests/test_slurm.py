"""launch/slurm.sbatch on a real slurmctld and slurmd, started here for the test: `make test-slurm`, as root."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from command_line import ROOT

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.geteuid() != 0 or None in map(shutil.which, PROGRAMS),
        reason="expected root, and SLURM with munge: make test-slurm installs them",
    ),
]
CONFIGURATION = """
ClusterName=here
SlurmctldHost=localhost
SlurmUser=root
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
KillWait=30
ReturnToService=2
NodeName=localhost CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Cluster:
    """SLURM on this machine, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "JAX_PLATFORMS": "cpu"}
        self.daemons: list[subprocess.Popen] = []

    def start(self) -> None:
        folder = self.folder
        for name in ("state", "spool"):
            (folder / name).mkdir()
        (folder / "munge.key").write_bytes(os.urandom(64))
        (folder / "munge.key").chmod(0o400)
        (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder, ports=free_ports(2)))
        files = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        self.daemon("munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files)
        eventually("munged", (folder / "munge.socket").exists)
        self.daemon("slurmctld", "-D", "-i", "-c")
        self.daemon("slurmd", "-D", "-N", "localhost")
        eventually("the node", lambda: self.call("sinfo", "--noheader", "--format=%T") == "idle")

    def daemon(self, *command: str) -> None:
        with (self.folder / f"{command[0]}.out").open("w") as log:
            self.daemons.append(subprocess.Popen(command, stdout=log, stderr=log, env=self.environment))

    def stop(self) -> None:
        """End the jobs and then the daemons, the last one first."""
        subprocess.run(["scancel", "--quiet", "--me"], env=self.environment, check=False)
        deadline = time.monotonic() + 60
        while self.call("squeue", "--noheader") and time.monotonic() < deadline:
            time.sleep(0.5)
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def call(self, *command: str) -> str:
        """The output of one of SLURM's commands."""
        done = subprocess.run(command, env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=60)
        return done.stdout.strip()

    def submit(self, *command: str, log: Path, options: Sequence[str] = ()) -> str:
        """Put a command into the queue, two tasks; returns the number of the job."""
        words = ["sbatch", "--parsable", "--ntasks=2", f"--output={log}", *options, "launch/slurm.sbatch", *command]
        return self.call(*words)

    def job(self, number: str) -> dict[str, str]:
        """What SLURM says about a job."""
        words = self.call("scontrol", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)


def free_ports(count: int) -> list[int]:
    with_ports = [socket.socket() for _ in range(count)]
    for one in with_ports:
        one.bind(("", 0))
    ports = [one.getsockname()[1] for one in with_ports]
    for one in with_ports:
        one.close()
    return ports


def eventually(what: str, holds: Callable[[], object], seconds: float = 60) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.25)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        made.start()
        yield made
    finally:
        made.stop()


# Counts its starts; at the first one it waits for SIGTERM and ends as a run does that has saved its state.
STAND_IN = """
import os, pathlib, signal, sys, time
place = pathlib.Path(sys.argv[1]) / ("task" + os.environ["SLURM_PROCID"])
starts = len(list(place.parent.glob(place.name + ".*")))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
place.with_suffix("." + str(starts)).touch()
time.sleep(300 if starts == 0 else 0)
"""


def test_a_job_that_is_stopped_comes_back(cluster: Cluster, tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    number = cluster.submit(sys.executable, "-c", STAND_IN, str(tmp_path), log=log)
    eventually("both tasks", lambda: len(list(tmp_path.glob("task*.0"))) == 2)
    cluster.call("scancel", "--signal=TERM", number)
    eventually("the end", lambda: cluster.job(number)["JobState"] == "COMPLETED", 120)
    assert cluster.job(number)["Restarts"] == "1"
    assert len(list(tmp_path.glob("task*"))) == 4
