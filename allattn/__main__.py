"""The command line: `allattn COMMAND --flag=value ...`."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence

from allattn.errors import PreemptedError, RunError, UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
      argv: words after the program's name; None: those of this process.

    Returns:
      Exit code: 0, 1 for a failed run, 2 for a mistake in the input, 75 for a run that was told to
        make room and goes
      on when it is started again.
    """
    try:
        code = _main(argv)
    except Exception:
        _leave(1)
        raise
    _leave(code)
    return code


def _leave(code: int) -> None:
    """End together with the other processes of the run, if there are any."""
    if (
        "allattn.distributed" in sys.modules
    ):  # otherwise JAX, which takes a while to load, was not needed
        from allattn.sharding import processes

        processes.stop(code)


def _main(argv: Sequence[str] | None) -> int:
    try:
        arguments, rest = _parser().parse_known_args(argv)
        overrides = _overrides(
            rest, allowed=arguments.command in ("train", "sweep", "convert", "compile")
        )
        _quiet()
        return arguments.run(arguments, overrides) or 0
    except (UserError, RunError) as error:
        print(f"allattn: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 75 if isinstance(error, PreemptedError) else 1
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # what is left to write has no reader
        print("allattn: the output was closed before the end", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("allattn: interrupted; run again to go on from the last checkpoint", file=sys.stderr)
        return 130


def console() -> None:
    """Entry point of the installed command."""
    sys.exit(main())


def _overrides(rest: Sequence[str], allowed: bool) -> dict[str, str]:
    """`--config.a.b=v` words as {"a.b": "v"}."""
    found = {}
    for word in rest:
        name, equals, value = word.partition("=")
        if not allowed or not name.startswith("--config.") or not equals:
            expected = "; settings are --config.name=value" if allowed else ""
            raise UserError(
                f"unknown argument {word!r}; `allattn COMMAND --help` lists the flags{expected}"
            )
        found[name.removeprefix("--config.")] = value
    return found


_PATH = os.path.expanduser  # of folders, files and bucket URLs


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise UserError(f"{message}; see `{self.prog} --help`")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="allattn", description="The all-attention network.")
    commands = parser.add_subparsers(
        dest="command", required=True, parser_class=_Parser, metavar="COMMAND"
    )

    def command(name: str, run: Callable, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        added.set_defaults(run=run)
        return added

    train = command("train", _train, "train or resume; ends with an evaluation of the test split")
    train.add_argument(
        "--config",
        required=True,
        type=_PATH,
        help="experiment file; --config.a.b=value changes one field",
    )
    train.add_argument(
        "--workdir", required=True, type=_PATH, help="folder or bucket URL of the run"
    )
    _add_process_flags(train)

    evaluate = command("evaluate", _evaluate, "score a checkpoint; prints one JSON line last")
    _add_checkpoint_flags(evaluate)
    evaluate.add_argument("--split", default="test", choices=("train", "valid", "test"))
    evaluate.add_argument(
        "--protocol", choices=("authors", "full", "xl"), help="the configuration's if left out"
    )
    evaluate.add_argument(
        "--text", type=_PATH, help="score this file, which may lie in a bucket, instead of a split"
    )
    evaluate.add_argument(
        "--data_dir", help="folder or bucket URL of prepared data, if not where training had it"
    )
    _add_process_flags(evaluate)

    generate = command("generate", _generate, "continue a prompt")
    _add_checkpoint_flags(generate)
    generate.add_argument("--prompt", required=True)
    generate.add_argument("--length", type=int, default=200, help="symbols to draw")
    generate.add_argument("--temperature", type=float, default=1.0, help="0: always the likeliest")
    generate.add_argument("--top_k", type=int, default=0, help="0: all")
    generate.add_argument("--top_p", type=float, default=1.0)
    generate.add_argument("--seed", type=int, default=0)

    convert = command(
        "convert", _convert, "import a checkpoint of the papers' own code, or export to one"
    )
    convert.add_argument("--source", required=True, help="adaptive-span or transformer-xl")
    convert.add_argument(
        "--checkpoint", type=_PATH, help="state dict to import, .pt or .npz; with --config"
    )
    convert.add_argument(
        "--config", type=_PATH, help="experiment file whose geometry the checkpoint has"
    )
    convert.add_argument(
        "--dataset", help="data set that gives the vocabulary, if not the configuration's"
    )
    convert.add_argument(
        "--export",
        type=_PATH,
        help="file .npz to write the parameters to, in place of --checkpoint",
    )
    _add_checkpoint_flags(convert)

    sweep = command(
        "sweep", _sweep, "train every experiment of a folder, several seeds each; writes one table"
    )
    sweep.add_argument("--configs", required=True, type=_PATH, help="folder of experiment files")
    sweep.add_argument("--only", default="*", help="pattern of the files to run, such as '*_tiny'")
    sweep.add_argument(
        "--workdir", required=True, type=_PATH, help="folder or bucket URL of the sweep"
    )
    sweep.add_argument("--seeds", type=int, default=3, help="runs of each experiment")
    sweep.add_argument(
        "--budget", type=int, default=0, help="tokens that every run trains on; 0: as its file says"
    )
    sweep.add_argument(
        "--launcher",
        default="",
        help="words before each training command, such as a submitting script",
    )

    compile = command(
        "compile",
        _compile,
        "compile the training step for a machine that is not here; says if it fits",
    )
    compile.add_argument("--config", required=True, type=_PATH, help="experiment file")
    compile.add_argument(
        "--topology", required=True, help="such as v5e:16x16, or h100:8 for a node of GPUs"
    )
    compile.add_argument(
        "--slices", type=int, default=1, help="how many of it, joined by a slower network"
    )

    data = command("data", _data, "download or take over, check and prepare a data set")
    data.add_argument(
        "--dataset", required=True, help="enwik8, text8, wikitext103, stdlib or files"
    )
    data.add_argument("--data_dir", help="folder or bucket URL to put it; for `files` of the texts")
    data.add_argument("--manual_dir", help="folder or bucket URL of hand-placed archives")
    data.add_argument("--unit", default="byte", choices=("byte", "word"), help="for `files`")
    return parser


def _add_checkpoint_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workdir", required=True, type=_PATH, help="folder or bucket URL of the run"
    )
    parser.add_argument("--step", default=None, help="a step or `best`; the newest if left out")


def _add_process_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--coordinator",
        help="HOST:PORT of process 0, where the processes are not found by themselves",
    )
    parser.add_argument("--processes", type=int, help="how many processes work together")
    parser.add_argument("--process", type=int, help="which of them this is, from 0")
    parser.add_argument(
        "--wait", type=int, default=300, help="seconds until all of them must be there"
    )


