"""The launchers: what they would do; and several processes on this machine, with commands that
fail.
"""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import ROOT
from launching import LAUNCH, QUOTED, TRAIN, eventually, launch

SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])

# A command: FOLDER CODES; its k-th start notes its arguments and its GPU, and ends with the k-th
# code (the last one from then on). Code "sleep" waits for SIGTERM and ends with 75, "deaf" waits
# and does not end at it. Processes may have codes of their own, as in 3,0/1.
STAND_IN = """
import os, pathlib, signal, sys, time
folder, codes, place = pathlib.Path(sys.argv[1]), sys.argv[2].split("/"), sys.argv[3:]
number = place[-1].removeprefix("--process=")
codes = codes[min(int(number), len(codes) - 1)].split(",")
started = len(list(folder.glob(f"{number}.*")))
code = codes[min(started, len(codes) - 1)]
signal.signal(signal.SIGTERM, signal.SIG_IGN if code == "deaf" else lambda *_: sys.exit(75))
note = folder / f"{number}.{started}.new"
note.write_text(" ".join([str(os.getpid()), os.environ.get("CUDA_VISIBLE_DEVICES", "-"), *place]))
note.rename(note.with_suffix(""))
time.sleep(60) if code in ("sleep", "deaf") else sys.exit(int(code))
"""


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


# --- what they would do ---------------------------------------------------------------------------


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


def test_ended_before_it_could_say_so(tmp_path: Path) -> None:
    """SIGTERM before a command's first line leaves 143 in place of 75: SLURM gets the job back."""
    programs = {"srun": 'exit "$CODE"', "scontrol": f'echo "$@" >{tmp_path}/said'}
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = launch("slurm.sbatch", *TRAIN, PATH=path, SLURM_JOB_ID="7", CODE="143")
    assert done.returncode == 75 and (tmp_path / "said").read_text() == "requeue 7\n"


def test_ctrl_c_is_not_started_again(tmp_path: Path) -> None:
    done = run_local(tmp_path, "130", "--processes=1", "--delay=0")
    assert done.returncode == 130 and len(starts(tmp_path)) == 1


