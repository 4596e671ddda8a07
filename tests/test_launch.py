"""The launchers: what they would do, what they do with commands that fail, and manifests that Kubernetes accepts."""

import copy
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from command_line import ROOT

LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
TRAIN = ["python", "-m", "allattn", "train", "--config=configs/demo.py", "--workdir=runs/my run"]
QUOTED = r"python -m allattn train --config=configs/demo.py --workdir=runs/my\ run"

# A command: FOLDER CODE...; its k-th start notes its arguments and its GPU, and ends with the k-th code (the
# last one from then on). Code "sleep" waits for SIGTERM and ends with 75, "deaf" waits and does not end at it.
STAND_IN = """
import os, pathlib, signal, sys, time
folder, codes, place = pathlib.Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3:]
number = place[-1].removeprefix("--process=")
started = len(list(folder.glob(f"{number}.*")))
code = codes[min(started, len(codes) - 1)]
signal.signal(signal.SIGTERM, signal.SIG_IGN if code == "deaf" else lambda *_: sys.exit(75))
note = folder / f"{number}.{started}.new"
note.write_text(" ".join([str(os.getpid()), os.environ.get("CUDA_VISIBLE_DEVICES", "-"), *place]))
note.rename(note.with_suffix(""))
time.sleep(60) if code in ("sleep", "deaf") else sys.exit(int(code))
"""


def launch(script: str, *words: Any, **environment: str) -> subprocess.CompletedProcess:
    """A launcher run to its end."""
    command = ["bash", str(LAUNCH / script), *map(str, words)]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=60, check=False
    )


def local(folder: Path, codes: str, *options: str) -> list[str]:
    """local.sh over the stand-in."""
    stand_in = [sys.executable, "-S", "-c", STAND_IN, str(folder), codes]
    return ["bash", str(LAUNCH / "local.sh"), *options, *stand_in]


def run_local(folder: Path, codes: str, *options: str) -> subprocess.CompletedProcess:
    words = local(folder, codes, *options)
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)


def starts(folder: Path) -> list[list[str]]:
    """What the starts of the stand-in noted, as words: process id, GPUs, flags."""
    return [path.read_text().split() for path in sorted(folder.glob("[0-9].[0-9]"))]


