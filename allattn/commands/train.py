"""`allattn train`: train or resume; ends with an evaluation of the test split."""

import argparse
import shlex

from allattn import signals
from allattn.commands import accelerators, flags, session
from allattn.commands.command import Command


def _flags(parser: argparse.ArgumentParser) -> None:
    # What to train, and where it is kept.
    flags.add_config(parser, required=False)
    flags.add_text(parser)
    flags.add_workdir(parser)
    parser.add_argument(
        "--force",
        action="store_true",
        help="take the workdir over from the run that holds its lock",
    )
    # Where several machines or GPUs train together.
    flags.add_processes(parser)


@signals.ending_at_once()
def _run(arguments: argparse.Namespace, overrides: dict[str, str]) -> None:
    from allattn import config, config_checks, sharding, train
    from allattn.evaluation import scores as reported
    from allattn.sharding import processes

    # A text of one's own needs no experiment file.
    flags.require_one(arguments, "config", "text")
    experiment = arguments.config or "demo"
    text = session.text_of(arguments)
    # Mistakes in the configuration first, then what must precede the first use of JAX.
    c = config.load(experiment, overrides, text)
    config_checks.check_ranges(c, "train.")  # which the number of devices depends on
    session.enable_compilation_cache()
    session.join(arguments)
    sharding.use_cores_for(c)
    accelerators.say_if_unused()

    # All processes have the scores; the first prints them.
    scores = train.train_and_evaluate(c, arguments.workdir, arguments.force)
    if processes.index() == 0:
        # What to do next, as lines that can be copied.
        workdir = shlex.quote(arguments.workdir)
        print(f"checkpoints: {arguments.workdir}/checkpoints")
        print(f"score it: allattn evaluate --workdir={workdir}")
        print(f"sample from it: allattn generate --workdir={workdir} --prompt=TEXT", flush=True)
        print(reported.to_json(scores), flush=True)
    reported.require_finite(scores)


COMMAND = Command(
    name="train",
    summary="train or resume; ends with an evaluation of the test split",
    example="allattn train --config=demo --workdir=runs/demo",
    add_flags=_flags,
    run=_run,
    takes_settings=True,
)
