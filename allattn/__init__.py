"""The all-attention network in JAX.

Public names are those of `__all__`. They are imported when they are first used, so that the command
line answers at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

from allattn.errors import PreemptedError, RunError, UserError
from allattn.version import __version__ as __version__

# For editors and type checkers, which do not run `__getattr__`.
if TYPE_CHECKING:
    from allattn.attention import all_attention as all_attention
    from allattn.config import load as load_config  # noqa: F401
    from allattn.evaluation.sampling import Sampling as Sampling
    from allattn.plots import plot_curves as plot_curves
    from allattn.run import evaluate as evaluate
    from allattn.run import generate as generate
    from allattn.run import load as load
    from allattn.train import train_and_evaluate as train_and_evaluate
    from allattn.train.jsonl import read_jsonl as read_metrics  # noqa: F401

# Module and attribute behind each public name.
_HOMES = {
    "Sampling": ("allattn.evaluation.sampling", "Sampling"),
    "all_attention": ("allattn.attention", "all_attention"),
    "evaluate": ("allattn.run", "evaluate"),
    "generate": ("allattn.run", "generate"),
    "load": ("allattn.run", "load"),
    "load_config": ("allattn.config", "load"),
    "plot_curves": ("allattn.plots", "plot_curves"),
    "read_metrics": ("allattn.train.jsonl", "read_jsonl"),
    "train_and_evaluate": ("allattn.train", "train_and_evaluate"),
}

__all__ = ["PreemptedError", "RunError", "UserError", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'allattn' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    """What a notebook offers behind `allattn.`, before anything is imported."""
    return sorted([*__all__, "__version__"])