def gone(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    return False


def eventually(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline, "waited 30 s"
        time.sleep(0.02)


# --- what they would do ------------------------------------------------------------------------------------------


def test_local_says_what_it_would_do() -> None:
    done = launch("local.sh", "--dry-run", "--gpus=4,7", "--port=1234", "--tries=3", *TRAIN)
    meet = "--coordinator=localhost:1234 --processes=2"
    assert done.returncode == 0 and done.stdout.splitlines() == [
        f"env CUDA_VISIBLE_DEVICES=4 {QUOTED} {meet} --process=0",
        f"env CUDA_VISIBLE_DEVICES=7 {QUOTED} {meet} --process=1",
        "# a crash: again after 10 s, doubling, up to 3 attempts in a row; exit code 2: not again",
    ]


def test_slurm_says_what_it_would_do() -> None:
    done = launch("slurm.sbatch", "--dry-run", *TRAIN)
    assert done.returncode == 0 and done.stdout.splitlines() == [
        f"srun --kill-on-bad-exit=0 --wait=120 {QUOTED}",
        "# a crash: again after 10 s, doubling, up to 5 attempts in a row; exit code 2: not again",
        "# exit code 75: scontrol requeue JOB",
    ]


def test_mistakes_end_in_one_line(tmp_path: Path) -> None:
    place = ["--name=a", "--zone=b", "--project=c"]
    mistakes = [
        ("local.sh", TRAIN, "--processes=N or --gpus="),
        ("local.sh", ["--processes=2", "--gpus=0", *TRAIN], "found both or neither"),
        ("local.sh", ["--processes=two", *TRAIN], "expected a whole number, found 'two'"),
        ("local.sh", ["--processes=2"], "expected a command"),
        ("local.sh", ["--proceses=2", *TRAIN], "unknown option --proceses=2"),
        ("slurm.sbatch", TRAIN, "sbatch launch/slurm.sbatch"),
        ("tpu_pod.sh", ["--name=a", "--zone=b", *TRAIN], "found 'a', 'b', ''"),
        ("tpu_pod.sh", [*place, "--type=v5litepod-16", *TRAIN], "--type and --runtime together"),
        ("tpu_pod.sh", [*place, "--commit=none", *TRAIN], "found 'none'"),
    ]
    for script, words, expected in mistakes:
        done = launch(script, *words, SLURM_JOB_ID="")
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and not done.stdout
        assert done.stderr.startswith(f"{script}: ") and expected in done.stderr
    away = subprocess.run(["bash", str(LAUNCH / "slurm.sbatch"), *TRAIN], cwd=tmp_path, capture_output=True, text=True)
    assert away.returncode == 2 and f"found {tmp_path}" in away.stderr


def test_every_script_explains_itself() -> None:
    for script in ("local.sh", "slurm.sbatch", "tpu_pod.sh", "tpu_worker.sh"):
        done = launch(script, "--help")
        assert done.returncode == 0 and f"launch/{script} " in done.stdout and "--dry-run" in done.stdout


def test_shellcheck_is_clean() -> None:
    command = [Path(sys.executable).parent / "shellcheck", "--external-sources", *SCRIPTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert len(SCRIPTS) == 5 and done.returncode == 0, done.stdout


# --- several processes here --------------------------------------------------------------------------------------


def test_processes_start_again_when_they_have_saved(tmp_path: Path) -> None:
    done = run_local(tmp_path, "75,0", "--processes=2", "--port=1234", "--delay=0")
    assert done.returncode == 0, done.stderr
    flags = ["--coordinator=localhost:1234", "--processes=2"]
    assert [words[1:] for words in starts(tmp_path)] == [["-", *flags, f"--process={i}"] for i in (0, 0, 1, 1)]


def test_each_process_has_its_gpu(tmp_path: Path) -> None:
    assert run_local(tmp_path, "0", "--gpus=4,7").returncode == 0
    assert [(words[1], words[-1]) for words in starts(tmp_path)] == [("4", "--process=0"), ("7", "--process=1")]


def test_a_mistake_is_not_tried_again(tmp_path: Path) -> None:
    done = run_local(tmp_path, "2,0", "--processes=2", "--delay=0")
    assert done.returncode == 2 and "again" not in done.stderr


def test_gives_up_after_the_stated_tries_with_growing_delays(tmp_path: Path) -> None:
    done = run_local(tmp_path, "3", "--processes=1", "--tries=3", "--delay=1")
    assert done.returncode == 3 and len(starts(tmp_path)) == 3
    assert [line for line in done.stderr.splitlines() if "attempt" in line] == [
        "local.sh: attempt 1 of 3 ended with exit code 3; again in 1 s",
        "local.sh: attempt 2 of 3 ended with exit code 3; again in 2 s",
        "local.sh: gave up after 3 attempts in a row; the last one ended with exit code 3",
    ]


def test_crashes_are_counted_from_the_last_saved_state(tmp_path: Path) -> None:
    done = run_local(tmp_path, "3,75,3,0", "--processes=1", "--tries=2", "--delay=0")
    assert done.returncode == 0 and len(starts(tmp_path)) == 4


def test_sigterm_reaches_all_and_nothing_is_left(tmp_path: Path) -> None:
    running = subprocess.Popen(local(tmp_path, "sleep", "--processes=2"), stderr=subprocess.PIPE, text=True)
    eventually(lambda: len(starts(tmp_path)) == 2)
    running.terminate()
    _, told = running.communicate(timeout=30)
    assert running.returncode == 75 and "starting again" not in told
    assert len(starts(tmp_path)) == 2 and all(gone(words[0]) for words in starts(tmp_path))


def test_sigterm_ends_the_wait_between_attempts(tmp_path: Path) -> None:
    words = local(tmp_path, "3", "--processes=1", "--delay=1000")
    running = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    assert running.stderr is not None
    while "again in 1000 s" not in running.stderr.readline():
        assert running.poll() is None
    running.terminate()
    assert running.wait(30) == 3
    assert not running.stderr.read()  # and nobody holds it open


def test_one_that_crashes_takes_the_others_down(tmp_path: Path) -> None:
    """Process 1 is killed, process 0 does not hear SIGTERM: killed as well when the time to end is over."""
    words = local(tmp_path, "deaf", "--processes=2", "--grace=1", "--tries=1")
    running = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    eventually(lambda: len(starts(tmp_path)) == 2)
    first, second = starts(tmp_path)
    os.kill(int(second[0]), signal.SIGKILL)
    _, told = running.communicate(timeout=30)
    assert running.returncode == 128 + signal.SIGKILL and "process 1 ended with exit code 137" in told
    eventually(lambda: gone(first[0]))


# --- a Cloud TPU slice, with a gcloud of two workers that are folders here ---------------------------------------

GCLOUD = """
import os, pathlib, shutil, subprocess, sys
home, words = pathlib.Path(os.environ["WORKERS"]), sys.argv[1:]
with (home / "calls").open("a") as calls:
    print(*words[3:5], file=calls)
workers, state = [home / "w0", home / "w1"], home / "state"
assert words[:3] == ["compute", "tpus", "tpu-vm"] and {"--zone=z", "--project=p"} <= set(words)
if words[3] == "describe":
    sys.exit(print(state.read_text()) if state.exists() else 1)
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


class Slice:
    """A copy of launch/ in a repository of its own, and a PATH with stand-ins for gcloud and the workers' python3."""

    def __init__(self, folder: Path) -> None:
        self.workers, self.repository, programs = (folder / name for name in ("workers", "repository", "bin"))
        for made in (self.workers, self.repository, programs):
            made.mkdir()
        for name, text in (("gcloud", f"#!{sys.executable}{GCLOUD}"), ("python3", f"#!/bin/bash\n{PYTHON3}")):
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        shutil.copytree(LAUNCH, self.repository / "launch")
        for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "launch"]):
            names = ["-c", "user.name=a", "-c", "user.email=a@b"]
            subprocess.run(["git", *names, *words], cwd=self.repository, check=True)
        path = f"{programs}:{os.environ['PATH']}"
        self.environment = {**os.environ, "WORKERS": str(self.workers), "PATH": path, "TMPDIR": str(folder)}

    def popen(self, *words: str) -> subprocess.Popen:
        place = ["--name=mine", "--zone=z", "--project=p", "--type=v5litepod-8", "--runtime=r", "--delay=0"]
        command = ["bash", "launch/tpu_pod.sh", *place, *words]
        streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, cwd=self.repository, env=self.environment, **streams)

    def calls(self) -> list[str]:
        return (self.workers / "calls").read_text().splitlines()