# The imports are late so that `--help` and mistakes in the flags answer at once.


def _quiet() -> None:
    """Keep the libraries' remarks on ordinary uses of them off the screen; their errors still show."""
    import logging

    import absl.logging

    absl.logging.set_verbosity(absl.logging.ERROR)
    logging.getLogger("gcsfs").setLevel(
        logging.CRITICAL
    )  # it logs a traceback of what it raises as well


def _join(arguments: argparse.Namespace) -> None:
    from allattn.sharding import processes

    processes.start(arguments.coordinator, arguments.processes, arguments.process, arguments.wait)
    if processes.count() > 1:
        _keep_output()
        # before anything else, since other commands ask other questions and would wait for each
        # other for ever
        of_text = " of a text" if getattr(arguments, "text", None) is not None else ""
        processes.require_same_text(
            "command", f"{arguments.command}{of_text} by {processes.count()} processes"
        )


def _keep_output() -> None:
    """Leave the output to what this program prints: gloo says of each of its connections there that it is made."""
    sys.stdout.flush()
    own, encoding, errors = os.dup(sys.stdout.fileno()), sys.stdout.encoding, sys.stdout.errors
    sys.stdout = os.fdopen(own, "w", buffering=1, encoding=encoding, errors=errors)
    os.dup2(sys.stderr.fileno(), 1)


