"""Reading experiment files, command-line overrides and stored configurations."""

import difflib
import importlib.machinery
import importlib.util
import json
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_collections

from allattn.errors import UserError

# May differ between the run that made a workdir and one that goes on in it. None changes what an
# update computes, but that the rate follows the number of steps; a run may nevertheless be
# lengthened.
FREE = (
    *("dataset.data_dir", "mesh.", "checkpoint.", "evaluate.", "model.implementation"),
    *(
        "train.steps",
        "train.finetune_steps",
        "train.log_every",
        "train.accumulation",
        "train.remat",
        "train.peak_flops",
        "train.profile",
        "train.init_from",  # without effect once there is a checkpoint
    ),
)

# Smallest values of fields that are numbers, and bounds that a few must stay below.
LEAST = {
    **dict.fromkeys(
        ("model.depth", "model.width", "model.heads", "model.vocab_size", "model.span.limit"), 1
    ),
    **dict.fromkeys(
        ("model.span.ramp", "model.span.check_every", "checkpoint.every", "checkpoint.keep"), 1
    ),
    **dict.fromkeys(("train.batch", "train.block", "train.accumulation", "train.log_every"), 1),
    **dict.fromkeys(
        ("evaluate.every", "evaluate.batch", "evaluate.target_length", "evaluate.memory_length"), 1
    ),
    **dict.fromkeys(("model.adaptive_io.division",), 1),
    **dict.fromkeys(("model.feed_forward", "model.attention_dropout", "evaluate.clamp_length"), 0),
    **dict.fromkeys(
        ("model.persistent", "model.dropout", "model.embedding_dropout", "model.span.init"), 0
    ),
    **dict.fromkeys(("model.span.margin", "train.steps", "train.finetune_steps"), 0),
    **dict.fromkeys(
        ("optimizer.learning_rate", "optimizer.warmup", "optimizer.clip", "optimizer.weight_decay"),
        0,
    ),
    **dict.fromkeys(("train.peak_flops", "train.profile", "evaluate.max_tokens"), 0),
}
BELOW = dict.fromkeys(("model.dropout", "model.embedding_dropout", "model.attention_dropout"), 1)


def load(path: str, overrides: dict[str, str] | None = None) -> ml_collections.ConfigDict:
    """The configuration of an experiment file, with overrides.

    Args:
      path: a Python file with `get_config()`.
      overrides: values as text, by dotted name; each is read in the type of the field.

    Returns:
      The locked configuration.

    Raises:
      UserError: no such file, it fails or has no get_config(), an unknown field (the nearest is
        named) or a value of the wrong type.
    """
    file = Path(path)
    if "://" in path:
        raise UserError(
            f"--config: expected a file on this machine, as it imports those beside it; found {path}"
        )
    if not file.is_file():
        raise UserError(f"--config: expected a Python file with get_config(), found no file {path}")
    config = _read(file)
    for name, text in (overrides or {}).items():
        set_field(config, name, text)
    return config.lock()


def _read(file: Path) -> ml_collections.ConfigDict:
    """Run an experiment file; `configs` is a package in it, of those beside the file and then ours, wherever it is."""
    root = next(
        (p.parent for p in file.resolve().parents if p.name == "configs"), file.resolve().parent
    )
    roots = [
        str(root),
        str(Path(__file__).resolve().parents[1]),
    ]  # in a checkout, or installed as one: the repository
    sys.path[:0] = roots
    for name in [name for name in sys.modules if name.split(".")[0] == "configs"]:
        del sys.modules[name]  # of another experiment file, perhaps from another folder
    try:
        module = _import(file)
        config = module.get_config() if hasattr(module, "get_config") else None
    except Exception as error:  # the file is the user's program, and may fail in any way
        raise UserError(f"--config: {file}: {type(error).__name__}: {error}") from error
    finally:
        for place in roots:
            sys.path.remove(place)
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(
            f"--config: expected get_config() in {file} that returns a ConfigDict, found none"
        )
    return config


def _import(file: Path) -> ModuleType:
    loader = importlib.machinery.SourceFileLoader(f"experiment_{file.stem}", str(file))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None  # a loader always gives one
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def set_field(config: ml_collections.ConfigDict, name: str, text: str) -> None:
    """Set one field from text, in the type that the field has."""
    known = dict(fields(config))
    if name not in known:
        near = difflib.get_close_matches(name, known, 1, 0.0)[0]
        raise UserError(f"--config.{name}: no such field; did you mean --config.{near}?")
    value = _parse(name, text, known[name])
    *parents, last = name.split(".")
    for parent in parents:
        config = config[parent]
    config[last] = value


