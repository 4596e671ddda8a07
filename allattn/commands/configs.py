"""`allattn configs`: the experiments that --config knows by name."""

import argparse

from allattn.commands.command import Command


def _flags(parser: argparse.ArgumentParser) -> None:
    """None of its own."""


def _run(_: argparse.Namespace, __: dict[str, str]) -> None:
    from allattn import experiments

    # The larger experiments first, then those that compare variants.
    names = sorted(experiments.names(), key=lambda name: ("/" in name, name))
    # A block for each, and all at once: a reader such as `head` may leave before the end.
    lines = []
    for name in names:
        lines.append(name)
        lines += [f"    {title:10} {text}" for title, text in experiments.summary(name).items()]
    print("\n".join(lines), flush=True)


COMMAND = Command(
    name="configs",
    summary="list the experiments by name, with parameters, hardware and published score",
    example="allattn configs",
    add_flags=_flags,
    run=_run,
)
