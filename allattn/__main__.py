"""The command line: `allattn COMMAND --flag=value ...`.

One section per command: its flags, and the call that does it. To add a command, write such a
section and add it to `_parser`, and to `COMMANDS_WITH_SETTINGS` if it takes --config.a.b=value.

Imports of the package are inside the functions, so that `--help` and mistakes in the flags answer
at once: JAX takes a while to load.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence

from allattn.errors import PreemptedError, RunError, UserError

COMMANDS_WITH_SETTINGS = ("train", "config", "sweep", "convert", "compile")

# Type of flags that name folders, files and bucket URLs. The shell leaves the ~ of --workdir=~/run
# alone, so it is expanded here.
_PATH = os.path.expanduser


# --- one command from its words to its exit code


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
        arguments, rest = _parser().parse_known_args(argv)
        overrides = _overrides(rest, allowed=arguments.command in COMMANDS_WITH_SETTINGS)
        _quiet()
        return arguments.run(arguments, overrides) or 0
    except (UserError, RunError) as error:
        print(f"allattn: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return _exit_code(error)
    except BrokenPipeError:
        # What is left to write has no reader; without this Python complains when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print("allattn: the output was closed before the end", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("allattn: interrupted; run again to resume from the last checkpoint", file=sys.stderr)
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


# --- flags


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise UserError(f"{message}; see `{self.prog} --help`")


def _parser() -> argparse.ArgumentParser:
    """The commands in the order in which `allattn --help` lists them."""
    parser = _Parser(prog="allattn", description="The all-attention network.")
    commands = parser.add_subparsers(
        dest="command", required=True, parser_class=_Parser, metavar="COMMAND"
    )

    def add(name: str, flags: Callable, run: Callable, text: str) -> None:
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        flags(command)
        command.set_defaults(run=run)

    add("train", _train_flags, _train, "train or resume; ends with an evaluation of the test split")
    add("evaluate", _evaluate_flags, _evaluate, "score a checkpoint; prints one JSON line last")
    add("generate", _generate_flags, _generate, "continue a prompt")
    add(
        "config",
        _config_flags,
        _config,
        "print every field of an experiment; * marks what differs from configs/base.py",
    )
    add(
        "convert",
        _convert_flags,
        _convert,
        "import a checkpoint of the papers' own code, or export to one",
    )
    add(
        "sweep",
        _sweep_flags,
        _sweep,
        "train every experiment of a folder, several seeds each; writes one table",
    )
    add(
        "compile",
        _compile_flags,
        _compile,
        "compile the training step for a machine that is not here; says if it fits",
    )
    add("data", _data_flags, _data, "download or take over, check and prepare a data set")
    return parser


def _overrides(rest: Sequence[str], allowed: bool) -> dict[str, str]:
    """The words `--config.a.b=v` as {"a.b": "v"}.

    Args:
      rest: words of the command line that are none of the command's flags.
      allowed: whether the command takes settings.

    Raises:
      UserError: a word that is no setting, or any where none are allowed.
    """
    overrides = {}
    for word in rest:
        # The value stands in the same word: the next one may belong to anything.
        name, equals, value = word.partition("=")
        if not allowed or not name.startswith("--config.") or not equals:
            settings = "; settings are --config.name=value" if allowed else ""
            raise UserError(
                f"unknown argument {word!r}; `allattn COMMAND --help` lists the flags{settings}"
            )
        overrides[name.removeprefix("--config.")] = value
    return overrides


def _checkpoint_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workdir", required=True, type=_PATH, help="folder or bucket URL of the run"
    )
    parser.add_argument("--step", default=None, help="a step or `best`; the newest if left out")


def _process_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--coordinator",
        help="HOST:PORT of process 0, where the processes are not found by themselves",
    )
    parser.add_argument("--processes", type=int, help="how many processes work together")
    parser.add_argument("--process", type=int, help="which of them this is, from 0")
    parser.add_argument(
        "--wait", type=int, default=300, help="seconds until all of them must be there"
    )


# --- what several commands do first


def _quiet() -> None:
    """Keep the libraries' remarks on ordinary uses off the screen; their errors still show."""
    import logging

    import absl.logging

    absl.logging.set_verbosity(absl.logging.ERROR)
    # It logs a traceback of what it raises as well.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)


def _enable_compilation_cache() -> None:
    """Keep compiled programs beside the prepared data, for the next start."""
    from allattn import data
    from allattn.sharding import compilation_cache

    compilation_cache.enable(data.cache_dir())


def _join(arguments: argparse.Namespace) -> None:
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


# --- train


def _train_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        required=True,
        type=_PATH,
        help="experiment file; --config.a.b=value changes one field",
    )
    parser.add_argument(
        "--workdir", required=True, type=_PATH, help="folder or bucket URL of the run"
    )
    _process_flags(parser)


def _train(arguments: argparse.Namespace, overrides: dict[str, str]) -> None:
    from allattn import config, config_checks, sharding, train
    from allattn.sharding import processes

    # Mistakes in the configuration first, then what must precede the first use of JAX.
    c = config.load(arguments.config, overrides)
    config_checks.check_ranges(c, "train.")  # which the number of devices depends on
    _enable_compilation_cache()
    _join(arguments)
    sharding.use_cores_for(c)

    # All processes have the scores; the first prints them.
    scores = train.train_and_evaluate(c, arguments.workdir)
    if processes.index() == 0:
        print(f"checkpoints: {arguments.workdir}/checkpoints", flush=True)
        print(json.dumps(scores), flush=True)


# --- evaluate