def _parse(name: str, text: str, old: Any) -> Any:
    kind = type(old)
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if kind is tuple:
            return tuple(int(part.replace("_", "")) for part in text.split(",") if text)
        return int(text.replace("_", "")) if kind is int else kind(text)
    except (ValueError, KeyError):
        if kind is tuple:
            expected = "whole numbers with commas between, such as 20000,40000"
            raise UserError(f"--config.{name}: expected {expected}, found {text!r}") from None
        raise UserError(
            f"--config.{name}: expected {kind.__name__}, such as {old!r}, found {text!r}"
        ) from None


def fields(config: ml_collections.ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of a configuration as (dotted name, value)."""
    for name in config:
        if isinstance(config[name], ml_collections.ConfigDict):
            yield from fields(config[name], f"{prefix}{name}.")
        else:
            yield prefix + name, config[name]


def check_ranges(config: ml_collections.ConfigDict, prefix: str = "") -> None:
    """Refuse numbers out of range.

    Args:
      config: the whole configuration.
      prefix: what the names of the fields to check begin with.

    Raises:
      UserError: names the field, the bound and the value.
    """
    for name, value in fields(config):
        if not name.startswith(prefix):
            continue
        if name in LEAST and not value >= LEAST[name]:
            raise UserError(f"{name}: expected at least {LEAST[name]}, found {value}")
        if name in BELOW and not value < BELOW[name]:
            raise UserError(f"{name}: expected less than {BELOW[name]}, found {value}")


def check_clusters(config: ml_collections.ConfigDict) -> None:
    """Refuse cutoffs that do not cut the vocabulary, and a division that leaves the last cluster no width.

    Raises:
      UserError: names the field, what it must fit and the value.
    """
    model, cutoffs = config.model, config.model.adaptive_io.cutoffs
    bounds = (0, *cutoffs, model.vocab_size)
    if not all(isinstance(high, int) and low < high for low, high in pairwise(bounds)):
        expected = f"increasing whole numbers between 0 and model.vocab_size {model.vocab_size}"
        raise UserError(f"model.adaptive_io.cutoffs: expected {expected}, found {cutoffs}")
    if model.adaptive_io.division ** len(cutoffs) > model.width:
        expected = f"a number whose power {len(cutoffs)} is at most model.width {model.width}"
        raise UserError(
            f"model.adaptive_io.division: expected {expected}, found {model.adaptive_io.division}"
        )


def with_vocabulary(
    config: ml_collections.ConfigDict, size: int, name: str
) -> ml_collections.ConfigDict:
    """The configuration with the size of a data set's vocabulary, which a size of 0 leaves open.

    Raises:
      UserError: it names another size.
    """
    if config.model.vocab_size not in (0, size):
        found = f"{size} symbols in {name}"
        raise UserError(
            f"model.vocab_size: expected what the data has, {found}; found {config.model.vocab_size}"
        )
    config = config.copy_and_resolve_references().lock()
    config.model.vocab_size = size
    return config


def to_json(config: ml_collections.ConfigDict) -> str:
    """A configuration as JSON text, for a checkpoint."""
    return json.dumps(config.to_dict(), sort_keys=True)


def from_json(text: str) -> ml_collections.ConfigDict:
    """The inverse of `to_json`."""

    def with_tuples(found: dict[str, Any]) -> dict[str, Any]:
        return {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in found.items()
        }

    return ml_collections.ConfigDict(json.loads(text, object_hook=with_tuples)).lock()


def changed_fields(
    old: ml_collections.ConfigDict,
    new: ml_collections.ConfigDict,
    free: tuple[str, ...] = FREE,
    places: tuple[str, str] = ("in the workdir", "now"),
) -> list[str]:
    """Fields that differ between two configurations, other than those whose names begin as `free` says."""
    before, after = dict(fields(old)), dict(fields(new))
    names = sorted(set(before) | set(after))
    changed = (n for n in names if before.get(n) != after.get(n) and not n.startswith(free))
    return [f"{n}: {before.get(n)!r} {places[0]}, {after.get(n)!r} {places[1]}" for n in changed]
