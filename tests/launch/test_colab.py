"""launch/colab.ipynb: what is committed, and a whole execution with tiny settings."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import IPython
import jax
import nbformat
import pytest
from command_line import ROOT, TINY, write_texts
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell

import allattn

FILE = ROOT / "launch" / "colab.ipynb"
STEPS = 6


def read() -> nbformat.NotebookNode:
    return nbformat.read(FILE, as_version=4)


def texts_of(cell: nbformat.NotebookNode) -> str:
    """Everything that a cell printed or showed as text."""
    shown = (o.get("text") or o.get("data", {}).get("text/plain", "") for o in cell.outputs)
    return "".join(shown)


def cell_with(notebook: nbformat.NotebookNode, text: str) -> nbformat.NotebookNode:
    (found,) = (cell for cell in notebook.cells if cell.cell_type == "code" and text in cell.source)
    return found


def parameters(notebook: nbformat.NotebookNode) -> int:
    """Index of the cell with the settings."""
    (found,) = (
        i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])
    )
    return found


# --- what is committed ----------------------------------------------------------------------------


def test_committed_outputs() -> None:
    """Of one execution from top to bottom, without errors, and without anything of the machine that
    it ran on.
    """
    notebook = read()
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 5
    words = json.dumps([texts_of(cell) for cell in cells])
    assert not re.search(r"/(root|home|tmp|work|Users|usr|opt)/", words) and str(ROOT) not in words
    assert FILE.stat().st_size < 300_000


def test_only_public_functions() -> None:
    source = "\n".join(cell.source for cell in read().cells if cell.cell_type == "code")
    used = set(re.findall(r"\ballattn\.(\w+)", source)) - {"__version__"}
    assert used == {
        "load",
        "load_config",
        "train_and_evaluate",
        "evaluate",
        "generate",
        "plot_curves",
    }
    assert used <= set(allattn.__all__) and "from allattn" not in source
    # Figures come from public functions as well.
    assert ".plot_spans()" in source and "matplotlib" not in source


def test_nothing_is_to_be_typed() -> None:
    """In a fresh runtime the cell of settings names a repository, which is one constant."""
    notebook = read()
    found: dict[str, Any] = {}
    exec(notebook.cells[parameters(notebook)].source, found)
    assert found["REPOSITORY"].startswith("https://") and found["REVISION"]
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    assert code.count(found["REPOSITORY"]) == 1
    assert (
        f"{found['REPOSITORY'].removeprefix('https://github.com/')}/blob"
        in notebook.cells[0].source
    )


def test_tensorboard_is_for_colab(capsys: pytest.CaptureFixture) -> None:
    """Elsewhere its cell says how to start it."""
    source = IPython.core.inputtransformer2.TransformerManager().transform_cell(
        cell_with(read(), "%tensorboard").source
    )
    ran: list[tuple[str, str]] = []
    shell = SimpleNamespace(run_line_magic=lambda *words: ran.append(words))
    names = {"sys": sys, "FOLDER": Path("runs"), "get_ipython": lambda: shell}
    exec(source, names)
    assert capsys.readouterr().out == "tensorboard --logdir=runs\n" and ran == []
    names["sys"] = SimpleNamespace(modules={"google.colab": None})
    exec(source, names)
    assert [name for name, _ in ran] == ["load_ext", "tensorboard"]


# --- installing -----------------------------------------------------------------------------------


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, ...]]:
    """A machine without allattn, with a pip that only lists; collects the commands."""
    commands: list[tuple[str, ...]] = []

    def run(words: tuple[str, ...], **_: Any) -> SimpleNamespace:
        commands.append(words)
        if "clone" in words:
            Path(words[-1]).mkdir()
            shutil.copy(ROOT / "setup.py", words[-1])
        listed = "jax==0.10.2\njaxlib==0.10.2\njax-cuda12-plugin==0.10.2\nnumpy==2.3.0\nflax==0.1\n"
        return SimpleNamespace(
            returncode="fails" in words, stdout=listed, stderr="no such revision"
        )

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    return commands


def install(repository: str, revision: str) -> None:
    exec(cell_with(read(), "find_spec").source, {"REPOSITORY": repository, "REVISION": revision})


def test_install_keeps_jax(bare: list) -> None:
    install("https://host/allattn.git", "abc")
    git, revision, _, pip = bare
    assert (
        git[:2] == ("git", "clone") and "https://host/allattn.git" in git and revision[-1] == "abc"
    )
    assert pip[1:3] == ("-m", "pip") and pip[pip.index("--constraint") + 1] == "kept.txt"
    kept = Path("kept.txt").read_text().split()
    assert kept == ["jax==0.10.2", "jaxlib==0.10.2", "jax-cuda12-plugin==0.10.2", "numpy==2.3.0"]


def test_install_refuses_without_a_revision(bare: list) -> None:
    with pytest.raises(
        SystemExit,
        match="expected REPOSITORY and REVISION, found 'https://host/allattn.git' and ''",
    ):
        install("https://host/allattn.git", "")
    assert bare == []
    with pytest.raises(SystemExit, match="no such revision"):
        install("https://host/allattn.git", "fails")


@pytest.mark.parametrize("found", ["0.7.2", "0.11.2", "99.0"])
def test_install_says_which_jax_is_expected(
    found: str, bare: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = subprocess.run
    listed = SimpleNamespace(returncode=0, stdout=f"jax=={found}\n")
    monkeypatch.setattr(
        subprocess, "run", lambda words, **_: listed if "list" in words else run(words)
    )
    with pytest.raises(
        SystemExit, match=rf"^jax: expected >=0.10.2,[^ ]*, found {found}; choose another version"
    ):
        install("https://host/allattn.git", "abc")
    assert not any("pip" in words for words in bare)


# --- settings -------------------------------------------------------------------------------------


def functions(overrides: dict[str, Any], config: str = "demo") -> SimpleNamespace:
    """The notebook's, with these settings."""
    names = {"CONFIG": config, "OVERRIDES": overrides, "STEPS": STEPS, "Path": Path}
    names |= {"FOLDER": Path("runs"), "allattn": allattn}
    exec(cell_with(read(), "def experiment").source, names)
    return SimpleNamespace(**names)


