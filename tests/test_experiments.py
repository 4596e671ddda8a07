"""Experiment files: they end in a configuration, or in one line that names the file."""

from pathlib import Path

import pytest
from command_line import call
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from allattn import config, config_values, experiments
from allattn.commands import accelerators
from allattn.errors import UserError

HEAD = """
import sys
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict
from allattn.configs import base

def get_config():
    c = base.get_config()
    {}
    return c
"""


def refused(*words: str) -> str:
    """The one line of a mistake."""
    found = call("config", *words)
    assert (found.code, found.out) == (2, "") and found.err.count("\n") == 1, found
    assert found.err.startswith("allattn: ")
    return found.err


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("import sys; sys.exit()", "expected a ConfigDict from get_config(), found sys.exit(None)"),
        ("import sys; sys.exit(0)", "found sys.exit(0)"),
        ("raise SystemExit('no\\nway')", "found sys.exit('no\\nway')"),
        ("raise GeneratorExit", "GeneratorExit"),
        ("class Own(BaseException): pass\nraise Own('one\\ntwo')", "Own: one two"),
        ("def get_config(:", "SyntaxError"),
        ("import nowhere", "ModuleNotFoundError: No module named 'nowhere'"),
        ("from allattn.configs import nothing", "ImportError: cannot import name 'nothing'"),
        ("def get_config(): get_config()", "RecursionError"),
        ("def get_config(): raise KeyError", "KeyError"),
        ("x = 1", "found none"),
        ("get_config = 3", "TypeError"),
        ("def get_config(): return {'seed': 1}", "returns a ConfigDict, found none"),
        ("def get_config(size): return size", "missing 1 required positional argument"),
        ("\0", "null bytes"),
    ],
)
def test_file_that_gives_no_configuration(tmp_path: Path, program: str, message: str) -> None:
    """Exit code 2 and one line that names the file, also where it ends the program."""
    file = tmp_path / "mine.py"
    file.write_text(program)
    line = refused(f"--config={file}")
    assert message in line and str(file) in line


def test_interrupt_while_a_file_runs(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("raise KeyboardInterrupt")
    assert call("config", f"--config={tmp_path}/mine.py").code == 130


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("c.model.width = None", "model.width: expected int, such as 512, found None"),
        ("c.unlock(); c.model.width = len", "TypeError"),
        (
            "c = ConfigDict(c.to_dict() | {'seed': None})",
            "seed: expected int, such as 0, found None",
        ),
        ("c = ConfigDict(c.to_dict() | {'seed': len})", "built-in function len"),
        ("c = ConfigDict(c.to_dict() | {'seed': sys})", "(module)"),
        ("c = ConfigDict(c.to_dict() | {'seed': np.ones((9, 9))})", "(ndarray)"),
        ("c = ConfigDict(c.to_dict() | {'seed': np.int64(3)})", "(int64)"),
        ("c = ConfigDict(c.to_dict() | {'seed': '3'})", "seed: expected int, such as 0, found '3'"),
        ("c = ConfigDict(c.to_dict() | {'seed': 3.0})", "seed: expected int, such as 0, found 3.0"),
        ("c = ConfigDict(c.to_dict() | {'seed': True})", "expected int, such as 0, found True"),
        ("c = ConfigDict(c.to_dict() | {'train': 3})", "missing, train.accumulation the first"),
        ("c = ConfigDict(c.to_dict() | {'train': {}})", "missing, train.accumulation the first"),
        ("c = ConfigDict({'seed': 1})", "missing, checkpoint.every the first"),
        ("c.unlock(); del c.mesh", "found 3 missing, mesh.data the first"),
        ("c.unlock(); c.own = lambda: 1", "own: expected a number, a text, a truth value or"),
        ("c.unlock(); c.own = (1, [2])", "own: expected a number, a text"),
        ("c.unlock(); c.own = {1: 2}", "expected names of fields in own, found 1"),
        ("c.model.widht = 3", 'Did you mean "width'),
        ("c.model.width = 'wide'", "TypeError"),
        ("c.optimizer.learning_rate = '3e-3'", "TypeError"),
        (
            "d = c.to_dict(); d['model']['adaptive_io']['cutoffs'] = [1]; c = ConfigDict(d)",
            "model.adaptive_io.cutoffs: expected whole numbers with commas",
        ),
    ],
)
def test_fields_of_other_types(tmp_path: Path, change: str, message: str) -> None:
    (tmp_path / "mine.py").write_text(HEAD.format(change))
    assert message in refused(f"--config={tmp_path}/mine.py")


