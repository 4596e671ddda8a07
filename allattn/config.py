"""Reading, overriding, comparing and storing configurations."""

import difflib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections

from allattn import config_values, experiments
from allattn.config_checks import FIELDS, MAY_CHANGE_ON_RESUMING
from allattn.configs import base
from allattn.errors import UserError
from allattn.urls import is_url

BASE = experiments.FOLDER / "base.py"

# A field in configs/base.py: `c.model.depth = 18  # layers`.
_FIELD_LINE = re.compile(r"c\.(?P<name>[\w.]+) = .*?(  # (?P<comment>.*))?")


# --- reading an experiment file


def load(
    path: str, overrides: Mapping[str, Any] | None = None, text: str | None = None
) -> ml_collections.ConfigDict:
    """The configuration of an experiment file, with overrides.

    Args:
      path: a Python file with `get_config()`, or the name of one of ours, such as `demo` or
        `ablations/joint_tiny`; `:ARGUMENT` behind it goes to get_config().
      overrides: values by dotted name, as Python has them or as text; each is read in the type of
        the field.
      text: a text of one's own, a file or a folder, in the place of the file's data set.

    Returns:
      The locked configuration.

    Raises:
      UserError: no such file, it fails or has no get_config(), an unknown field (the nearest is
        named), a missing one, or a value of the wrong type.

    Example:
      >>> config = allattn.load_config("demo", {"model.depth": 2})
      >>> config.model.depth, config.dataset.name
      (2, 'stdlib')
    """
    config = experiments.read(*experiments.find(path))
    # The command line has the last word.
    values = _fields_of_text(text) | dict(overrides or {})
    for name, value in values.items():
        set_field(config, name, _as_text(value))

    # Types are checked here, as everything after this relies on them; ranges where they matter.
    config_values.require_kinds(config, dict(fields(base.get_config())))
    return config.copy_and_resolve_references().lock()


def _as_text(value: Any) -> str:
    """A value as the command line has it: (20, 40) is 20,40."""
    if isinstance(value, tuple | list):
        return ",".join(map(str, value))
    return str(value)


def _fields_of_text(text: str | None) -> dict[str, str]:
    """What `--text` stands for, by dotted name."""
    if text is None:
        return {}
    if not text:
        raise UserError("--text: expected a file or a folder of files, found an empty name")
    # A checkpoint keeps the path, and may be scored from another folder.
    place = text if is_url(text) else os.path.abspath(os.path.expanduser(text))
    return {"dataset.name": "files", "dataset.data_dir": place, "model.vocab_size": "0"}


# --- fields


def set_field(config: ml_collections.ConfigDict, name: str, text: str) -> None:
    """Set one field from text, in the type that the field has.

    Args:
      config: the whole configuration, which is changed.
      name: dotted name of the field.
      text: its value; the numbers of a tuple have commas between them.

    Raises:
      UserError: an unknown field (the nearest is named) or a value of the wrong type.
    """
    # A name that is not known is most often a misspelt one.
    known = dict(config_values.entries(config))
    if name not in known:
        nearest = difflib.get_close_matches(name, [*known, ""], 1, 0.0)[0]
        raise UserError(f"--config.{name}: no such field; did you mean --config.{nearest}?")
    value = config_values.parse(name, text, known[name])

    # Down through the sections, to the one that holds the field.
    *sections, last = name.split(".")
    for section in sections:
        config = config[section]
    config[last] = value


def boolean_fields(path: str) -> set[str]:
    """Dotted names of an experiment's truth values, whose flags need no value.

    Args:
      path: as in `load`.

    Raises:
      UserError: no such file, or it fails.
    """
    config = experiments.read(*experiments.find(path))
    kinds = {name: config_values.kind_of(entry) for name, entry in config_values.entries(config)}
    return {name for name, kind in kinds.items() if kind is bool}


