"""Flags that several commands take, and the parser of all."""

import argparse
import os
from collections.abc import Sequence
from typing import Any

from allattn.commands.command import Command
from allattn.errors import UserError

# Type of flags that name folders, files and bucket URLs. The shell leaves the ~ of --workdir=~/run
# alone, so it is expanded here.
PATH = os.path.expanduser


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes end the command with one line."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise UserError(f"{message}; see `{self.prog} --help`")


def parser_of(commands: Sequence[Command]) -> Parser:
    """What reads the words of a command line.

    Args:
      commands: in the order in which `allattn --help` lists them.

    Returns:
      A parser whose result names the command and holds its flags.
    """
    parser = Parser(prog="allattn", description="The all-attention network.")
    names = parser.add_subparsers(
        dest="command", required=True, parser_class=Parser, metavar="COMMAND"
    )
    for command in commands:
        one = names.add_parser(
            command.name, help=command.summary, description=command.summary, allow_abbrev=False
        )
        command.add_flags(one)
        one.set_defaults(chosen=command)
    return parser


def settings(words: Sequence[str], allowed: bool) -> dict[str, str]:
    """The words `--config.a.b=v` as {"a.b": "v"}.

    Args:
      words: those of the command line that are none of the command's flags.
      allowed: whether the command takes settings.

    Raises:
      UserError: a word that is no setting, or any where none are allowed.
    """
    overrides = {}
    for word in words:
        # The value stands in the same word: the next one may belong to anything.
        name, equals, value = word.partition("=")
        if not allowed or not name.startswith("--config.") or not equals:
            hint = "; settings are --config.name=value" if allowed else ""
            raise UserError(
                f"unknown argument {word!r}; `allattn COMMAND --help` lists the flags{hint}"
            )
        overrides[name.removeprefix("--config.")] = value
    return overrides


def add_config(parser: argparse.ArgumentParser, required: bool = True) -> argparse.Action:
    """The experiment, whose fields settings may change."""
    return parser.add_argument(
        "--config",
        required=required,
        type=PATH,
        help="experiment file; --config.a.b=value changes one field",
    )


def add_text(parser: argparse.ArgumentParser, instead_of: argparse.Action) -> None:
    """A text of one's own, which makes another flag needless."""

    class Given(argparse.Action):
        def __call__(self, _: Any, namespace: argparse.Namespace, value: Any, *rest: Any) -> None:
            namespace.text = value
            instead_of.required = False

    parser.add_argument(
        "--text",
        action=Given,
        help="your own text: a file, a folder of files (split 90/5/5 in order), or with train.txt, "
        "valid.txt and test.txt; -: standard input",
    )


def add_workdir(parser: argparse.ArgumentParser) -> None:
    """Where a run is, or will be."""
    parser.add_argument(
        "--workdir", required=True, type=PATH, help="folder or bucket URL of the run"
    )


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Where a run is, and which of its checkpoints to take."""
    add_workdir(parser)
    # A word, since it may be a name.
    parser.add_argument(
        "--step",
        default=None,
        help="a step, `best` on dev, or `sound`: the newest that is as it was written; "
        "the newest if left out",
    )


def add_processes(parser: argparse.ArgumentParser) -> None:
    """How the processes of a run find each other."""
    # Services such as SLURM tell these three by themselves.
    parser.add_argument(
        "--coordinator",
        help="HOST:PORT of process 0, where the processes are not found by themselves",
    )
    parser.add_argument("--processes", type=int, help="how many processes work together")
    parser.add_argument("--process", type=int, help="which of them this is, from 0")
    # Machines of a queue start minutes apart.
    parser.add_argument(
        "--wait", type=int, default=300, help="seconds until all of them must be there"
    )
