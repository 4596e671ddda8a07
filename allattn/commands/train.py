"""`allattn train`: train or resume; ends with an evaluation of the test split."""

import argparse

from allattn import signals
from allattn.commands import flags, session
from allattn.commands.command import Command


def _flags(parser: argparse.ArgumentParser) -> None:
    # What to train, and where it is kept.
    flags.add_config(parser)
    flags.add_workdir(parser)
    # Where several machines or GPUs train together.
    flags.add_processes(parser)


@signals.ending_at_once()
def _run(arguments: argparse.Namespace, overrides: dict[str, str]) -> None:
    from allattn import config, config_checks, sharding, train
    from allattn.evaluation import scores as reported
    from allattn.sharding import processes

    # Mistakes in the configuration first, then what must precede the first use of JAX.
    c = config.load(arguments.config, overrides)
    config_checks.check_ranges(c, "train.")  # which the number of devices depends on
    session.enable_compilation_cache()
    session.join(arguments)
    sharding.use_cores_for(c)

    # All processes have the scores; the first prints them.
    scores = train.train_and_evaluate(c, arguments.workdir)
    if processes.index() == 0:
        print(f"checkpoints: {arguments.workdir}/checkpoints", flush=True)
        print(reported.to_json(scores), flush=True)
    reported.require_finite(scores)


COMMAND = Command(
    name="train",
    summary="train or resume; ends with an evaluation of the test split",
    example="allattn train --config=configs/demo.py --workdir=runs/demo",
    add_flags=_flags,
    run=_run,
    takes_settings=True,
)
