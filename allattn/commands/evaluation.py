"""`allattn evaluate`: score a checkpoint; prints one JSON line last."""

import argparse

from allattn.commands import flags, session, waiting
from allattn.commands.command import Command


def _flags(parser: argparse.ArgumentParser) -> None:
    flags.add_checkpoint(parser)
    # How, and on which text of the run's data set.
    parser.add_argument(
        "--split", default="test", choices=("train", "valid", "test"), help="part of the data set"
    )
    parser.add_argument(
        "--protocol", choices=("authors", "full", "xl"), help="the configuration's if left out"
    )
    # Text from elsewhere.
    parser.add_argument(
        "--text",
        type=flags.path,
        help="score this file or folder of files, which may lie in a bucket, instead of a split; "
        "-: standard input",
    )
    parser.add_argument(
        "--data_dir", help="folder or bucket URL of prepared data, if not where training had it"
    )
    # Of several processes each scores its rows.
    flags.add_processes(parser)


def _run(arguments: argparse.Namespace, _: dict[str, str]) -> None:
    from allattn import run, sharding
    from allattn.evaluation import protocols
    from allattn.evaluation import scores as reported
    from allattn.sharding import processes

    # Before JAX is first used: the other processes, and a device per core on a CPU.
    session.enable_compilation_cache()
    session.join(arguments)
    sharding.use_cores(protocols.AUTHORS_ROWS, processes=processes.count())
    loaded = run.load(arguments.workdir, arguments.step)
    with waiting.Waiting("scoring", "blocks") as progress:
        # The first of several processes shows how far all are.
        shown = waiting.unseen if processes.index() else progress
        scores = loaded.evaluate(
            arguments.split, arguments.protocol, arguments.text, arguments.data_dir, shown
        )
    # All processes have the scores; the first prints them.
    if processes.index() == 0:
        print(reported.to_json(scores), flush=True)
    reported.require_finite(scores)


COMMAND = Command(
    name="evaluate",
    summary="score a checkpoint; prints one JSON line last",
    example="allattn evaluate --workdir=runs/demo --split=test",
    add_flags=_flags,
    run=_run,
    takes_settings=False,
)
