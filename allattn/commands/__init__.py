"""The commands, one file each, in the order in which `allattn --help` lists them.

To add one, write such a file, which ends with its `COMMAND`, and add it to `COMMANDS`.

Imports of the rest of the package are inside the functions, so that `--help` and mistakes in the
flags answer at once: JAX takes a while to load.
"""

from allattn.commands import (
    compile,
    config,
    configs,
    convert,
    data,
    evaluation,
    generation,
    sweep,
    train,
)

COMMANDS = (
    train.COMMAND,
    evaluation.COMMAND,
    generation.COMMAND,
    config.COMMAND,
    configs.COMMAND,
    convert.COMMAND,
    sweep.COMMAND,
    compile.COMMAND,
    data.COMMAND,
)
