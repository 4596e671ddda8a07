"""The parser of all commands, and the flags that several take."""

import argparse
import difflib
import os
from collections.abc import Sequence
from typing import Any

from allattn.commands import settings
from allattn.commands.command import Command
from allattn.errors import UserError
from allattn.version import __version__

# --- the parser of all commands


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes end the command with one line, and whose help tells the defaults."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=_Help, allow_abbrev=False, **options)

    def names(self) -> list[str]:
        """Names of the flags, of which a misspelt one means the nearest."""
        names = list(self._option_string_actions)
        # Settings are flags too, of the commands that take them.
        if self.takes_settings():
            names += [settings.SET, settings.UNSET]
        return names

    def takes_settings(self) -> bool:
        """Whether this is the parser of a command that takes settings."""
        command = self.get_default("chosen")
        return command is not None and command.takes_settings

    def error(self, message: str) -> None:  # type: ignore[override]
        raise UserError(f"{message}; see `{self.prog} --help`")


class _Help(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        # None, False and "" are no values of their own; the help says what they mean.
        if isinstance(action.default, bool) or action.default in (None, "", argparse.SUPPRESS):
            return action.help
        return f"{action.help} (default: %(default)s)"


def parse(
    commands: Sequence[Command], words: Sequence[str]
) -> tuple[argparse.Namespace, dict[str, str]]:
    """Read a command line.

    Args:
      commands: in the order in which `allattn --help` lists them.
      words: the words after the program's name.

    Returns:
      The flags, of which `chosen` is the command, and the settings.

    Raises:
      UserError: names the word that is wrong, and the nearest that would be right.
    """
    parser, parsers = _parsers(commands)
    if not words:
        print(parser.format_help(), flush=True)
        raise UserError(f"expected a command, one of {', '.join(parsers)}; found none")

    # What is misspelt is named before anything that is missing.
    words = _help_on_fields(words)
    if not words[0].startswith("-"):
        _require_near(words[0], words[0], list(parsers), "allattn")
        _require_known(words[1:], parsers[words[0]])
    arguments, rest = parser.parse_known_args(words)

    # What is left are settings.
    if arguments.chosen.takes_settings:
        return arguments, settings.read(rest, getattr(arguments, "config", None) or "base")
    if rest:
        raise UserError(
            f"unknown argument {rest[0]!r}; `allattn {arguments.command} --help` lists the flags"
        )
    return arguments, {}


def _parsers(commands: Sequence[Command]) -> tuple[Parser, dict[str, Parser]]:
    """The parser of a command line, and that of each command."""
    # One line for each, the words below each other.
    width = max(len(command.name) for command in commands)
    examples = [f"  {command.name:{width}}  {command.example}" for command in commands]
    parser = Parser(
        prog="allattn",
        description="The all-attention network.",
        epilog="\n".join(["an example of each:", *examples]),
    )
    parser.add_argument("--version", action="version", version=f"allattn {__version__}")
    names = parser.add_subparsers(
        dest="command", required=True, parser_class=Parser, metavar="COMMAND", title="commands"
    )
    # Each with its own flags, and those that all have.
    for command in commands:
        one = names.add_parser(
            command.name,
            help=command.summary,
            description=command.summary,
            epilog=f"example: {command.example}",
        )
        command.add_flags(one)
        one.add_argument(
            "--verbose", action="store_true", help="show the lines of the libraries as well"
        )
        one.set_defaults(chosen=command)
    return parser, names.choices


def _help_on_fields(words: Sequence[str]) -> Sequence[str]:
    """`train --help=config` in the words of the command that prints the fields."""
    if "--help=config" not in words:
        return words
    parser = Parser(add_help=False)
    add_config(parser, required=False)
    known, _ = parser.parse_known_args([word for word in words if word != "--help=config"])
    return ["config", f"--config={known.config or 'base'}"]


def _require_known(words: Sequence[str], parser: Parser) -> None:
    """Refuse a flag that the command does not have."""
    known = parser.names()
    for word in words:
        # argparse takes a word with a space for a value, and all after -- too.
        if word == "--":
            return
        if word.startswith("--") and " " not in word:
            # Of a setting only the beginning is known.
            flag, dot, _ = word.partition("=")[0].partition(".")
            if flag not in known and not dot and parser.takes_settings():
                _refuse_bare_field(flag, word)
            _require_near(flag + dot, word, known, parser.prog)


def _refuse_bare_field(flag: str, word: str) -> None:
    """Refuse a setting that lacks its path, as in --steps=3, and name the whole of it."""
    names = [settings.SET + field for field in settings.fields_named(flag.removeprefix("--"))]
    if names:
        meant = " or ".join(word.replace(flag, name, 1) for name in names)
        raise UserError(f"unknown argument {word!r}; did you mean {meant}?")


def _require_near(part: str, word: str, known: Sequence[str], prog: str) -> None:
    """Refuse a word whose part is not known, and name the nearest that is."""
    if part in known:
        return
    # Far from all that there is, nothing is guessed.
    hint = f"`{prog} --help` lists what there is"
    for nearest in difflib.get_close_matches(part, known, 1):
        hint = f"did you mean {word.replace(part, nearest, 1)}?"
    raise UserError(f"unknown argument {word!r}; {hint}")


# --- types of flags


def path(text: str) -> str:
    """A folder, file or bucket URL."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, found nothing")
    # The shell leaves the ~ of --workdir=~/run alone.
    return os.path.expanduser(text)


def workdir(text: str) -> str:
    """A folder, which need not exist, or a bucket URL."""
    if os.path.isfile(path(text)):
        raise argparse.ArgumentTypeError(f"expected a folder, found the file {text}")
    return path(text)


# --- flags of several commands


def add_config(
    parser: argparse.ArgumentParser, required: bool = True, default: str | None = None
) -> None:
    """The experiment, whose fields settings may change; one with a default is not required."""
    parser.add_argument(
        "--config",
        required=required and not default,
        default=default,
        type=path,
        help="experiment file, or name of one of ours; --config.a.b=value changes one field, "
        "--help=config lists them",
    )


def add_text(parser: argparse.ArgumentParser) -> None:
    """A text of one's own, which makes another flag needless."""
    parser.add_argument(
        "--text",
        help="your own text: a file, a folder of files (split 90/5/5 in order), or with train.txt, "
        "valid.txt and test.txt; -: standard input",
    )


def require_one(arguments: argparse.Namespace, *names: str) -> None:
    """Refuse a command line that has none of several flags."""
    if all(getattr(arguments, name) is None for name in names):
        wanted = " or ".join(f"--{name}" for name in names)
        raise UserError(
            f"expected {wanted}, found neither; see `allattn {arguments.command} --help`"
        )


def add_workdir(parser: argparse.ArgumentParser) -> None:
    """Where a run is, or will be."""
    parser.add_argument(
        "--workdir", required=True, type=workdir, help="folder or bucket URL of the run"
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
