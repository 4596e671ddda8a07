"""`allattn generate`: continue a prompt."""

import argparse
import os
import sys
from collections.abc import Iterator

from allattn.commands import flags, session, waiting
from allattn.commands.command import Command
from allattn.errors import UserError, first_line


def _flags(parser: argparse.ArgumentParser) -> None:
    flags.add_checkpoint(parser)
    # From where, how far, and how often.
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="text to start from; -: standard input")
    prompt.add_argument("--prompt_file", help="file with the text; -: standard input")
    parser.add_argument("--length", type=int, default=200, help="symbols to draw")
    parser.add_argument(
        "--samples", type=int, default=1, help="texts to draw, each with a seed one higher"
    )
    # How each symbol is drawn.
    parser.add_argument("--temperature", type=float, default=1.0, help="0: always the likeliest")
    parser.add_argument("--top_k", type=int, default=0, help="only the k likeliest; 0: all")
    parser.add_argument(
        "--top_p", type=float, default=1.0, help="only the likeliest of this probability together"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws")


def _run(arguments: argparse.Namespace, _: dict[str, str]) -> None:
    from allattn import run
    from allattn.evaluation.sampling import Sampling

    # Mistakes in the flags before the checkpoint is read.
    if arguments.samples < 1:
        raise UserError(f"--samples: expected at least 1, found {arguments.samples}")
    prompt = _prompt(arguments)
    session.enable_compilation_cache()
    loaded = run.load(arguments.workdir, arguments.step)
    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p)
    for sample in range(arguments.samples):
        # An empty line stands between two texts.
        if sample:
            sys.stdout.buffer.write(b"\n")
        seed = arguments.seed + sample
        with waiting.Waiting(f"text {sample + 1} of {arguments.samples}", "symbols") as progress:
            # Text that appears on a terminal shows by itself how far it is.
            shown = waiting.unseen if sys.stdout.isatty() else progress
            pieces = loaded.generate(prompt, arguments.length, sampling, seed, shown)
            _write(prompt, pieces)


def _prompt(arguments: argparse.Namespace) -> bytes:
    """The bytes to start from, as they were typed or as they are in the file."""
    if "-" in (arguments.prompt, arguments.prompt_file):
        return sys.stdin.buffer.read()
    if arguments.prompt_file is None:
        return os.fsencode(arguments.prompt)
    path = flags.path(arguments.prompt_file)
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise UserError(f"--prompt_file: expected a file, found {path}: {reason}") from error


def _write(prompt: bytes, pieces: Iterator[bytes]) -> None:
    """A text as it is drawn, in bytes, since a symbol need not be a whole character."""
    out = sys.stdout.buffer
    out.write(prompt)
    for piece in pieces:
        out.write(piece)
        out.flush()
    out.write(b"\n")
    out.flush()


COMMAND = Command(
    name="generate",
    summary="continue a prompt",
    example='allattn generate --workdir=runs/demo --prompt="def " --length=300',
    add_flags=_flags,
    run=_run,
    takes_settings=False,
)