def test_a_slice_is_made_installed_and_run(tmp_path: Path) -> None:
    """Worker 1 crashes; then the slice is taken away, and made again."""
    tpu = Slice(tmp_path)
    ends = "w1.1) exit 7 ;; w1.2) echo PREEMPTED >$WORKERS/state; exit 75 ;;"
    note = "cd; pwd | tee -a $WORKERS/$TPU_WORKER.starts"
    train = f"{note}; case $TPU_WORKER.$(wc -l <$WORKERS/$TPU_WORKER.starts) in {ends} esac"
    done = tpu.popen("bash", "-c", train)
    out, _ = done.communicate(timeout=60)
    once = ["scp", "ssh", "ssh", "ssh"]
    calls = [line.split()[0] for line in tpu.calls()]
    assert calls == ["describe", "create", *once, "describe", *once, "describe", "delete", "create", *once]
    assert done.returncode == 0 and "exit code 7; again" in out and "(exit code 75); starting again" in out
    for worker in ("w0", "w1"):
        assert out.count(f": {tpu.workers / worker}\n") == 3
        installed = (tpu.workers / worker / "installed").read_text().splitlines()
        assert len(installed) == 3 and installed[2].endswith(".[tpu,gcs]")  # once since the slice was made again
    assert (tpu.repository / "mine.log").read_text() == out


