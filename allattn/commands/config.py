"""`allattn config`: print every field of an experiment."""

import argparse

from allattn.commands import flags
from allattn.commands.command import Command


def _flags(parser: argparse.ArgumentParser) -> None:
    # Without an experiment: every field as base.py has it.
    flags.add_config(parser, default="base")
    # For programs that read it.
    parser.add_argument("--json", action="store_true", help="as JSON, the way a checkpoint has it")


def _run(arguments: argparse.Namespace, overrides: dict[str, str]) -> None:
    from allattn import config, config_checks

    # What training would refuse is refused here too, as far as it shows without data and devices.
    c = config.load(arguments.config, overrides)
    config_checks.check_experiment(c)
    text = config.to_json(c) if arguments.json else config.describe(c)
    print(text, flush=True)


COMMAND = Command(
    name="config",
    summary="print every field of an experiment; * marks what differs from configs/base.py",
    example="allattn config --config=demo --config.model.depth=6",
    add_flags=_flags,
    run=_run,
    takes_settings=True,
)
