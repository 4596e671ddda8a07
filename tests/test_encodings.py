"""Files are opened as UTF-8 whatever the locale says."""

import ast
from pathlib import Path

import pytest
from command_line import ROOT

FOLDERS = ("allattn", "launch", "benchmarks", "configs", ".ci")
FILES = sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))
# Position of the mode among the arguments of those that may open a file as text.
OPENERS = {"open": 0, "read_text": None, "write_text": None, "fdopen": 1}


def opens_text(call: ast.Call) -> bool:
    """Whether a call opens a file as text, as far as its words tell."""
    function = call.func
    name = getattr(function, "attr", getattr(function, "id", ""))
    if name not in OPENERS:
        return False
    # The function `open` has the file before the mode; os.open has no mode, and an archive's has
    # bytes.
    owner = getattr(getattr(function, "value", None), "id", "")
    if owner in ("os", "archive", "zipfile"):
        return False
    position = OPENERS[name]
    if name == "open" and isinstance(function, ast.Name):
        position = 1
    if position is None:
        return True
    modes = [word.value for word in call.keywords if word.arg == "mode"]
    modes += call.args[position : position + 1]
    # A mode that is not written there is that of a download.
    return all(isinstance(mode, ast.Constant) and "b" not in mode.value for mode in modes)


def names_an_encoding(call: ast.Call) -> bool:
    return any(word.arg in ("encoding", None) for word in call.keywords)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_text_file_names_its_encoding(file: Path) -> None:
    calls = [
        node
        for node in ast.walk(ast.parse(file.read_text(encoding="utf8")))
        if isinstance(node, ast.Call)
    ]
    assert not [
        f"line {call.lineno}: {ast.unparse(call)}"
        for call in calls
        if opens_text(call) and not names_an_encoding(call)
    ]