def test_the_slice_says_what_it_would_do(tmp_path: Path) -> None:
    tpu = Slice(tmp_path)
    done = tpu.popen("--dry-run", "--spot", *TRAIN)
    out, _ = done.communicate(timeout=60)
    head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=tpu.repository, text=True).strip()
    folder, place = f"allattn-{head[:12]}", "--zone=z --project=p"
    gcloud, command = "gcloud compute tpus tpu-vm", f"--worker=all --command={folder}/launch/tpu_worker.sh"
    assert done.returncode == 0
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
    train = 'trap "echo saved; exit 75" TERM; touch $WORKERS/up.$TPU_WORKER; for i in {1..600}; do sleep 0.1; done'
    running = tpu.popen("bash", "-c", train)
    eventually(lambda: len(list(tpu.workers.glob("up.*"))) == 2)
    running.terminate()
    out, _ = running.communicate(timeout=30)
    assert running.returncode == 75 and out.count("saved") == 2


# --- Kubernetes --------------------------------------------------------------------------------------------------

GKE = ["--name=large", "--image=registry/allattn:1", "--processes=4"]
TPU = ["--tpu=tpu-v5-lite-podslice", "--topology=4x4", "--chips=4", "--service_account=trainer"]


def gke(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(LAUNCH / "gke.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def items(*words: str) -> list[dict[str, Any]]:
    done = gke(*GKE, "--dry-run", *words)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["items"]


def validate(item: dict[str, Any]) -> None:
    """Against Kubernetes's own schemas, newest and oldest that is meant to do; unknown fields are mistakes."""
    for version in (kubernetes_validate.latest_version(), "1.31.0"):
        kubernetes_validate.validate(item, version, strict=True)


@pytest.mark.parametrize("where", [[], TPU, ["--gpu=nvidia-h100-80gb", "--chips=8"]], ids=["cpu", "tpu", "gpu"])
def test_kubernetes_accepts_the_manifest(where: list[str]) -> None:
    service, job = items(*where, *TRAIN)
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    for item in (service, job):
        validate(item)


def test_kubernetes_does_not_accept_a_broken_manifest() -> None:
    service, job = items(*TPU, *TRAIN)
    broken = [copy.deepcopy(job) for _ in range(3)]
    broken[0]["spec"]["podFailurePolcy"] = broken[0]["spec"].pop("podFailurePolicy")
    broken[1]["spec"]["completions"] = "4"
    del broken[2]["spec"]["template"]["spec"]["containers"][0]["name"]
    service["spec"]["ports"][0]["port"] = "12321"
    for item in [*broken, service]:
        with pytest.raises(kubernetes_validate.ValidationError):
            validate(item)


def test_pods_meet_at_pod_0_and_fail_as_the_exit_codes_say() -> None:
    service, job = items(*TPU, "--tries=3", "--grace=90", *TRAIN)
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert service["spec"]["clusterIP"] == "None" and service["metadata"]["name"] == pod["subdomain"] == "large"
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"] == 4
    port = service["spec"]["ports"][0]["port"]
    places = [f"--coordinator=large-0.large:{port}", "--processes=4", "--process=$(JOB_COMPLETION_INDEX)"]
    assert pod["containers"][0]["command"] == [*TRAIN, *places]
    rules = {rule["action"]: rule["onExitCodes"]["values"] for rule in spec["podFailurePolicy"]["rules"][:2]}
    assert rules == {"FailJob": [2], "Ignore": [75]} and pod["restartPolicy"] == "Never"
    assert spec["backoffLimit"] == 3 * 4 - 1 and pod["terminationGracePeriodSeconds"] == 90
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4" and pod["serviceAccountName"] == "trainer"


def test_mistakes_for_kubernetes_end_in_one_line() -> None:
    for words, expected in [
        ([*GKE, "--tpu=x", "--chips=4", *TRAIN], "--tpu and --topology together"),
        ([*GKE, "--gpu=x", *TRAIN], "--gpu and --chips"),
        ([*GKE[1:], "--name=Large", *TRAIN], "found 'Large'"),
        ([*GKE[1:], *TRAIN], "--name"),
        ([*GKE[:2], "--processes=0", *TRAIN], "at least 1"),
        (GKE, "expected a command"),
        ([*GKE, "--nodes=3", *TRAIN], "--nodes=3"),
    ]:
        done = gke(*words)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and expected in done.stderr