def folder(overrides: dict[str, Any], config: str = "demo") -> str:
    made = functions(overrides, config)
    return made.folder(made.experiment())


def test_a_run_of_a_text_is_named_by_it(tmp_path: Path) -> None:
    texts = write_texts(tmp_path)
    made = functions({})
    own = made.experiment(str(texts))
    assert own.dataset.name == "files" and own.dataset.data_dir == str(texts)
    assert made.folder(own, str(texts)) == "runs/texts-256"


def test_a_run_is_named_by_its_settings() -> None:
    """A run is found again by its settings alone."""
    changed = folder({"train.batch": 16, "dataset.data_dir": "/a/b c"})
    assert folder({}) == "runs/demo-256" and folder({}, "enwik8_span") == "runs/enwik8_span-0"
    assert re.fullmatch(r"runs/demo-256-[0-9a-f]{8}", changed)
    assert folder({"dataset.data_dir": "/a/b c", "train.batch": "16"}) == changed
    assert (
        len(
            {
                changed,
                folder({"train.batch": 16}),
                folder({"train.batch": 8}),
                folder({"train.block": 16}),
            }
        )
        == 4
    )


@pytest.mark.parametrize(
    ("value", "expected"), [((20, 40), (20, 40)), ([20], (20,)), ((), ()), ("20,40", (20, 40))]
)
def test_overrides_are_values_of_python(value: Any, expected: tuple[int, ...]) -> None:
    overrides = {
        "model.adaptive_io.cutoffs": value,
        "model.adaptive_io.tied": False,
        "model.dropout": 0.25,
    }
    config = functions(overrides).experiment()
    assert config.model.adaptive_io.cutoffs == expected
    assert config.model.adaptive_io.tied is False and config.model.dropout == 0.25


