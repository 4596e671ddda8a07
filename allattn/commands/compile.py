"""`allattn compile`: compile the training step for a machine that is not here; says if it fits."""

import argparse
import os

from allattn.commands import flags
from allattn.commands.command import Command


def _flags(parser: argparse.ArgumentParser) -> None:
    flags.add_config(parser)
    # The machine.
    parser.add_argument(
        "--topology", required=True, help="such as v5e:16x16, or h100:8 for a node of GPUs"
    )
    parser.add_argument(
        "--slices", type=int, default=1, help="how many of it, joined by a slower network"
    )


def _run(arguments: argparse.Namespace, overrides: dict[str, str]) -> int:
    # Before JAX is imported: the devices of this machine, whatever they are, stay unused.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from allattn import config
    from allattn.planning import compilation

    c = config.load(arguments.config, overrides)
    name = os.path.splitext(os.path.basename(arguments.config))[0]
    compiled = compilation.compile_step(c, name, arguments.topology, arguments.slices)
    print(compilation.report(compiled, c), flush=True)
    # 1: the step does not fit, or communicates more than it may.
    return int(not compiled.fits or bool(compiled.unexpected))


COMMAND = Command(
    name="compile",
    summary="compile the training step for a machine that is not here; says if it fits",
    example="allattn compile --config=enwik8_large --topology=v5e:16x16",
    add_flags=_flags,
    run=_run,
    takes_settings=True,
)
