"""`allattn convert`: import a checkpoint of the papers' own code, or export to one."""

import argparse
import json

from allattn.commands import flags
from allattn.commands.command import Command
from allattn.errors import UserError


def _flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--source", required=True, help="adaptive-span or transformer-xl")
    # To import.
    parser.add_argument(
        "--checkpoint", type=flags.path, help="state dict to import, .pt or .npz; with --config"
    )
    flags.add_config(parser, required=False)
    parser.add_argument(
        "--dataset", help="data set that gives the vocabulary, if not the configuration's"
    )
    # To export; --step belongs to this direction too.
    parser.add_argument(
        "--export",
        type=flags.path,
        help="file .npz to write the parameters to, instead of --checkpoint",
    )
    flags.add_checkpoint(parser)


def _run(arguments: argparse.Namespace, overrides: dict[str, str]) -> None:
    from allattn import config
    from allattn.interchange import paper_checkpoints

    # The flags of the one direction exclude those of the other.
    exports = arguments.export and not (arguments.checkpoint or arguments.config or overrides)
    imports = arguments.checkpoint and arguments.config
    imports = imports and not (arguments.export or arguments.step)
    if exports:
        summary = paper_checkpoints.export(
            arguments.source, arguments.workdir, arguments.export, arguments.step
        )
    elif imports:
        if arguments.dataset:
            overrides["dataset.name"] = arguments.dataset
        c = config.load(arguments.config, overrides)
        summary = paper_checkpoints.convert(
            arguments.source, arguments.checkpoint, c, arguments.workdir
        )
    else:
        raise UserError(
            "expected --checkpoint and --config to import, or --export (and --step) to export"
        )
    print(json.dumps(summary, allow_nan=False), flush=True)


COMMAND = Command(
    name="convert",
    summary="import a checkpoint of the papers' own code, or export to one",
    example="allattn convert --source=adaptive-span --workdir=runs/demo --export=demo.npz",
    add_flags=_flags,
    run=_run,
    takes_settings=True,
)
