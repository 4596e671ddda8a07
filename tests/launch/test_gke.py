"""launch/gke.py: manifests that Kubernetes accepts, by its own schemas."""

import copy
import json
import subprocess
import sys
from typing import Any

import kubernetes_validate
import pytest
from launching import LAUNCH, TRAIN

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
    """Against Kubernetes's own schemas, newest and oldest that is meant to do; unknown fields are
    mistakes.
    """
    for version in (kubernetes_validate.latest_version(), "1.31.0"):
        kubernetes_validate.validate(item, version, strict=True)


@pytest.mark.parametrize(
    "where", [[], TPU, ["--gpu=nvidia-h100-80gb", "--chips=8"]], ids=["cpu", "tpu", "gpu"]
)
def test_kubernetes_accepts_the_manifest(where: list[str]) -> None:
    service, job = items(*where, *TRAIN)
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    for item in (service, job):
        validate(item)


def test_broken_manifests_are_refused() -> None:
    """Kubernetes does not accept a broken manifest."""
    service, job = items(*TPU, *TRAIN)
    broken = [copy.deepcopy(job) for _ in range(3)]
    broken[0]["spec"]["podFailurePolcy"] = broken[0]["spec"].pop("podFailurePolicy")
    broken[1]["spec"]["completions"] = "4"
    del broken[2]["spec"]["template"]["spec"]["containers"][0]["name"]
    service["spec"]["ports"][0]["port"] = "12321"
    for item in [*broken, service]:
        with pytest.raises(kubernetes_validate.ValidationError):
            validate(item)


def test_coordinator_and_exit_codes_of_pods() -> None:
    """Pods meet at pod 0 and fail as their exit codes say."""
    service, job = items(*TPU, "--tries=3", "--grace=90", *TRAIN)
    spec = job["spec"]
    pod = job["spec"]["template"]["spec"]
    assert (
        service["spec"]["clusterIP"] == "None"
        and service["metadata"]["name"] == pod["subdomain"] == "large"
    )
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job["metadata"]["name"]}
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"] == 4
    port = service["spec"]["ports"][0]["port"]
    places = [
        f"--coordinator=large-0.large:{port}",
        "--processes=4",
        "--process=$(JOB_COMPLETION_INDEX)",
    ]
    assert pod["containers"][0]["command"] == [*TRAIN, *places]
    rules = {
        rule["action"]: rule["onExitCodes"]["values"]
        for rule in spec["podFailurePolicy"]["rules"][:2]
    }
    assert rules == {"FailJob": [2], "Ignore": [75]} and pod["restartPolicy"] == "Never"
    assert spec["backoffLimit"] == 3 * 4 - 1 and pod["terminationGracePeriodSeconds"] == 90
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}
    assert (
        pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4"
        and pod["serviceAccountName"] == "trainer"
    )


def test_mistakes_for_kubernetes_end_in_one_line() -> None:
    for words, expected in [
        ([*GKE, "--tpu=x", "--chips=4", *TRAIN], "--tpu and --topology together"),
        ([*GKE, "--gpu=x", *TRAIN], "--gpu and --chips"),
        ([*GKE[1:], "--name=Large", *TRAIN], "found 'Large'"),
        ([*GKE[1:], *TRAIN], "--name"),
        ([*GKE[:2], "--processes=0", *TRAIN], "at least 1"),
        ([*GKE, "--gpu=x", "--chips=0", *TRAIN], "--chips: expected at least 1, found 0"),
        ([*GKE, "--gpu=x", "--chips=-1", *TRAIN], "--chips: expected at least 1, found -1"),
        *(
            (
                [*GKE, "--tpu=x", f"--topology={shape}", "--chips=4", *TRAIN],
                f"such as 4x4 or 2x2x4, found '{shape}'",
            )
            for shape in ("4", "4x", "4xfour", "0x4", "2x2x2x2", "4 x 4")
        ),
        (
            [*GKE, "--tpu=x", "--topology=2x2x2", "--chips=4", *TRAIN],
            "the 8 chips of 2x2x2, found 4 x 4 = 16",
        ),
        (GKE, "expected a command"),
        ([*GKE, "--nodes=3", *TRAIN], "--nodes=3"),
    ]:
        done = gke(*words)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and expected in done.stderr