@pytest.mark.parametrize(
    ("config", "other"), [("demo", 256), ("enwik8_span", 0), ("enwik8_span", 3)]
)
def test_nothing_is_compared_with_itself(
    config: str, other: int, capsys: pytest.CaptureFixture
) -> None:
    made = functions({}, config).experiment()
    first = f"N = {made.model.persistent}"
    names: dict[str, Any] = {"CONFIG": config, "OTHER_N": other, "config": made, "first": first}
    names["runs"] = {first: "runs/here", "N = 7": "runs/earlier"}
    exec(cell_with(read(), "train(other").source, names)
    assert names["runs"] == {first: "runs/here"}
    expected = f"found {config} of {first}, OTHER_N = {other}\n"
    assert capsys.readouterr().out.endswith(expected)


# --- a whole execution ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> tuple[nbformat.NotebookNode, Path]:
    """The notebook after an execution on the tiny run, and the mounted folder, where half of the
    first run was.
    """
    mounted = tmp_path_factory.mktemp("colab")
    texts = write_texts(mounted)
    overrides = {
        name: value
        for name, value in TINY.items()
        if not name.startswith(("train.steps", "train.fine"))
    }
    overrides |= {"dataset.data_dir": str(texts)}
    settings = (
        f"CONFIG, STEPS, OTHER_N, PROMPT, DRIVE = 'base', {STEPS}, 3, 'abc', {str(mounted)!r}\n"
        f"TEXT = {str(texts)!r}\n"
    )
    notebook = read()
    notebook.cells.insert(
        parameters(notebook) + 1, new_code_cell(f"{settings}OVERRIDES = {overrides}")
    )
    mistake = "CONFIG = 'unknown'\nexperiment()"
    notebook.cells.append(new_code_cell(mistake, metadata={"tags": ["raises-exception"]}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALLATTN_DATA_DIR", str(mounted / "prepared"))
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("JAX_PLATFORMS", "cpu")
        patch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)
        half = functions({**overrides, "train.steps": STEPS // 2}, "base").experiment()
        allattn.train_and_evaluate(
            half, str(mounted / "allattn" / Path(folder(overrides, "base")).name)
        )
        NotebookClient(
            notebook, timeout=300, resources={"metadata": {"path": str(mounted)}}
        ).execute()
    return notebook, mounted / "allattn"


def test_runs_from_top_to_bottom(executed: tuple) -> None:
    notebook, runs = executed
    results = texts_of(cell_with(notebook, "size = sum")).splitlines()
    for line, n in zip(results, (8, 3), strict=False):
        (run,) = runs.glob(f"base-{n}-*")
        scores = json.loads((run / "scores.json").read_text())
        expected = f"N = {n}: {scores['parameters']:,} parameters, "
        expected += f"test {scores['bpc']:.3f} bpc after {STEPS} steps"
        assert line == expected
    assert "'protocol': 'full'" in texts_of(cell_with(notebook, "allattn.evaluate"))
    assert re.match(r"abc[a-h\n]{300}\n$", texts_of(cell_with(notebook, "generate(runs")))
    for text in ("scores = {first: train", "train(other", "[first]).plot", "size = sum", "own = "):
        assert any("image/png" in o.get("data", {}) for o in cell_with(notebook, text).outputs), (
            text
        )


def test_goes_on_from_a_mounted_folder(executed: tuple) -> None:
    """No step is made twice: the notebook began where the run in the folder had stopped."""
    notebook, runs = executed
    (run,) = runs.glob("base-8-*")
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    assert [row["step"] for row in rows if "nll" in row] == list(range(1, STEPS + 1))
    assert "runs are kept in Google Drive" in texts_of(cell_with(notebook, "device_kind"))


def test_a_mistake_is_one_line(executed: tuple) -> None:
    (output,) = executed[0].cells[-1].outputs
    (line,) = output.traceback
    assert line.startswith("UserError: --config: expected a Python file") and "unknown" in line
