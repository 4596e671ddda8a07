"""What a command consists of."""

import argparse
import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Command:
    """One command: its name, what it takes, and the call that does it."""

    name: str
    # One line for the lists of commands.
    summary: str
    # A command line that works as it stands.
    example: str
    # Adds the command's flags to its parser.
    add_flags: Callable[[argparse.ArgumentParser], None]
    # Does it, with the flags and the settings as {"a.b": "value"}; an exit code, or None for 0.
    run: Callable[[argparse.Namespace, dict[str, str]], int | None]
    # Whether it takes --config.a.b=value.
    takes_settings: bool = False