def test_mistakes_end_in_one_line(tmp_path: Path) -> None:
    place = ["--name=a", "--zone=b", "--project=c"]
    mistakes = [
        ("local.sh", TRAIN, "--processes=N or --gpus="),
        ("local.sh", ["--processes=2", "--gpus=0", *TRAIN], "found both or neither"),
        ("local.sh", ["--processes=two", *TRAIN], "--processes: expected a whole number"),
        (
            "local.sh",
            ["--processes=0", *TRAIN],
            "--processes: expected a whole number from 1 to 999999, found '0'",
        ),
        (
            "local.sh",
            ["--dry-run", "--processes=9223372036854775808", *TRAIN],
            "found '9223372036854775808'",
        ),
        (
            "local.sh",
            ["--processes=2", "--port=0", *TRAIN],
            "--port: expected a whole number from 1 to 65535, found '0'",
        ),
        (
            "local.sh",
            ["--processes=2", "--tries=0", *TRAIN],
            "--tries: expected a whole number from 1 to 999999",
        ),
        *(
            ("local.sh", [f"--gpus={gpus}", *TRAIN], f"found '{gpus}'")
            for gpus in ("", "all", "0,,1", "0,", ",0")
        ),
        ("local.sh", ["--processes=2"], "expected a command"),
        (
            "local.sh",
            ["--processes=2", "pyhton", "-m", "allattn"],
            "expected a program on the PATH, found 'pyhton'",
        ),
        ("local.sh", ["--processes=2", "./README.md"], "found './README.md'"),
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
    away = subprocess.run(
        ["bash", str(LAUNCH / "slurm.sbatch"), *TRAIN], cwd=tmp_path, capture_output=True, text=True
    )
    assert away.returncode == 2 and f"found {tmp_path}" in away.stderr


def test_every_script_explains_itself() -> None:
    for script in ("local.sh", "slurm.sbatch", "tpu_pod.sh", "tpu_worker.sh"):
        done = launch(script, "--help")
        assert (
            done.returncode == 0
            and f"launch/{script} " in done.stdout
            and "--dry-run" in done.stdout
        )


def test_shellcheck_is_clean() -> None:
    command = [Path(sys.executable).parent / "shellcheck", "--external-sources", *SCRIPTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert len(SCRIPTS) == 5 and done.returncode == 0, done.stdout


# --- several processes here -----------------------------------------------------------------------


def test_restart_after_a_saved_state(tmp_path: Path) -> None:
    """Processes start again when they have saved."""
    done = run_local(tmp_path, "75,0", "--processes=2", "--port=1234", "--delay=0")
    assert done.returncode == 0, done.stderr
    flags = ["--coordinator=localhost:1234", "--processes=2"]
    assert [words[1:] for words in starts(tmp_path)] == [
        ["-", *flags, f"--process={i}"] for i in (0, 0, 1, 1)
    ]


def test_each_process_has_its_gpu(tmp_path: Path) -> None:
    assert run_local(tmp_path, "0", "--gpus=4,7").returncode == 0
    assert [(words[1], words[-1]) for words in starts(tmp_path)] == [
        ("4", "--process=0"),
        ("7", "--process=1"),
    ]


def test_a_mistake_is_not_tried_again(tmp_path: Path) -> None:
    done = run_local(tmp_path, "2,0", "--processes=2", "--delay=0")
    assert done.returncode == 2 and "again" not in done.stderr


@pytest.mark.parametrize("codes", ["2/1", "1/2"])
def test_a_mistake_of_one_process_ends_all(tmp_path: Path, codes: str) -> None:
    """A mistake of one process, which the others take for a crash, is not tried again."""
    done = run_local(tmp_path, codes, "--processes=2", "--delay=0")
    assert done.returncode == 2 and "again" not in done.stderr


def test_tries_and_growing_delays(tmp_path: Path) -> None:
    """The launcher gives up after the stated number of tries, with growing delays."""
    done = run_local(tmp_path, "3", "--processes=1", "--tries=3", "--delay=1")
    assert done.returncode == 3 and len(starts(tmp_path)) == 3
    assert [line for line in done.stderr.splitlines() if "attempt" in line] == [
        "local.sh: attempt 1 of 3 ended with exit code 3; again in 1 s",
        "local.sh: attempt 2 of 3 ended with exit code 3; again in 2 s",
        "local.sh: gave up after 3 attempts in a row; the last one ended with exit code 3",
    ]


def test_crashes_since_the_last_saved_state(tmp_path: Path) -> None:
    """Crashes are counted from the last saved state."""
    done = run_local(tmp_path, "3,75,3,0", "--processes=1", "--tries=2", "--delay=0")
    assert done.returncode == 0 and len(starts(tmp_path)) == 4


def test_sigterm_reaches_all_and_nothing_is_left(tmp_path: Path) -> None:
    running = subprocess.Popen(
        local(tmp_path, "sleep", "--processes=2"), stderr=subprocess.PIPE, text=True
    )
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
    """Process 1 is killed, process 0 does not hear SIGTERM: killed as well when the time to end is
    over.
    """
    words = local(tmp_path, "deaf", "--processes=2", "--grace=1", "--tries=1")
    running = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    eventually(lambda: len(starts(tmp_path)) == 2)
    first, second = starts(tmp_path)
    os.kill(int(second[0]), signal.SIGKILL)
    _, told = running.communicate(timeout=30)
    assert running.returncode == 128 + signal.SIGKILL and told.splitlines() == [
        "local.sh: process 1 ended with exit code 137",
        "local.sh: gave up after 1 attempts in a row; the last one ended with exit code 137",
    ]  # without bash's own remarks
    eventually(lambda: gone(first[0]))


@pytest.mark.skipif(not shutil.which("setpriv"), reason="expected setpriv, which util-linux brings")
def test_a_killed_launcher_stops_its_processes(tmp_path: Path) -> None:
    """Processes are stopped when the launcher is killed."""
    running = subprocess.Popen(local(tmp_path, "sleep", "--processes=2"))
    eventually(lambda: len(starts(tmp_path)) == 2)
    running.kill()
    running.wait(30)
    eventually(lambda: all(gone(words[0]) for words in starts(tmp_path)))
