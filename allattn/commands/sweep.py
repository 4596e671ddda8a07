"""`allattn sweep`: train every experiment of a folder, several seeds each; writes one table."""

import argparse

from allattn.commands import flags
from allattn.commands.command import Command


def _flags(parser: argparse.ArgumentParser) -> None:
    # Which experiments.
    parser.add_argument(
        "--configs", required=True, type=flags.path, help="folder of experiment files"
    )
    parser.add_argument("--only", default="*", help="pattern of the files to run, such as '*_tiny'")
    flags.add_workdir(parser)
    # How often and how long each is trained.
    parser.add_argument("--seeds", type=int, default=3, help="runs of each experiment")
    parser.add_argument(
        "--budget", type=int, default=0, help="tokens that every run trains on; 0: as its file says"
    )
    # Where.
    parser.add_argument(
        "--launcher",
        default="",
        help="words before each training command, such as a submitting script",
    )


def _run(arguments: argparse.Namespace, overrides: dict[str, str]) -> None:
    from allattn import sweep

    table = sweep.sweep(
        arguments.configs,
        arguments.workdir,
        arguments.seeds,
        arguments.budget,
        overrides,
        arguments.launcher,
        arguments.only,
    )
    print(table, flush=True)


COMMAND = Command(
    name="sweep",
    summary="train every experiment of a folder, several seeds each; writes one table",
    example="allattn sweep --configs=configs/ablations --only='*_tiny' --workdir=runs/ablations",
    add_flags=_flags,
    run=_run,
    takes_settings=True,
)
