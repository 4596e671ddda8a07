"""What several commands do before their own work."""

import argparse
import os
import sys


def set_logging(verbose: bool) -> None:
    """Keep the libraries' remarks on ordinary uses off the screen, unless they are asked for.

    Their errors always show.
    """
    import logging

    import absl.logging

    # A warning of ours looks like an error of ours.
    logging.basicConfig(format="allattn: %(message)s")
    if verbose:
        absl.logging.set_verbosity(absl.logging.INFO)
        logging.getLogger("jax").setLevel(logging.INFO)
        return
    absl.logging.set_verbosity(absl.logging.ERROR)
    # `accelerators` says what it says, and what to do about it.
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.ERROR)
    # It logs a traceback of what it raises as well.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)


def enable_compilation_cache() -> None:
    """Keep compiled programs beside the prepared data, for the next start."""
    from allattn import data
    from allattn.sharding import compilation_cache

    compilation_cache.enable(data.cache_dir())


def join(arguments: argparse.Namespace) -> None:
    """Find the other processes of the run, if there are any."""
    from allattn.sharding import processes

    processes.start(arguments.coordinator, arguments.processes, arguments.process, arguments.wait)
    if processes.count() == 1:
        return
    _keep_output()
    # Processes of two commands would ask each other different questions, and wait for answers that
    # never come. So they compare their commands before anything else.
    command = arguments.command
    if getattr(arguments, "text", None) is not None:
        command += " of a text"
    processes.require_same_text("command", f"{command} by {processes.count()} processes")


def _keep_output() -> None:
    """Leave standard output to this program's own lines: gloo reports its connections there.

    What this process prints goes to a copy of standard output. File descriptor 1, which gloo
    writes to, becomes standard error.
    """
    sys.stdout.flush()
    copy = os.dup(sys.stdout.fileno())
    sys.stdout = os.fdopen(
        copy, "w", buffering=1, encoding=sys.stdout.encoding, errors=sys.stdout.errors
    )
    os.dup2(sys.stderr.fileno(), 1)


def text_of(arguments: argparse.Namespace) -> str | None:
    """--text as a path; standard input is kept as a file beside the prepared data.

    So a run that resumes, or is scored, finds its text again.
    """
    if arguments.text != "-":
        return arguments.text
    from allattn import data
    from allattn.data import own_text

    return str(own_text.keep(sys.stdin.buffer, data.cache_dir() / "texts"))
