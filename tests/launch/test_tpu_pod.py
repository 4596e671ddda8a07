"""launch/tpu_pod.sh, with a gcloud of two workers that are folders here."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from launching import LAUNCH, QUOTED, TRAIN, eventually

GCLOUD = """
import os, pathlib, shutil, subprocess, sys
home, words = pathlib.Path(os.environ["WORKERS"]), sys.argv[1:]
with (home / "calls").open("a") as calls:
    print(*words[3:5], file=calls)
workers, state = [home / "w0", home / "w1"], home / "state"
assert words[:3] == ["compute", "tpus", "tpu-vm"] and {"--zone=z", "--project=p"} <= set(words)
for refused in home.glob(f"{words[3]}.refused"):
    sys.exit(f"ERROR: (gcloud.compute.tpus.tpu-vm.{words[3]}) {refused.read_text()}")
if words[3] == "describe" and not state.exists():
    error = "ERROR: (gcloud.compute.tpus.tpu-vm.describe) NOT_FOUND: "
    sys.exit(error + "Resource 'mine' was not found.\\n- '@type': none")
if words[3] == "describe":
    print(state.read_text())
if words[3] == "create":
    state.write_text("READY")
    [worker.mkdir() for worker in workers]
if words[3] == "delete":
    state.unlink()
    [shutil.rmtree(worker) for worker in workers]
if words[3] == "scp":
    [shutil.copy(words[4], worker) for worker in workers]
if words[3] == "ssh":
    command = words[-1].removeprefix("--command=")
    own = [os.environ | {"HOME": str(worker), "TPU_WORKER": worker.name} for worker in workers]
    started = [subprocess.Popen(["bash", "-c", command], cwd=env["HOME"], env=env) for env in own]
    sys.exit(next((code for one in started if (code := one.wait())), 0))
