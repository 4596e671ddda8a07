"""`allattn data`: download or take over, check and prepare a data set."""

import argparse
import json

from allattn.commands import flags, session
from allattn.commands.command import Command
from allattn.errors import UserError

# Written here too, since the package of data takes a while to import.
UNITS = ("byte", "word", "bpe")


def _flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", help="enwik8, text8, wikitext103, stdlib or files")
    flags.add_text(parser)
    parser.add_argument("--data_dir", help="folder or bucket URL to put it; for `files` the text")
    # For data sets that their owners let nobody download by a program.
    parser.add_argument("--manual_dir", help="folder or bucket URL of hand-placed archives")
    # Of texts of one's own.
    parser.add_argument("--unit", default="byte", choices=UNITS, help="for `files`")
    parser.add_argument(
        "--numbering",
        default="value",
        choices=("value", "appearance"),
        help="of bytes: all 256, or those of the training text as in the papers; for `files` and "
        "`stdlib`",
    )
    parser.add_argument(
        "--min_count", type=int, default=1, help="words that are rarer are <unk>; for `files`"
    )
    parser.add_argument(
        "--vocab_size", type=int, default=4096, help="symbols of unit bpe (byte pairs)"
    )


def _run(arguments: argparse.Namespace, _: dict[str, str]) -> None:
    from allattn import data

    flags.require_one(arguments, "dataset", "text")
    text = session.text_of(arguments)
    # A text of one's own is the data set `files`.
    name = arguments.dataset
    folder = arguments.data_dir
    if text is not None:
        if name not in (None, "files") or folder is not None:
            raise UserError("--text is the data set files: expected no --dataset and --data_dir")
        name = "files"
        folder = text
    dataset = data.prepare(
        name,
        folder,
        arguments.manual_dir,
        arguments.unit,
        arguments.numbering,
        arguments.min_count,
        arguments.vocab_size,
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
