"""launch/slurm.sbatch on a real slurmctld and slurmd, started here for the test: `make test-slurm`,
as root.
"""

import json
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
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "JAX_PLATFORMS": "cpu",
        }
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
            self.daemons.append(
                subprocess.Popen(command, stdout=log, stderr=log, env=self.environment)
            )

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
        done = subprocess.run(
            command, env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        return done.stdout.strip()

    def submit(self, *command: str, log: Path, options: Sequence[str] = ()) -> str:
        """Put a command into the queue, two tasks; returns the number of the job."""
        words = [
            "sbatch",
            "--parsable",
            "--ntasks=2",
            f"--output={log}",
            *options,
            "launch/slurm.sbatch",
            *command,
        ]
        return self.call(*words)

    def wait(self, number: str, state: str) -> None:
        """Wait for the end of a job, which must have come to a state."""
        ends = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
        eventually(f"the end of job {number}", lambda: self.job(number)["JobState"] in ends, 240)
        assert self.job(number)["JobState"] == state

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


# Counts its starts; at the first one it waits for SIGTERM and ends as a run does that has saved its
# state.
STAND_IN = """
import os, pathlib, signal, sys, time
place = pathlib.Path(sys.argv[1]) / ("task" + os.environ["SLURM_PROCID"])
starts = len(list(place.parent.glob(place.name + ".*")))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
place.with_suffix("." + str(starts)).touch()
time.sleep(300 if starts == 0 else 0)
"""


def test_a_job_at_its_time_limit_comes_back(cluster: Cluster, tmp_path: Path) -> None:
    """A job is stopped ahead of its time limit and comes back."""
    options = [
        "--time=1",
        "--signal=TERM@20",
    ]  # SLURM's shortest limit; it looks at its clock once a minute
    number = cluster.submit(
        sys.executable, "-c", STAND_IN, str(tmp_path), log=tmp_path / "log.txt", options=options
    )
    cluster.wait(number, "COMPLETED")
    assert cluster.job(number)["Restarts"] == "1"
    assert sorted(path.name for path in tmp_path.glob("task*")) == [
        "task0.0",
        "task0.1",
        "task1.0",
        "task1.1",
    ]


def test_jobs_that_crash_and_jobs_with_a_mistake(cluster: Cluster, tmp_path: Path) -> None:
    """A job that crashes is tried again inside the allocation; one with a mistake is not."""
    for code, attempts in ((7, 2), (2, 1)):
        log = tmp_path / f"{code}.txt"
        command = ["--tries=2", "--delay=0", "sh", "-c", f"echo start; exit {code}"]
        number = cluster.submit(*command, log=log)
        cluster.wait(number, "FAILED")
        found = cluster.job(number)
        assert (found["ExitCode"], found["Restarts"]) == (f"{code}:0", "0")
        assert log.read_text().count("start\n") == 2 * attempts


SMALL = {
    **{
        "model.depth": 2,
        "model.width": 32,
        "model.persistent": 16,
        "train.batch": 8,
        "train.log_every": 1,
    },
    **{"optimizer.schedule": "constant", "checkpoint.every": 100_000, "evaluate.every": 100_000},
}


def demo(folder: Path, steps: int) -> list[str]:
    """The demo, but for its size."""
    settings = {**SMALL, "dataset.data_dir": folder / "data", "train.steps": steps}
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    return [sys.executable, "-m", "allattn", "train", "--config=configs/demo.py", *flags]


def losses(workdir: Path) -> dict[int, float]:
    """By step, as far as the run has got."""
    path = workdir / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {row["step"]: row["nll"] for row in rows if "nll" in row}


def test_the_demo_stopped_twice(cluster: Cluster, tmp_path: Path) -> None:
    """The demo, stopped twice, ends as if it had not been stopped.

    Two tasks; the first stop by SIGTERM to them, as at a preemption, the second by an operator's
    requeue.
    """
    steps = 400
    workdir = tmp_path / "run"
    log = tmp_path / "log.txt"
    number = cluster.submit(*demo(tmp_path, steps), f"--workdir={workdir}", log=log)
    eventually("training", lambda: len(losses(workdir)) > 50, 120)
    cluster.call("scancel", "--signal=TERM", number)
    eventually("the first requeue", lambda: cluster.job(number)["Restarts"] == "1")
    saved = len(losses(workdir))
    eventually("training", lambda: len(losses(workdir)) > saved + 50, 120)
    cluster.call("scontrol", "requeue", number)
    cluster.wait(number, "COMPLETED")
    found = cluster.job(number)
    assert (found["Restarts"], found["ExitCode"]) == ("2", "0:0"), log.read_text()
    # Both tasks say so, at each of the two stops.
    assert log.read_text().count("by SIGTERM or SIGHUP; run again to resume") == 4
    scores = json.loads((workdir / "scores.json").read_text())
    assert scores["step"] == steps
    # The same two tasks without a stop: to the same bits.
    whole = tmp_path / "whole"
    log = tmp_path / "whole.txt"
    number = cluster.submit(*demo(tmp_path, steps), f"--workdir={whole}", log=log)
    cluster.wait(number, "COMPLETED")
    expected = losses(whole)
    assert losses(workdir) == expected and len(expected) == steps
    print(
        f"steps {steps}, stopped at {saved}, "
        f"last losses {losses(workdir)[steps]} and {expected[steps]}"
    )


def test_a_sweep_of_jobs(cluster: Cluster, tmp_path: Path) -> None:
    """A sweep submits its runs and collects them later."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "small.py").write_text(
        "from configs.demo import get_config  # noqa: F401\n"
    )
    settings = [word for word in demo(tmp_path, 20) if word.startswith("--config.")]
    launcher = (
        f"--launcher=sbatch --parsable --ntasks=2 --output={tmp_path}/log.txt launch/slurm.sbatch"
    )
    where = [
        f"--configs={tmp_path / 'configs'}",
        f"--workdir={tmp_path / 'runs'}",
        "--seeds=1",
        launcher,
    ]
    sweep = [sys.executable, "-m", "allattn", "sweep", *where, *settings]
    assert "submitted" in cluster.call(*sweep)
    number = (tmp_path / "runs" / "small-seed0" / "log.txt").read_text().strip()
    assert "submitted" in cluster.call(*sweep)  # and not once more
    cluster.wait(number, "COMPLETED")
    scores = json.loads((tmp_path / "runs" / "small-seed0" / "scores.json").read_text())
    assert f"| {scores['bpc']:.4f} |" in cluster.call(*sweep)
    assert int(number) + 1 == int(cluster.submit("true", log=tmp_path / "last.txt"))