def _evaluate_flags(parser: argparse.ArgumentParser) -> None:
    _checkpoint_flags(parser)
    parser.add_argument("--split", default="test", choices=("train", "valid", "test"))
    parser.add_argument(
        "--protocol", choices=("authors", "full", "xl"), help="the configuration's if left out"
    )
    parser.add_argument(
        "--text", type=_PATH, help="score this file, which may lie in a bucket, instead of a split"
    )
    parser.add_argument(
        "--data_dir", help="folder or bucket URL of prepared data, if not where training had it"
    )
    _process_flags(parser)


def _evaluate(arguments: argparse.Namespace, _: dict[str, str]) -> None:
    from allattn import run, sharding
    from allattn.evaluation import protocols
    from allattn.sharding import processes

    # Before JAX is first used: the other processes, and a device per core on a CPU.
    _enable_compilation_cache()
    _join(arguments)
    sharding.use_cores(protocols.AUTHORS_ROWS, processes=processes.count())
    scores = run.evaluate(
        arguments.workdir,
        arguments.split,
        arguments.protocol,
        arguments.text,
        arguments.data_dir,
        arguments.step,
    )
    # All processes have the scores; the first prints them.
    if processes.index() == 0:
        print(json.dumps(scores), flush=True)


# --- generate


def _generate_flags(parser: argparse.ArgumentParser) -> None:
    _checkpoint_flags(parser)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--length", type=int, default=200, help="symbols to draw")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: always the likeliest")
    parser.add_argument("--top_k", type=int, default=0, help="0: all")
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)


def _generate(arguments: argparse.Namespace, _: dict[str, str]) -> None:
    from allattn import run

    _enable_compilation_cache()
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


# --- config


def _config_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        required=True,
        type=_PATH,
        help="experiment file; --config.a.b=value changes one field",
    )
    parser.add_argument("--json", action="store_true", help="as JSON, the way a checkpoint has it")


def _config(arguments: argparse.Namespace, overrides: dict[str, str]) -> None:
    from allattn import config, config_checks

    # What training would refuse is refused here too, as far as it shows without data and devices.
    c = config.load(arguments.config, overrides)
    config_checks.check_experiment(c)
    text = config.to_json(c) if arguments.json else config.describe(c)
    print(text, flush=True)


# --- convert


def _convert_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--source", required=True, help="adaptive-span or transformer-xl")
    parser.add_argument(
        "--checkpoint", type=_PATH, help="state dict to import, .pt or .npz; with --config"
    )
    parser.add_argument(
        "--config", type=_PATH, help="experiment file whose geometry the checkpoint has"
    )
    parser.add_argument(
        "--dataset", help="data set that gives the vocabulary, if not the configuration's"
    )
    parser.add_argument(
        "--export",
        type=_PATH,
        help="file .npz to write the parameters to, instead of --checkpoint",
    )
    _checkpoint_flags(parser)


def _convert(arguments: argparse.Namespace, overrides: dict[str, str]) -> None:
    from allattn import config
    from allattn.interchange import paper_checkpoints

    # The flags of the one direction exclude those of the other.
    exports = arguments.export and not (arguments.checkpoint or arguments.config or overrides)
    imports = arguments.checkpoint and arguments.config
    imports = imports and not (arguments.export or arguments.step)
    if exports:
        summary = paper_checkpoints.export(
            arguments.source, arguments.workdir, arguments.export, arguments.step
        )
    elif imports:
        if arguments.dataset:
            overrides["dataset.name"] = arguments.dataset
        c = config.load(arguments.config, overrides)
        summary = paper_checkpoints.convert(
            arguments.source, arguments.checkpoint, c, arguments.workdir
        )
    else:
        raise UserError(
            "expected --checkpoint and --config to import, or --export (and --step) to export"
        )
    print(json.dumps(summary), flush=True)


# --- sweep


def _sweep_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--configs", required=True, type=_PATH, help="folder of experiment files")
    parser.add_argument("--only", default="*", help="pattern of the files to run, such as '*_tiny'")
    parser.add_argument(
        "--workdir", required=True, type=_PATH, help="folder or bucket URL of the sweep"
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each experiment")
    parser.add_argument(
        "--budget", type=int, default=0, help="tokens that every run trains on; 0: as its file says"
    )
    parser.add_argument(
        "--launcher",
        default="",
        help="words before each training command, such as a submitting script",
    )


def _sweep(arguments: argparse.Namespace, overrides: dict[str, str]) -> None:
    from allattn import sweep

    table = sweep.sweep(
        arguments.configs,
        arguments.workdir,
        arguments.seeds,
        arguments.budget,
        overrides,
        arguments.launcher,
        arguments.only,
    )
    print(table, flush=True)


# --- compile


def _compile_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, type=_PATH, help="experiment file")
    parser.add_argument(
        "--topology", required=True, help="such as v5e:16x16, or h100:8 for a node of GPUs"
    )
    parser.add_argument(
        "--slices", type=int, default=1, help="how many of it, joined by a slower network"
    )


def _compile(arguments: argparse.Namespace, overrides: dict[str, str]) -> int:
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


# --- data


def _data_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dataset", required=True, help="enwik8, text8, wikitext103, stdlib or files"
    )
    parser.add_argument(
        "--data_dir", help="folder or bucket URL to put it; for `files` of the texts"
    )
    parser.add_argument("--manual_dir", help="folder or bucket URL of hand-placed archives")
    parser.add_argument("--unit", default="byte", choices=("byte", "word"), help="for `files`")


def _data(arguments: argparse.Namespace, _: dict[str, str]) -> None:
    from allattn import data

    dataset = data.prepare(
        arguments.dataset, arguments.data_dir, arguments.manual_dir, arguments.unit
    )
    print(json.dumps(dataset.summary()), flush=True)


if __name__ == "__main__":
    sys.exit(main())