"""
PYTHON3 = '[[ $2 != uv || $3 != venv ]] || mkdir -p .venv/bin; echo "$@" >>"$HOME/installed"\n'


MAKE = ("--type=v5litepod-8", "--runtime=r")


class Slice:
    """A copy of launch/ in a repository of its own, and a PATH with stand-ins for gcloud and the
    workers' python3.
    """

    def __init__(self, folder: Path) -> None:
        self.workers = folder / "workers"
        self.repository = folder / "repository"
        programs = folder / "bin"
        for made in (self.workers, self.repository, programs):
            made.mkdir()
        for name, text in (
            ("gcloud", f"#!{sys.executable}{GCLOUD}"),
            ("python3", f"#!/bin/bash\n{PYTHON3}"),
        ):
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        shutil.copytree(LAUNCH, self.repository / "launch")
        for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "launch"]):
            names = ["-c", "user.name=a", "-c", "user.email=a@b"]
            subprocess.run(["git", *names, *words], cwd=self.repository, check=True)
        path = f"{programs}:{os.environ['PATH']}"
        self.environment = {
            **os.environ,
            "WORKERS": str(self.workers),
            "PATH": path,
            "TMPDIR": str(folder),
        }

    def popen(self, *words: str, make: Sequence[str] = MAKE) -> subprocess.Popen:
        place = ["--name=mine", "--zone=z", "--project=p", *make, "--delay=0"]
        command = ["bash", "launch/tpu_pod.sh", *place, *words]
        streams: dict[str, Any] = {
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
            "text": True,
        }
        return subprocess.Popen(command, cwd=self.repository, env=self.environment, **streams)

    def run(self, *words: str, make: Sequence[str] = MAKE) -> tuple[int, str]:
        """The exit code, and all that was printed."""
        running = self.popen(*words, make=make)
        out, _ = running.communicate(timeout=60)
        return running.returncode, out

    def calls(self) -> list[str]:
        return (self.workers / "calls").read_text().splitlines()


def test_a_slice_is_made_installed_and_run(tmp_path: Path) -> None:
    """Worker 1 crashes; then the slice is taken away, and made again."""
    tpu = Slice(tmp_path)
    ends = "w1.1) exit 7 ;; w1.2) echo PREEMPTED >$WORKERS/state; exit 75 ;;"
    note = "cd; pwd | tee -a $WORKERS/$TPU_WORKER.starts"
    train = f"{note}; case $TPU_WORKER.$(wc -l <$WORKERS/$TPU_WORKER.starts) in {ends} esac"
    code, out = tpu.run("bash", "-c", train)
    once = ["scp", "ssh", "ssh", "ssh"]
    calls = [line.split()[0] for line in tpu.calls()]
    assert calls == [
        "describe",
        "create",
        *once,
        "describe",
        *once,
        "describe",
        "delete",
        "create",
        *once,
    ]
    assert code == 0 and "exit code 7; again" in out and "(exit code 75); starting again" in out
    for worker in ("w0", "w1"):
        assert out.count(f": {tpu.workers / worker}\n") == 3
        installed = (tpu.workers / worker / "installed").read_text().splitlines()
        assert len(installed) == 3 and installed[2].endswith(
            ".[tpu,gcs]"
        )  # once since the slice was made again
    assert (tpu.repository / "mine.log").read_text() == out


def test_the_slice_says_what_it_would_do(tmp_path: Path) -> None:
    tpu = Slice(tmp_path)
    code, out = tpu.run("--dry-run", "--spot", *TRAIN)
    head = subprocess.check_output(
        ["git", "rev-parse", "HEAD"], cwd=tpu.repository, text=True
    ).strip()
    folder = f"allattn-{head[:12]}"
    place = "--zone=z --project=p"
    gcloud = "gcloud compute tpus tpu-vm"
    command = f"--worker=all --command={folder}/launch/tpu_worker.sh"
    assert code == 0
    assert [" ".join(shlex.split(line)) for line in out.splitlines()] == [
        "# if there is no slice mine, or after it was preempted:",
        f"{gcloud} create mine {place} --accelerator-type=v5litepod-8 --version=r --spot",
        f"git -C launch/.. archive --prefix={folder}/ --output={tmp_path}/{folder}.tar {head}",
        f"{gcloud} scp {tmp_path}/{folder}.tar mine: {place} --worker=all",
        f"{gcloud} ssh mine {place} --worker=all --command=tar -xf {folder}.tar",
        f"{gcloud} ssh mine {place} {command} install",
        f"{gcloud} ssh mine {place} {command} train {QUOTED}",
        "# a crash: again after 0 s, doubling, up to 5 attempts in a row; exit code 2: not again",
    ]
    assert not (tpu.workers / "calls").exists() and not (tpu.repository / "mine.log").exists()


def test_sigterm_reaches_the_workers(tmp_path: Path) -> None:
    tpu = Slice(tmp_path)
    train = (
        'trap "echo saved; exit 75" TERM; touch $WORKERS/up.$TPU_WORKER; '
        "for i in {1..600}; do sleep 0.1; done"
    )
    running = tpu.popen("bash", "-c", train)
    eventually(lambda: len(list(tpu.workers.glob("up.*"))) == 2)
    running.terminate()
    out, _ = running.communicate(timeout=30)
    assert running.returncode == 75 and out.count("saved") == 2


# --- what trying again does not mend --------------------------------------------------------------

LOGIN = "\nPlease run:\n\n  $ gcloud auth login\n\nto obtain new credentials."


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("describe", "You do not currently have an active account selected." + LOGIN),
        (
            "describe",
            "There was a problem refreshing your current auth tokens: "
            "('invalid_grant: Bad Request')" + LOGIN,
        ),
        (
            "describe",
            "PERMISSION_DENIED: Permission denied on 'locations/z' (or it may not exist).\n"
            "- '@type': x",
        ),
        (
            "create",
            "INVALID_ARGUMENT: Cloud TPU received a bad request. "
            '"v5litepod-8" could not be found [EID: 0x5]',
        ),
    ],
)
def test_refusals_of_gcloud(command: str, said: str, tmp_path: Path) -> None:
    """A refusal of gcloud is one line and the end."""
    tpu = Slice(tmp_path)
    (tpu.workers / f"{command}.refused").write_text(said)
    code, out = tpu.run("true")
    assert code == 2 and out.count("\n") == 1 and said.splitlines()[0] in out
    assert out.startswith("tpu_pod.sh: gcloud refuses slice mine in z of p: ")
    assert (
        tpu.calls()
        == {"describe": ["describe mine"], "create": ["describe mine", "create mine"]}[command]
    )


def test_an_outage_is_tried_again(tmp_path: Path) -> None:
    """An outage is tried again, and makes no slice."""
    tpu = Slice(tmp_path)
    said = (
        "There was a problem refreshing your current auth tokens: "
        "HTTPSConnectionPool: Max retries exceeded" + LOGIN
    )
    (tpu.workers / "describe.refused").write_text(said)
    code, out = tpu.run("--tries=3", "true")
    assert (
        code == 1 and out.count("Max retries exceeded") == 3 and "gave up after 3 attempts" in out
    )
    assert tpu.calls() == ["describe mine"] * 3


@pytest.mark.parametrize("state", ["", "PREEMPTED"])
def test_without_a_type_a_slice_must_be_there(state: str, tmp_path: Path) -> None:
    tpu = Slice(tmp_path)
    if state:
        (tpu.workers / "state").write_text(state)
    code, out = tpu.run("true", make=())
    assert (
        code == 2
        and out.count("\n") == 1
        and "expected a slice, or --type and --runtime to make it" in out
    )
    assert f"found {state or 'none'}" in out and tpu.calls() == ["describe mine"]


def test_says_that_changes_are_not_sent(tmp_path: Path) -> None:
    tpu = Slice(tmp_path)
    assert "not committed" not in tpu.run("--dry-run", *TRAIN)[1]
    (tpu.repository / "mine.py").touch()
    code, out = tpu.run("--dry-run", *TRAIN)
    first, *others = out.splitlines()
    assert (
        code == 0
        and first.startswith("tpu_pod.sh: what is not committed is not sent")
        and len(others) == 8
    )
    assert "not committed" not in tpu.run("--dry-run", "--commit=HEAD", *TRAIN)[1]
