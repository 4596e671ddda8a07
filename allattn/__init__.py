"""The all-attention network in JAX.

Public names are those of `__all__`. They are imported when they are first used, so that the command
line answers at once.
"""

import importlib
from typing import Any

from allattn.errors import RunError, UserError

__version__ = "0.1.0"

# Module and attribute behind each public name.
_HOMES = {
    "all_attention": ("allattn.attention", "all_attention"),
    "evaluate": ("allattn.run", "evaluate"),
    "generate": ("allattn.run", "generate"),
    "load": ("allattn.run", "load"),
    "load_config": ("allattn.config", "load"),
    "plot_curves": ("allattn.plots", "plot_curves"),
    "read_metrics": ("allattn.train.jsonl", "read_jsonl"),
    "train_and_evaluate": ("allattn.train", "train_and_evaluate"),
}

__all__ = ["RunError", "UserError", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'allattn' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module), attribute)
