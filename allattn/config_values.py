"""Values of configuration fields: read from text, and refused where they are of the wrong type."""

import ast
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections
from ml_collections import FieldReference

from allattn.errors import UserError

# Words for truth values, those of absl's flags.
TRUTH = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}
# Types that a configuration may hold, as they must survive being stored as JSON.
KINDS = (bool, int, float, str, tuple, type(None))


# --- the fields of a configuration


def entries(config: ml_collections.ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf as (dotted name, value or placeholder), in the order of the names.

    A placeholder of ml_collections is a `FieldReference` whose value is None so far.

    Raises:
      UserError: a name that is no text.
    """
    for name, value in config.items(preserve_field_references=True):
        if not isinstance(name, str):
            raise UserError(f"--config: expected names of fields in {prefix[:-1]}, found {name!r}")
        if isinstance(value, ml_collections.ConfigDict):
            yield from entries(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def kind_of(entry: Any) -> type:
    """The type that a field has, or that a placeholder asks for."""
    if isinstance(entry, FieldReference):
        return entry.get_type()
    return type(entry)


def value_of(entry: Any) -> Any:
    """The value of a field; None for a placeholder that is not filled."""
    if not isinstance(entry, FieldReference):
        return entry
    try:
        return entry.get()
    except ml_collections.config_dict.RequiredValueError:
        return None


# --- reading one from text


def parse(name: str, text: str, entry: Any) -> Any:
    """The value that a text stands for, in the type of the field.

    Args:
      name: dotted name of the field, for the message.
      text: its value; a tuple's have commas between them, with or without parentheses.
      entry: what the field holds so far, or a placeholder.

    Raises:
      UserError: the text is no value of that type.
    """
    kind = kind_of(entry)
    old = value_of(entry)
    # What may be left open may be left open again.
    if old is None and text in ("None", "none"):
        return None
    try:
        return _read(text, kind, old)
    except (ValueError, KeyError, SyntaxError, MemoryError, RecursionError):
        raise UserError(
            f"--config.{name}: expected {_expected(kind, old)}, found {text!r}"
        ) from None


def _read(text: str, kind: type, old: Any) -> Any:
    # bool("False") is True, so the words are looked up.
    if kind is bool:
        return TRUTH[text.lower()]
    if kind is int:
        return _whole_number(text)
    if kind is tuple:
        return _read_tuple(text, old)
    # A field that is None says nothing of its type.
    if kind is type(None):
        return _read_anything(text)
    # The rest is text as it stands.
    if kind is float:
        return float(text)
    if kind is str:
        return text
    raise ValueError


def _read_tuple(text: str, old: tuple | None) -> tuple:
    # The elements have the type of those that are there; else they are whole numbers.
    kind = int
    if old:
        kind = type(old[0])
    # Python's own form: (20,40), (20,) and (), which the shell wants in quotes.
    inner = text
    if text[:1] + text[-1:] in ("()", "[]"):
        inner = text[1:-1].removesuffix(",")
    return tuple(_read(part.strip(), kind, None) for part in inner.split(",") if inner.strip())


def _read_anything(text: str) -> Any:
    """A number or a truth value as Python writes it; everything else is a text."""
    # As in Python's source: 3, 1e-3, True.
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    if isinstance(value, (bool, int, float)):
        return value
    return text


def _whole_number(text: str) -> int:
    """20_000 and 20000 alike."""
    return int(text.replace("_", ""))


def _expected(kind: type, old: Any) -> str:
    """What a message asks for."""
    # Of numbers, as base.py has them; other tuples tell their form by an example.
    if kind is tuple and not (old and type(old[0]) is not int):
        return "whole numbers with commas between, such as 20000,40000"
    if kind not in KINDS:
        return f"a change in the experiment file, as this field holds a {kind.__name__}"
    if old is None:
        return kind.__name__
    return f"{kind.__name__}, such as {old!r}"


# --- the types of all


def require_kinds(config: ml_collections.ConfigDict, defaults: Mapping[str, Any]) -> None:
    """Refuse a configuration that lacks a field, or whose fields are of other types.

    Args:
      config: the whole configuration.
      defaults: configs/base.py's value of each of its fields, by dotted name.

    Raises:
      UserError: names the field, what it must be and what it is.
    """
    found = dict(entries(config))
    missing = [name for name in defaults if name not in found]
    if missing:
        raise UserError(
            f"--config: expected the fields of configs/base.py, whose get_config() one changes; "
            f"found {len(missing)} missing, {missing[0]} the first"
        )
    for name, entry in found.items():
        value = value_of(entry)
        # A placeholder that a setting was to fill.
        if value is None and isinstance(entry, FieldReference):
            _require_filled(name, entry, name in defaults)
        elif name in defaults:
            _require_kind(name, value, defaults[name])
        elif not _can_be_stored(value):
            raise UserError(
                f"{name}: expected a number, a text, a truth value or a tuple of them, "
                f"found {_short(value)}"
            )


def _require_filled(name: str, entry: FieldReference, of_base: bool) -> None:
    """Refuse an empty placeholder that is required, or that stands for one of base.py's fields."""
    try:
        entry.get()
    except ml_collections.config_dict.RequiredValueError:
        of_base = True
    if of_base:
        kind = entry.get_type().__name__
        raise UserError(
            f"--config.{name}: expected a value ({kind}), as it is required; found none"
        )


def _require_kind(name: str, value: Any, default: Any) -> None:
    kinds: tuple[type, ...] = (type(default),)
    # A whole number is a number.
    if type(default) is float:
        kinds = (float, int)
    # Exactly these: a bool is an int to Python, and NumPy's float a float.
    if type(value) in kinds and _can_be_stored(value):
        return
    raise UserError(f"{name}: expected {_expected(type(default), default)}, found {_short(value)}")


def _can_be_stored(value: Any) -> bool:
    """Whether a value is the same when it is read back from JSON."""
    # A list would come back as a tuple.
    if type(value) is tuple:
        return all(_can_be_stored(element) for element in value)
    return type(value) in KINDS


def _short(value: Any) -> str:
    """A value on one line, with its type where the value does not tell."""
    # An array's own text has many lines, and a text may be a damaged file's.
    text = " ".join(repr(value).split())
    if len(text) > 60:
        text = f"{text[:60]}..."
    if type(value) in KINDS:
        return text
    return f"{text} ({type(value).__name__})"