def _train(arguments: argparse.Namespace, overrides: dict[str, str]) -> None:
    from allattn import config, sharding, train
    from allattn.sharding import compilation_cache, processes

    c = config.load(arguments.config, overrides)
    config.check_ranges(c, "train.")  # which the number of devices depends on
    compilation_cache.keep()
    _join(arguments)
    sharding.use_cores_for(c)
    scores = train.train_and_evaluate(c, arguments.workdir)
    if not processes.index():
        print(f"checkpoints: {arguments.workdir}/checkpoints", flush=True)
        print(json.dumps(scores), flush=True)


def _evaluate(arguments: argparse.Namespace, _: dict[str, str]) -> None:
    from allattn import run, sharding
    from allattn.evaluation import protocols
    from allattn.sharding import compilation_cache, processes

    compilation_cache.keep()
    _join(arguments)
    sharding.use_cores(protocols.AUTHORS_ROWS, processes=processes.count())
    a = arguments
    scores = run.evaluate(a.workdir, a.split, a.protocol, a.text, a.data_dir, a.step)
    if not processes.index():
        print(json.dumps(scores), flush=True)


def _generate(arguments: argparse.Namespace, _: dict[str, str]) -> None:
    from allattn import run
    from allattn.sharding import compilation_cache

    compilation_cache.keep()
    a, out = arguments, sys.stdout.buffer
    pieces = run.generate(
        a.workdir, a.prompt, a.length, a.temperature, a.top_k, a.top_p, a.seed, a.step
    )
    out.write(os.fsencode(a.prompt))  # its bytes as they were typed
    for piece in pieces:
        out.write(piece)
        out.flush()
    out.write(b"\n")
    out.flush()


def _convert(arguments: argparse.Namespace, overrides: dict[str, str]) -> None:
    from allattn import config
    from allattn.interchange import paper_checkpoints

    if arguments.export and not (arguments.checkpoint or arguments.config or overrides):
        found = paper_checkpoints.export(
            arguments.source, arguments.workdir, arguments.export, arguments.step
        )
    elif arguments.checkpoint and arguments.config and not (arguments.export or arguments.step):
        overrides |= {"dataset.name": arguments.dataset} if arguments.dataset else {}
        c = config.load(arguments.config, overrides)
        found = paper_checkpoints.convert(
            arguments.source, arguments.checkpoint, c, arguments.workdir
        )
    else:
        raise UserError(
            "expected --checkpoint and --config to import, or --export (and --step) to export"
        )
    print(json.dumps(found), flush=True)


def _sweep(arguments: argparse.Namespace, overrides: dict[str, str]) -> None:
    from allattn import sweep

    options = (arguments.seeds, arguments.budget, overrides, arguments.launcher, arguments.only)
    print(sweep.sweep(arguments.configs, arguments.workdir, *options), flush=True)


def _compile(arguments: argparse.Namespace, overrides: dict[str, str]) -> int:
    os.environ["JAX_PLATFORMS"] = "cpu"  # whatever is here
    from allattn import config
    from allattn.planning import compilation

    c = config.load(arguments.config, overrides)
    name = os.path.splitext(os.path.basename(arguments.config))[0]
    found = compilation.compile_step(c, name, arguments.topology, arguments.slices)
    print(compilation.report(found, c), flush=True)
    return int(not found.fits or bool(found.broken))


def _data(arguments: argparse.Namespace, _: dict[str, str]) -> None:
    from allattn import data

    dataset = data.prepare(
        arguments.dataset, arguments.data_dir, arguments.manual_dir, arguments.unit
    )
    print(json.dumps(dataset.summary()), flush=True)


if __name__ == "__main__":
    sys.exit(main())
