"""The experiments, in a checkout.

Their files stand at the top level, in `configs/`, and are installed as the package
`allattn.configs`, which takes the place of this file. In a checkout this file gives them the same
name, so that `from allattn.configs import demo` also works where nothing is installed.
"""

from pathlib import Path
from typing import Any

__path__ = [str(Path(__file__).resolve().parents[1] / "configs")]


def __getattr__(name: str) -> Any:
    """Tells type checkers that experiments are found here; an import finds them by `__path__`."""
    raise AttributeError(f"no experiment {name!r} in {__path__[0]}")
