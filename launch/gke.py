"""Train on Google Kubernetes Engine: one Job, one process per pod.

The pods are those of one accelerator slice or group of nodes.

python launch/gke.py --name=NAME --image=IMAGE --processes=N [OPTIONS] COMMAND...

python launch/gke.py --name=large --image=$IMAGE --processes=4 \\
    --tpu=tpu-v5-lite-podslice --topology=4x4 --chips=4 --service_account=trainer \\
    python -m allattn train --config=configs/enwik8_large.py --workdir=gs://$BUCKET/large

The manifest goes to `kubectl apply`; with --dry-run it is printed instead, as JSON, which kubectl
reads like YAML. A pod that ends with exit code 75 (its state is saved) or is evicted is replaced
and does not count; one that ends with exit code 2 (a mistake in the input) ends the Job; others are
replaced, with Kubernetes's own growing delays, until --tries attempts have failed. Needs Kubernetes
1.31 or newer, and Python alone.
"""

import argparse
import json
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

PORT = 12321  # of process 0, inside the Job's own network
LONGEST_NAME = 50  # which leaves room for the pod's number in 63 characters


def manifest(options: argparse.Namespace) -> dict[str, Any]:
    """The Job and the Service that gives its pods names.

    Args:
      options: from `parse`.

    Returns:
      A Kubernetes List.
    """
    return {"apiVersion": "v1", "kind": "List", "items": [_service(options.name), _job(options)]}


def _service(name: str) -> dict[str, Any]:
    """The Service that names the pods: pod I is NAME-I.NAME.

    It has no address of its own. It names pods that are not ready, too, since the pods must meet to
    become ready.
    """
    spec = {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,
        "selector": {"batch.kubernetes.io/job-name": name},
        "ports": [{"name": "coordinator", "port": PORT}],
    }
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec}


def _job(options: argparse.Namespace) -> dict[str, Any]:
    spec = {
        "completionMode": "Indexed",
        "completions": options.processes,
        "parallelism": options.processes,
        "backoffLimit": options.tries * options.processes
        - 1,  # when one process fails, all do, and each counts
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [2]}},
                {"action": "Ignore", "onExitCodes": {"operator": "In", "values": [75]}},
                {
                    "action": "Ignore",
                    "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                },
            ]
        },
        "template": {"spec": _pod(options)},
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": options.name},
        "spec": spec,
    }


def _pod(options: argparse.Namespace) -> dict[str, Any]:
    container: dict[str, Any] = {
        "name": "train",
        "image": options.image,
        "command": _command(options),
    }
    pod = {
        "subdomain": options.name,
        "restartPolicy": "Never",  # the Job replaces pods, by the policy above
        "terminationGracePeriodSeconds": options.grace,
        "containers": [container],
    }
    if options.service_account:
        pod["serviceAccountName"] = options.service_account
    if options.tpu:
        pod["nodeSelector"] = {
            "cloud.google.com/gke-tpu-accelerator": options.tpu,
            "cloud.google.com/gke-tpu-topology": options.topology,
        }
        container["resources"] = {"limits": {"google.com/tpu": options.chips}}
    if options.gpu:
        pod["nodeSelector"] = {"cloud.google.com/gke-accelerator": options.gpu}
        container["resources"] = {"limits": {"nvidia.com/gpu": options.chips}}
    return pod


def _command(options: argparse.Namespace) -> list[str]:
    """The command, told where the processes meet; Kubernetes puts in the pod's number."""
    coordinator = f"{options.name}-0.{options.name}:{PORT}"
    place = [
        f"--coordinator={coordinator}",
        f"--processes={options.processes}",
        "--process=$(JOB_COMPLETION_INDEX)",
    ]
    return [*options.command, *place]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}; see --help", file=sys.stderr)
        sys.exit(2)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the command line; a mistake ends the program in one line with exit code 2."""
    form = argparse.RawDescriptionHelpFormatter
    parser = _Parser("gke.py", description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("--name", required=True, help="of the Job, its Service and its pods")
    parser.add_argument(
        "--image",
        required=True,
        help="container image that holds allattn, with its registry and tag",
    )
    parser.add_argument(
        "--processes", required=True, type=int, help="pods; of a TPU slice: its number of hosts"
    )
    parser.add_argument(
        "--tpu", help="kind of TPU slice, such as tpu-v5-lite-podslice; with --topology and --chips"
    )
    parser.add_argument("--topology", help="of the TPU slice, such as 4x4")
    parser.add_argument("--gpu", help="kind of GPU, such as nvidia-h100-80gb; with --chips")
    parser.add_argument("--chips", type=int, help="TPU chips or GPUs of each pod")
    parser.add_argument(
        "--service_account", help="Kubernetes service account that may read and write the workdir"
    )
    parser.add_argument(
        "--grace",
        type=int,
        default=120,
        help="seconds to save in after SIGTERM; a spot node gives less",
    )
    parser.add_argument("--tries", type=int, default=5, help="attempts that may fail")
    parser.add_argument("--dry-run", action="store_true", help="print the manifest, apply nothing")
    parser.add_argument(
        "command", nargs=argparse.REMAINDER, help="allattn train or evaluate, with its flags"
    )
    options = parser.parse_args(words)
    _check(parser, options)
    return options


def _check(parser: _Parser, options: argparse.Namespace) -> None:
    if not re.fullmatch(rf"[a-z]([-a-z0-9]{{0,{LONGEST_NAME - 2}}}[a-z0-9])?", options.name):
        expected = f"a letter and at most {LONGEST_NAME - 1} more of a-z, 0-9 and - (not last)"
        parser.error(f"--name: expected {expected}, found {options.name!r}")
    if min(options.processes, options.tries, options.grace) < 1:
        parser.error("--processes, --tries and --grace: expected at least 1")
    if options.chips is not None and options.chips < 1:
        parser.error(f"--chips: expected at least 1, found {options.chips}")
    if options.tpu and options.gpu or bool(options.tpu or options.gpu) != bool(options.chips):
        parser.error(
            "expected --tpu, --topology and --chips, or --gpu and --chips, or none of them for CPUs"
        )
    if bool(options.tpu) != bool(options.topology):
        parser.error("expected --tpu and --topology together")
    if options.topology:
        _check_topology(parser, options)
    if not options.command:
        parser.error("expected a command after the options, found none")


def _check_topology(parser: _Parser, options: argparse.Namespace) -> None:
    shape, processes, chips = options.topology, options.processes, options.chips
    if not re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3}){1,2}", shape, re.ASCII):
        parser.error(f"--topology: expected whole numbers, such as 4x4 or 2x2x4, found {shape!r}")
    size = math.prod(map(int, shape.split("x")))
    if processes * chips != size:
        found = f"{processes} x {chips} = {processes * chips}"
        parser.error(f"--processes x --chips: expected the {size} chips of {shape}, found {found}")


def main() -> int:
    """Apply the manifest, or print it."""
    options = parse()
    text = json.dumps(manifest(options), indent=2)
    if options.dry_run:
        print(text)
        return 0
    try:
        return subprocess.run(
            ["kubectl", "apply", "--filename=-"], input=text, text=True, check=False
        ).returncode
    except FileNotFoundError:
        print(
            "gke.py: expected kubectl on the PATH, found none; --dry-run prints the manifest",
            file=sys.stderr,
        )
        return 2


if __name__ == "__main__":
    sys.exit(main())
