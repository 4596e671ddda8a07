"""`allattn data`: download or take over, check and prepare a data set."""

import argparse
import json

from allattn.commands.command import Command


def _flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dataset", required=True, help="enwik8, text8, wikitext103, stdlib or files"
    )
    parser.add_argument(
        "--data_dir", help="folder or bucket URL to put it; for `files` of the texts"
    )
    # For data sets that their owners let nobody download by a program.
    parser.add_argument("--manual_dir", help="folder or bucket URL of hand-placed archives")
    # Of texts of one's own.
    parser.add_argument("--unit", default="byte", choices=("byte", "word"), help="for `files`")


def _run(arguments: argparse.Namespace, _: dict[str, str]) -> None:
    from allattn import data

    dataset = data.prepare(
        arguments.dataset, arguments.data_dir, arguments.manual_dir, arguments.unit
    )
    print(json.dumps(dataset.summary(), allow_nan=False), flush=True)


COMMAND = Command(
    name="data",
    summary="download or take over, check and prepare a data set",
    example="allattn data --dataset=enwik8",
    add_flags=_flags,
    run=_run,
    takes_settings=False,
)
