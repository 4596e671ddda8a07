"""The all-attention network in JAX.

Public names are those of `__all__`. They are imported when they are first used, so that the command line answers at
once.
"""

import importlib
import types
from typing import Any

from allattn.errors import RunError, UserError

_HOMES = {
    "all_attention": ("allattn.attention", "all_attention"),
    "load": ("allattn.run", "load"),
    "load_config": ("allattn.config", "load"),
    "read_metrics": ("allattn.metrics", "read_jsonl"),
    "train_and_evaluate": ("allattn.train", "train_and_evaluate"),
}
_CALLABLE = ("evaluate", "generate")

__all__ = ["RunError", "UserError", *_HOMES, *_CALLABLE]


class CallableModule(types.ModuleType):
    """A module that, when it is called, is the function of its name in `allattn.run`.

    Importing a submodule binds its name in the package, so `allattn.evaluate` cannot be relied on to stay a function
    there; the module itself takes the call instead.
    """

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        run = importlib.import_module("allattn.run")
        return getattr(run, self.__name__.removeprefix("allattn."))(*arguments, **options)


def __getattr__(name: str) -> Any:
    if name in _CALLABLE:
        return importlib.import_module(f"allattn.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'allattn' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(module), attribute)
