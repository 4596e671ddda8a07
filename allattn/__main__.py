"""The command line: `allattn COMMAND --flag=value ...`, from its words to its exit code.

The commands themselves are in `allattn.commands`.
"""

import os
import sys
from collections.abc import Sequence

from allattn.commands import COMMANDS, flags, session
from allattn.errors import PreemptedError, RunError, UserError


def console() -> None:
    """Entry point of the installed command."""
    sys.exit(main())


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
      argv: words after the program's name; None: those of this process.

    Returns:
      Exit code: 0; 1 for a failed run; 2 for a mistake in the input; 75 for a run that was stopped
      from outside and resumes when it is started again; 130 for one that the keyboard interrupted.
    """
    try:
        code = _main(argv)
    # An error that nobody foresaw: the other processes are told, then it shows its traceback.
    except Exception:
        _leave(1)
        raise
    _leave(code)
    return code


def _main(argv: Sequence[str] | None) -> int:
    """The exit code of one command, as far as this process alone can tell."""
    # Each mistake and failure that is foreseen ends in one line.
    try:
        words = argv
        if words is None:
            words = sys.argv[1:]
        arguments, overrides = flags.parse(COMMANDS, words)
        session.set_logging(arguments.verbose)
        return arguments.chosen.run(arguments, overrides) or 0
    except (UserError, RunError) as error:
        print(f"allattn: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return _exit_code(error)
    except BrokenPipeError:
        # What is left to write has no reader; without this Python complains when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print("allattn: the output was closed before the end", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        # A run that has saved its state says so.
        message = str(error) or "interrupted"
        print(f"allattn: {message}", file=sys.stderr)
        return 130


def _exit_code(error: Exception) -> int:
    # Launchers obey these: they do not repeat a mistake (2), and resume what was stopped (75).
    if isinstance(error, UserError):
        return 2
    if isinstance(error, PreemptedError):
        return 75
    return 1


def _leave(code: int) -> None:
    """End together with the other processes of the run, if there are any."""
    # A command that did not load the module is alone.
    if "allattn.sharding.processes" in sys.modules:
        from allattn.sharding import processes

        processes.stop(code)


if __name__ == "__main__":
    sys.exit(main())
