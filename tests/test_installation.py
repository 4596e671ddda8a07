"""What is installed: the files of the package, and that they work away from the repository."""

import inspect
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from command_line import ROOT, settings, write_texts

import allattn

MINE = """
from allattn.configs import demo


def get_config():
    c = demo.get_config()
    c.seed = 3
    return c
"""
ENTRY_POINT = "allattn = allattn.__main__:console"


def sources() -> set[str]:
    """Where every file of the package is installed."""
    # In a checkout allattn/configs.py stands for the package of that name.
    found = {"allattn/attention/tuned.json", "allattn/py.typed"}
    found |= names(ROOT, "allattn", "*.py") - {"allattn/configs.py"}
    found |= {f"allattn/{name}" for name in names(ROOT, "configs", "*.py")}
    for pattern in ("*.py", "*.sh", "*.sbatch", "*.md", "*.ipynb"):
        found |= {f"allattn/{name}" for name in names(ROOT, "launch", pattern)}
    return found


def names(root: Path, folder: str, pattern: str) -> set[str]:
    files = [file for file in (root / folder).rglob(pattern) if file.is_file()]
    return {file.relative_to(root).as_posix() for file in files}


def run(*words: object, cwd: Path, **environment: str) -> str:
    """The output of a command that succeeds, without the repository on Python's path."""
    known = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env={**known, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_installed_files(tmp_path: Path) -> None:
    """Those of the sources, whatever their type, and nothing else."""
    # No wheel, as its builder may not be at hand; its content is this folder.
    words = ["-q", "egg_info", f"--egg-base={tmp_path}", "build", f"--build-base={tmp_path}/build"]
    run(sys.executable, ROOT / "setup.py", *words, cwd=ROOT)
    assert names(tmp_path / "build" / "lib", "allattn", "*") == sources()
    assert ENTRY_POINT in (tmp_path / "allattn.egg-info" / "entry_points.txt").read_text()


def test_version() -> None:
    """Stated once, and known to installers and to citations."""
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.*)$", citation, re.M)[1] == allattn.__version__
    assert metadata.version("allattn") == allattn.__version__


def test_notebook_finds_public_names() -> None:
    """Before anything is imported, with the signatures and texts of the functions themselves."""
    assert set(allattn.__all__) <= set(dir(allattn)) and "__version__" in dir(allattn)
    parameters = inspect.signature(allattn.train_and_evaluate).parameters
    assert list(parameters)[:2] == ["config", "workdir"]
    assert "position_HLK" in inspect.signature(allattn.all_attention).parameters
    for name in set(allattn.__all__) - {"PreemptedError", "RunError", "UserError"}:
        parameters = inspect.signature(getattr(allattn, name)).parameters
        kinds = {parameter.kind for parameter in parameters.values()}
        assert not kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
        assert all(word in getattr(allattn, name).__doc__ for word in ("Args:", "Returns:"))


def test_checkout_that_is_not_installed(tmp_path: Path) -> None:
    """PYTHONPATH is enough."""
    program = "from allattn.configs import demo; import allattn.configs as c; print(c.__path__)"
    words = [sys.executable, "-c", program]
    assert str(ROOT / "configs") in run(*words, cwd=tmp_path, PYTHONPATH=str(ROOT))


# --- the wheel, in an environment of its own


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source distribution, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    # A setuptools that can build wheels need not be fetched.
    version = tuple(map(int, metadata.version("setuptools").split(".")[:2]))
    at_hand = ["--no-isolation"] if version >= (70, 1) else []
    run(sys.executable, "-m", "build", *at_hand, f"--outdir={folder}", ROOT, cwd=folder)
    return next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(
    built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., str]:
    """Runs a program of an environment that has the wheel, in a folder of its own."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python]
    run(*pip, "install", "-q", "--no-deps", "--no-index", built[1], cwd=folder)
    # What it depends on is that of this environment.
    site = next((folder / "venv").glob("lib/*/site-packages"))
    paths = [path for path in sys.path if path.endswith("site-packages")]
    (site / "dependencies.pth").write_text("\n".join(paths))
    (folder / "empty").mkdir()

    def call(program: str, *words: object) -> str:
        prepared = str(folder / "prepared")
        place = folder / "empty"
        return run(python.with_name(program), *words, cwd=place, ALLATTN_DATA_DIR=prepared)

    return call


@pytest.mark.slow
def test_wheel_and_source_distribution(built: tuple[Path, Path]) -> None:
    """The wheel has the package, and the source distribution all that is under version control."""
    with zipfile.ZipFile(built[1]) as wheel:
        files = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert files == sources()
    # Without the folder of its name around them.
    with tarfile.open(built[0]) as archive:
        packed = {member.name.partition("/")[2] for member in archive if member.isfile()}
    tracked = run("git", "ls-files", cwd=ROOT).split("\n")[:-1]
    assert {name for name in tracked if not Path(name).name.startswith(".git")} <= packed


@pytest.mark.slow
def test_wheel_in_an_empty_folder(installed: Callable[..., str], tmp_path: Path) -> None:
    """Experiments by their names and a file that builds on one; the package is the installed."""
    where = installed("python", "-c", "import allattn; print(allattn.__file__)")
    assert "site-packages" in where and str(ROOT) not in where
    (tmp_path / "mine.py").write_text(MINE)
    assert "* seed = 3" in installed("allattn", "config", f"--config={tmp_path}/mine.py")
    assert "enwik8_small" in installed("allattn", "configs")

    # The demo for two steps, and a model of the paper made small on a text of our own.
    small = ["--config.train.steps=2", "--config.model.depth=1", "--config.evaluate.max_tokens=999"]
    installed("allattn", "train", "--config=demo", "--workdir=demo", *small)
    changes = settings(write_texts(tmp_path))
    words = [f"--config.{name}={value}" for name, value in changes.items()]
    installed("allattn", "train", "--config=enwik8_small", "--workdir=enwik8", *words)
    assert installed("allattn", "generate", "--workdir=enwik8", "--prompt=abc").startswith("abc")