def fields(config: ml_collections.ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of a configuration as (dotted name, value), in the order of the names."""
    for name in config:
        if isinstance(config[name], ml_collections.ConfigDict):
            yield from fields(config[name], f"{prefix}{name}.")
        else:
            yield prefix + name, config[name]


def with_vocabulary(
    config: ml_collections.ConfigDict, size: int, name: str
) -> ml_collections.ConfigDict:
    """The configuration with the size of a data set's vocabulary, which a size of 0 leaves open.

    Args:
      config: the whole configuration.
      size: symbols in the vocabulary of the data.
      name: the data set, for the message.

    Raises:
      UserError: the configuration states another size.
    """
    if config.model.vocab_size not in (0, size):
        raise UserError(
            f"model.vocab_size: expected what the data has, {size} symbols in {name}; "
            f"found {config.model.vocab_size}"
        )
    # The caller's configuration stays as it is.
    config = config.copy_and_resolve_references().lock()
    config.model.vocab_size = size
    return config


# --- storing and comparing


def to_json(config: ml_collections.ConfigDict) -> str:
    """A configuration as JSON text, for a checkpoint.

    Raises:
      UserError: a field is NaN or infinite, which JSON has no word for.
    """
    for name, value in fields(config):
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{name}: expected a finite number, found {value}")
    return json.dumps(config.to_dict(), sort_keys=True, allow_nan=False)


def from_json(text: str) -> ml_collections.ConfigDict:
    """The inverse of `to_json`.

    Raises:
      UserError: the text is no configuration that a run has stored.
    """

    # JSON has no tuples, and a configuration no lists.
    def with_tuples(section: dict[str, Any]) -> dict[str, Any]:
        return {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in section.items()
        }

    try:
        stored = json.loads(text, object_hook=with_tuples)
    except (ValueError, RecursionError) as error:
        raise UserError(f"a stored configuration: expected JSON, found {error}") from error
    if not isinstance(stored, dict):
        raise UserError(f"a stored configuration: expected an object, found {stored!r:.80}")
    _require_sections(stored)

    # What is newer than the text gets the value that it had then; all had the name of a data set.
    config = ml_collections.ConfigDict(stored)
    _add_later_fields(config)
    _require_stored_kinds(config)
    _complete(config.dataset)
    return config.lock()


def _require_sections(stored: dict[str, Any]) -> None:
    """Refuse a configuration that lacks a section, or has something else in its place."""
    for name, section in base.get_config().items():
        if not isinstance(section, ml_collections.ConfigDict):
            continue
        if not isinstance(stored.get(name), dict):
            raise UserError(
                f"a stored configuration: expected a section {name}, found {stored.get(name)!r:.80}"
            )


def _add_later_fields(config: ml_collections.ConfigDict) -> None:
    """Give fields that are newer than the text their default, which is what it meant.

    Of a model only those that are known to be newer: it cannot be described without the others.
    Where a section holds something else than fields, that is refused afterwards.
    """
    for name, default in fields(base.get_config()):
        if not (FIELDS[name].later or name.startswith(("optimizer.", "train."))):
            continue
        # Down to the section that holds the field.
        *sections, last = name.split(".")
        section: Any = config
        for part in sections:
            section = section.get(part)
            if not isinstance(section, ml_collections.ConfigDict):
                break
        else:
            section[last] = section.get(last, default)


def _require_stored_kinds(config: ml_collections.ConfigDict) -> None:
    """Refuse a model that lacks a field, and fields of other types that are read again.

    A run may be older than other fields, and than the types of those of its training.
    """
    kinds = {}
    for name, default in fields(base.get_config()):
        section, _, field = name.partition(".")
        # Also where a section stands in the place of the field.
        is_there = section in ("dataset", "evaluate") and field in config[section]
        if is_there or name.startswith(("model.", "dataset.name")):
            kinds[name] = default
    config_values.require_kinds(config, kinds)


def _complete(dataset: ml_collections.ConfigDict) -> None:
    """Give fields that a stored configuration is too old to have the values that it meant."""
    # Without effect on the papers' sets, which therefore get the default, and on other units.
    symbols = (dataset.name, dataset.get("unit", "byte"))
    by_appearance = symbols in {("files", "byte"), ("stdlib", "byte")}
    if "numbering" not in dataset:
        dataset.numbering = "appearance" if by_appearance else "value"
    if "vocab_size" not in dataset:
        dataset.vocab_size = 4096
    if "min_count" not in dataset:
        dataset.min_count = int(symbols != ("files", "word"))


def changed_fields(
    old: ml_collections.ConfigDict,
    new: ml_collections.ConfigDict,
    may_change: tuple[str, ...] = MAY_CHANGE_ON_RESUMING,
    sides: tuple[str, str] = ("in the workdir", "now"),
) -> list[str]:
    """Fields that differ between two configurations.

    Args:
      old, new: whole configurations, or the same section of two.
      may_change: beginnings of names of fields that may differ.
      sides: what a line calls the two.

    Returns:
      One text for each field, as in "seed: 0 in the workdir, 1 now", in the order of the names.
    """
    before = dict(fields(old))
    after = dict(fields(new))
    # A field that one of the two lacks, as after a change of version, has the value None there.
    lines = []
    for name in sorted(before.keys() | after.keys()):
        if name.startswith(may_change) or before.get(name) == after.get(name):
            continue
        lines.append(f"{name}: {before.get(name)!r} {sides[0]}, {after.get(name)!r} {sides[1]}")
    return lines


# --- showing


def describe(config: ml_collections.ConfigDict) -> str:
    """A configuration for a reader: one line `name = value  # comment` per field.

    The lines have the order and the comments of configs/base.py. A line that begins with * differs
    from it.
    """
    defaults = dict(fields(load(str(BASE))))
    values = dict(fields(config))
    # Fields that base.py does not have, if an experiment file has added some, come last.
    names = [name for name in FIELDS if name in values]
    names += [name for name in values if name not in FIELDS]

    settings = {}
    for name in names:
        differs = name not in defaults or values[name] != defaults[name]
        mark = "*" if differs else " "
        settings[name] = f"{mark} {name} = {values[name]!r}"

    # The comments stand in one column.
    column = max(map(len, settings.values()))
    comments = field_comments()
    lines = []
    for name, setting in settings.items():
        comment = f"  # {comments[name]}" if comments.get(name) else ""
        lines.append(f"{setting:{column}}{comment}".rstrip())
    return "\n".join(lines)


def field_comments() -> dict[str, str]:
    """What configs/base.py says of each field, by dotted name.

    A comment stands behind the field, or on lines of its own directly above it.
    """
    comments = {}
    above: list[str] = []
    for line in BASE.read_text(encoding="utf8").splitlines():
        line = line.strip()
        # A line of its own is kept for the field below it.
        if line.startswith("# "):
            above.append(line.removeprefix("# "))
            continue
        if field := _FIELD_LINE.fullmatch(line):
            behind = [field["comment"]] if field["comment"] else []
            comments[field["name"]] = " ".join(above + behind)
        # Any other line ends what stood above it.
        above = []
    return comments
