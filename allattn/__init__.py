"""The all-attention network in JAX.

Public names: `all_attention`, `load`, `train_and_evaluate`, `load_config` and `UserError`. They are imported when they
are first used, so that the command line answers at once.
"""

import importlib
from typing import Any

from allattn.errors import RunError, UserError

_HOMES = {
    "all_attention": ("allattn.attention", "all_attention"),
    "load": ("allattn.run", "load"),
    "load_config": ("allattn.config", "load"),
    "train_and_evaluate": ("allattn.train", "train_and_evaluate"),
}

__all__ = ["RunError", "UserError", "all_attention", "load", "load_config", "train_and_evaluate"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'allattn' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module), attribute)
