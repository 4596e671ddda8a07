"""`allattn generate`: continue a prompt."""

import argparse
import os
import sys

from allattn.commands import flags, session
from allattn.commands.command import Command


def _flags(parser: argparse.ArgumentParser) -> None:
    flags.add_checkpoint(parser)
    # From where, and how far.
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--length", type=int, default=200, help="symbols to draw")
    # How each symbol is drawn.
    parser.add_argument("--temperature", type=float, default=1.0, help="0: always the likeliest")
    parser.add_argument("--top_k", type=int, default=0, help="0: all")
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)


def _run(arguments: argparse.Namespace, _: dict[str, str]) -> None:
    from allattn import run

    session.enable_compilation_cache()
    pieces = run.generate(
        arguments.workdir,
        arguments.prompt,
        arguments.length,
        arguments.temperature,
        arguments.top_k,
        arguments.top_p,
        arguments.seed,
        arguments.step,
    )
    # Bytes, since a symbol need not be a whole character. The prompt's are those that were typed.
    out = sys.stdout.buffer
    out.write(os.fsencode(arguments.prompt))
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
