"""Experiment files: where one is found by its name, and what its get_config() returns."""

import ast
import contextlib
import difflib
import importlib.machinery
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import ml_collections

from allattn import configs
from allattn.errors import PreemptedError, UserError
from allattn.urls import is_url

# Our own experiments: configs/ in a checkout, allattn/configs/ where the package is installed.
FOLDER = Path(configs.__path__[0]).resolve()
# Whether that is a checkout, in which they are the package `configs` as well.
IN_CHECKOUT = FOLDER.parent != Path(__file__).resolve().parent


# --- finding


def names() -> list[str]:
    """Names of our own experiments, as --config takes them: `demo`, `ablations/joint_tiny`."""
    files = [file for file in FOLDER.rglob("*.py") if file.name != "__init__.py"]
    return sorted(file.relative_to(FOLDER).with_suffix("").as_posix() for file in files)


def find(path: str) -> tuple[Path, str | None]:
    """The file that a path or a name means, and the argument behind its colon.

    Args:
      path: a file, which comes first, or the name of one of ours; either may go on with
        `:ARGUMENT`, the argument of its get_config().

    Returns:
      The file, and the argument or None.

    Raises:
      UserError: there is none; a name that is near is named.
    """
    if not path:
        raise UserError("--config: expected an experiment file or a name such as demo, found none")
    if is_url(path):
        raise UserError(
            "--config: expected a file on this machine, as it imports those beside it; "
            f"found {path}"
        )
    # The name of a file may hold a colon too.
    before, _, argument = path.partition(":")
    if file := _file(path):
        return file, None
    if file := _file(before):
        return file, argument
    raise UserError(
        f"--config: expected a Python file with get_config(), found no file {path}{_hint(before)}"
    )


def _file(name: str) -> Path | None:
    """The file of that path, or the experiment of ours of that name."""
    # Not Path.is_file, which fails where a name is too long.
    if os.path.isfile(name):
        return Path(name)
    if name in names():
        return FOLDER / f"{name}.py"
    return None


def _hint(path: str) -> str:
    """What was probably meant by a path where no file is."""
    # The path of a checkout, as documents have it, where there is none.
    name = path.removeprefix("configs/").removesuffix(".py")
    if name in names():
        return f"; --config={name} is the installed one"
    for nearest in difflib.get_close_matches(name, names(), 1):
        return f"; did you mean --config={nearest}?"
    return ""


# --- telling

# In a docstring: a title, and its text up to the next title.
_SECTION = re.compile(r"^(Command|Hardware|Published): +(.*?)(?=^[A-Z][a-z]+: |\Z)", re.M | re.S)


def summary(name: str) -> dict[str, str]:
    """What the docstring of one of our experiments says, by title.

    Args:
      name: as `names` has it.

    Returns:
      what, parameters, hardware and published, each on one line; those that are stated.
    """
    text = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf8"))) or ""
    # The first paragraph tells what it is; wrapped lines are joined.
    found = {"what": " ".join(text.partition("\n\n")[0].split())}
    # In a sentence of its own or in the first one.
    if count := re.search(r"(?:about )?[\d,]+(?=\s+parameters)", text):
        found["parameters"] = count[0]
    for title, content in _SECTION.findall(text):
        if title != "Command":
            found[title.lower()] = " ".join(content.split())
    return found


# --- reading


def read(file: Path, argument: str | None = None) -> ml_collections.ConfigDict:
    """Run an experiment file and call its get_config().

    Args:
      file: the file, whatever its name ends in.
      argument: what get_config() takes; None: nothing.

    Returns:
      What get_config() returns.

    Raises:
      UserError: it fails or ends the program, has no get_config(), or returns something else.
    """
    try:
        with _configs_of(file):
            module = _import(file)
            config = _call(module, argument)
    # What stops the command from outside is not the file's.
    except (KeyboardInterrupt, PreemptedError):
        raise
    # The file is the user's program, and may fail in any way, or call sys.exit().
    except BaseException as error:
        raise UserError(f"--config: {file}: {_failure(error)}") from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(
            f"--config: expected get_config() in {file} that returns a ConfigDict, found none"
        )
    # Settings change it, so a frozen one is thawed.
    if isinstance(config, ml_collections.FrozenConfigDict):
        return ml_collections.ConfigDict(config)
    return config


def _call(module: ModuleType, argument: str | None) -> object:
    """What get_config() returns; None where there is no such function."""
    if not hasattr(module, "get_config"):
        return None
    # As of ml_collections' flags: `file.py:argument`.
    if argument is None:
        return module.get_config()
    return module.get_config(argument)


def _failure(error: BaseException) -> str:
    """What went wrong in an experiment file, in words."""
    # `configs` is a package in a checkout alone.
    package = (getattr(error, "name", None) or "").split(".")[0]
    if isinstance(error, ImportError) and package == "configs" and not IN_CHECKOUT:
        return "expected `from allattn.configs import ...`, found `from configs import ...`"
    if isinstance(error, SystemExit):
        return f"expected a ConfigDict from get_config(), found sys.exit({error.code!r})"
    return f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def _configs_of(file: Path) -> Iterator[None]:
    """Within, `from configs import demo` finds a file beside `file` first, and ours second.

    An experiment file may lie anywhere. If it lies in a folder `configs` of its own, it may build
    on those beside it, and in a checkout they hide ours of the same name. (`from allattn.configs
    import demo` is always ours.) Two things make that work:
    - The folder around the file's `configs`, and then a checkout's, come first on Python's search
      path. configs/__init__.py makes one package of all folders of that name on the path.
    - Python keeps a module that it has imported under its name, but the same name means another
      file for an experiment in another folder. So what an earlier experiment file has imported
      as `configs...` is forgotten.
    """
    # Where Python looks first.
    folders = _folders_of(file)
    sys.path[:0] = folders
    # What an earlier experiment file has imported.
    imported = [name for name in sys.modules if name.split(".")[0] == "configs"]
    for name in imported:
        del sys.modules[name]
    try:
        yield
    finally:
        # One by one, since the experiment file may have changed the path too.
        for folder in folders:
            with contextlib.suppress(ValueError):
                sys.path.remove(folder)


def _folders_of(file: Path) -> list[str]:
    """Folders in which a file's `configs` is looked for."""
    around = str(_folder_around_configs(file))
    if IN_CHECKOUT:
        return [around, str(FOLDER.parent)]
    # Installed ones are part of `allattn`, whose other modules must not get names of their own.
    if FOLDER in file.resolve().parents:
        return []
    return [around]


def _folder_around_configs(file: Path) -> Path:
    """The folder that holds the `configs` which a file lies in, otherwise the file's own folder."""
    for parent in file.resolve().parents:
        if parent.name == "configs":
            return parent.parent
    return file.resolve().parent


def _import(file: Path) -> ModuleType:
    """Run a file as a module, whatever its name ends in."""
    # A loader of its own, since Python finds one by the ending of the name alone.
    loader = importlib.machinery.SourceFileLoader(f"experiment_{file.stem}", str(file))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None  # a loader always gives one
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module