def test_fields_that_may_differ(tmp_path: Path) -> None:
    """A whole number for a number; a frozen configuration; fields of one's own."""
    change = "c.unlock(); c.own = (1, 'a'); c.optimizer.clip = 1; c = FrozenConfigDict(c)"
    (tmp_path / "mine.py").write_text(HEAD.format(change))
    c = config.load(f"{tmp_path}/mine.py", {"seed": "3"})
    assert (c.seed, c.own, c.optimizer.clip) == (3, (1, "a"), 1)
    again = config.from_json(config.to_json(c))
    assert not config.changed_fields(c, again)


@pytest.mark.parametrize("name", ["../setup", "configs/demo", "x" * 5000, "\0", "__init__", "/"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(UserError, match="found no file"):
        experiments.find(name)


def test_installed_experiments_without_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no package `configs`, and the path of a checkout means the experiment of ours."""
    monkeypatch.setattr(experiments, "IN_CHECKOUT", False)
    monkeypatch.setattr("sys.path", [path for path in __import__("sys").path if "site-" in path])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("from configs import demo")
    expected = "mine.py: expected `from allattn.configs import ...`, found `from configs"
    assert expected in refused("--config=mine.py")
    assert "--config=demo is the installed one" in refused("--config=configs/demo.py")


# --- settings of any text

FIELD = st.sampled_from(sorted(name for name, _ in config.fields(config.load("base"))))
TEXT = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        ["None", "nan", "inf", "-1", "1e400", "()", "(,)", "9" * 30, "True", "[1", "{}"]
    ),
    st.integers().map(str),
    st.floats().map(str),
)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(FIELD, TEXT), min_size=1, max_size=3), st.booleans())
def test_any_setting(changes: list[tuple[str, str]], together: bool) -> None:
    """Either a configuration, or one line that begins with the program's name."""
    words = []
    for name, text in changes:
        words += [f"--config.{name}={text}"] if together else [f"--config.{name}", text]
    found = call("config", *words)
    assert found.code in (0, 2)
    if found.code == 2:
        assert found.err.startswith("allattn: ") and found.err.count("\n") == 1
    else:
        assert found.err == ""


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(max_size=12), max_size=4))
def test_any_words(words: list[str]) -> None:
    """No command of ours ends in a traceback over its words."""
    words = [word for word in words if word not in ("-h", "--help")]
    assert call("configs", "x", *words).code == 2
    assert call(*words).code == 2


def test_values_of_placeholders() -> None:
    entry = config_values.FieldReference(None, field_type=bool)
    assert config_values.parse("a", "T", entry) is True
    assert config_values.parse("a", "None", entry) is None


# --- an accelerator that JAX does not use


@pytest.mark.parametrize(
    ("backend", "nvidia", "tpu", "words"),
    [
        ("cpu", False, False, []),
        ("gpu", True, False, []),
        ("tpu", False, True, []),
        ("cpu", True, False, ["an NVIDIA GPU", "pip install 'jax[cuda12]==0.1'"]),
        ("cpu", False, True, ["a TPU", "pip install 'jax[tpu]==0.1'"]),
    ],
)
def test_unused_accelerator(backend: str, nvidia: bool, tpu: bool, words: list[str]) -> None:
    """One line with what there is and how to use it; nothing where it is used."""
    text = accelerators.remark(backend, nvidia, tpu, "0.1")
    assert bool(text) == bool(words) and "\n" not in text
    assert all(word in text for word in words)
