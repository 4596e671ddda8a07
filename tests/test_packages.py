"""The order of the packages: an import points down, and nothing imports in a circle.

A file of `allattn` may import files of its own package and of packages below it. Every import
counts: at the top of a file, inside a function, and for types only.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import allattn

ROOT = Path(__file__).resolve().parents[1]

# From the top to the bottom. Packages and modules of one line may import each other, in one
# direction.
ORDER = [
    {"__main__"},
    {"commands"},
    {"planning", "interchange", "sweep"},
    {"train", "run", "plots"},
    {"evaluation"},
    {"data"},
    {"model", "storage"},
    {"sharding", "config", "config_checks", "config_values", "experiments"},
    {"attention", "configs", "errors", "signals", "urls", "version"},
]
LEVEL = {package: level for level, packages in enumerate(reversed(ORDER)) for package in packages}

Arrows = dict[str, set[str]]


def module_of(file: Path) -> str:
    """Dotted name of the module or package that a file is."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    # The experiments are installed within the package.
    if parts[0] == "configs":
        parts = ("allattn", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_of(file): file
    for folder in ("allattn", "configs")
    for file in (ROOT / folder).rglob("*.py")
}


def imports(source: str, module: str, is_package: bool) -> Iterator[str]:
    """Modules that a source text imports, wherever in it.

    Of `from a import b` that is the module a.b if there is one, and otherwise a.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            # One dot is the package of the module, each further dot the package around it.
            parents = module.split(".")[: len(module.split(".")) - node.level + is_package]
            start = ".".join(parents) + "." if node.level else ""
            base = (start + (node.module or "")).rstrip(".")
            for name in node.names:
                inner = f"{base}.{name.name}"
                yield inner if inner in MODULES else base


def file_arrows() -> Arrows:
    """For every file of `allattn`, `configs` included, the files of it that it imports."""
    found: Arrows = {}
    for module, file in MODULES.items():
        names = imports(file.read_text(), module, file.stem == "__init__")
        found[module] = set(names) & MODULES.keys()
    return found


def package_of(module: str) -> str:
    """The package or single file beside `allattn/__init__.py` that holds a module; "" is that
    file.
    """
    inner = module.split(".")[1:]
    return inner[0] if inner else ""


def package_arrows(files: Arrows) -> Arrows:
    """The same between packages; that `allattn` names what `run` offers is left out."""
    found: Arrows = {}
    for module, targets in files.items():
        package = package_of(module)
        if package:
            others = {package_of(target) for target in targets} - {package}
            found.setdefault(package, set()).update(others)
    return found


def circles(arrows: Arrows) -> set[frozenset[str]]:
    """Groups of nodes from each of which one reaches all others of the group."""
    reach = {node: set(targets) for node, targets in arrows.items()}
    for middle in reach:
        for targets in reach.values():
            if middle in targets:
                targets |= reach[middle]
    return {
        frozenset({other for other in reach[node] if node in reach.get(other, ())})
        for node in reach
        if node in reach[node]
    }


def upward(files: Arrows) -> list[str]:
    """Imports of a package that lies above the importing one."""
    return sorted(
        f"{module} imports {target}"
        for module, targets in files.items()
        for target in targets
        if package_of(module) and not points_down(package_of(module), package_of(target))
    )


def points_down(package: str, target: str) -> bool:
    """Whether a package may import another; `allattn` itself, "", is above all."""
    return package == target or target in LEVEL and LEVEL[target] <= LEVEL[package]


def test_every_package_has_a_level() -> None:
    """A new package or top module takes its place in ORDER."""
    assert {package_of(module) for module in MODULES} - {""} == LEVEL.keys()


def test_imports_point_down() -> None:
    assert upward(file_arrows()) == []


def test_no_circle_of_files() -> None:
    assert circles(file_arrows()) == set()


def test_no_circle_of_packages() -> None:
    assert circles(package_arrows(file_arrows())) == set()


def test_module_names_are_not_public_names() -> None:
    """Else `allattn.evaluate` would be a function or a module, whichever was imported last."""
    assert {name for name in MODULES if name.split(".")[-1] in allattn.__all__} == set()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import allattn.train.metrics", ["allattn.train.metrics"]),
        ("def f():\n    from allattn import train", ["allattn.train"]),
        (
            "if TYPE_CHECKING:\n    from allattn.train import metrics, x",
            ["allattn.train.metrics", "allattn.train"],
        ),
        ("from allattn import evaluate", ["allattn"]),
        ("from . import metrics", ["allattn.train.metrics"]),
        ("from ..model import Model", ["allattn.model"]),
    ],
)
def test_reading_of_imports(source: str, expected: list[str]) -> None:
    """Inside functions, for types, of submodules, of the root, and relative ones."""
    assert list(imports(source, "allattn.train.optim", is_package=False)) == expected


def test_what_is_refused() -> None:
    """An arrow up, one to the root, a circle of files and one of packages of the same level."""
    files: Arrows = {
        "allattn.model.network": {"allattn.train", "allattn", "allattn.model.layers"},
        "allattn.model.layers": {"allattn.model.network"},
        "allattn.storage.paths": {"allattn.model"},
        "allattn.model": {"allattn.storage.checkpoint"},
    }
    assert upward(files) == [
        "allattn.model.network imports allattn",
        "allattn.model.network imports allattn.train",
    ]
    assert circles(files) == {frozenset({"allattn.model.network", "allattn.model.layers"})}
    assert circles(package_arrows(files)) == {frozenset({"model", "storage"})}
