"""README and docs/: links that lead somewhere, commands that exist, a front page of one screen."""

import functools
import re
import shlex
from pathlib import Path

import pytest

from allattn.commands import COMMANDS, flags

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "launch" / "README.md"]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
# A heading's anchor has its words in small letters, joined by hyphens.
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """What links within a page may name after #."""
    headings = HEADING.findall(page.read_text(encoding="utf8"))
    return {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings}


def test_front_page_is_short():
    """A newcomer reads it in a minute: at most 100 lines."""
    assert len((ROOT / "README.md").read_text(encoding="utf8").splitlines()) <= 100


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links(page):
    """Every link within the repository names a file that is there, and a heading that it has."""
    for link in re.findall(r"\]\((?!https?://)([^)]+)\)", page.read_text(encoding="utf8")):
        name, _, anchor = link.partition("#")
        target = (page.parent / (name or page.name)).resolve()
        assert target.exists(), f"{page.name} links to {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.name} links to {link}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_named_tests(page):
    """Every test that a page cites exists under that name."""
    text = page.read_text(encoding="utf8")
    for file in re.findall(r"tests/[\w/]+\.py", text):
        assert (ROOT / file).exists(), f"{page.name} cites {file}"
    for name in re.findall(r"`(test_\w+)`", text):
        assert name in defined_tests(), f"{page.name} cites {name}"


@functools.cache
def defined_tests() -> set[str]:
    """The names of all tests, and of their files."""
    files = list((ROOT / "tests").rglob("test_*.py"))
    texts = [file.read_text(encoding="utf8") for file in files]
    names = {name for text in texts for name in re.findall(r"def (test_\w+)\(", text)}
    return names | {file.stem for file in files}


def commands(page: Path) -> list[str]:
    """The lines of a page's code blocks that call `allattn`, without comments."""
    blocks = re.findall(
        r"^```\n(.*?)^```", page.read_text(encoding="utf8"), re.DOTALL | re.MULTILINE
    )
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    calls = [re.sub(r"\s+#.*", "", line) for line in lines]
    return [call for call in calls if call.startswith("allattn ")]


def test_pages_have_commands():
    """Those that teach the command line are read by the test below."""
    taught = [page.name for page in PAGES if commands(page)]
    assert {"README.md", "usage.md", "data.md"} <= set(taught)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands(page):
    """Every command of a page has the flags that it is given there; another is a UserError."""
    for call in commands(page):
        _, *words = shlex.split(call)
        arguments, _ = flags.parse(COMMANDS, words)
        assert arguments.chosen.name == words[0], call
