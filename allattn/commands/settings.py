"""Settings: the words of a command line that change fields of the configuration.

The forms are those of ml_collections' flags: --config.a.b=v, --config.a.b v, and of a truth value
--config.a.b and --noconfig.a.b.
"""

from collections.abc import Sequence

from allattn.errors import UserError

SET = "--config."
UNSET = "--noconfig."


def read(words: Sequence[str], experiment: str) -> dict[str, str]:
    """The settings as {"a.b": "value"}.

    Args:
      words: those of the command line that are none of the command's flags.
      experiment: the experiment file, which tells the truth values from other fields.

    Raises:
      UserError: a word that is no setting, or a setting without its value.
    """
    overrides = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        # Where the value stands in the same word, the field's type is of no interest yet.
        if name.startswith(SET):
            field = name.removeprefix(SET)
            if not equals:
                value = _value_behind(field, rest, experiment)
        elif name.startswith(UNSET) and not equals:
            field = name.removeprefix(UNSET)
            value = _unset(field, experiment)
        else:
            raise UserError(
                f"unknown argument {word!r}; `allattn COMMAND --help` lists the flags; "
                "settings are --config.name=value"
            )
        overrides[field] = value
    return overrides


def fields_named(name: str) -> list[str]:
    """Dotted names of the fields of every experiment whose last part is a name."""
    from allattn import config

    # All experiments have the fields of this one.
    fields = [field for field, _ in config.fields(config.load("base"))]
    return [field for field in fields if field.split(".")[-1] == name]


def _value_behind(field: str, rest: list[str], experiment: str) -> str:
    """The value of `--config.field`, which is the next word but of truth values, as in absl."""
    if field in _booleans(experiment):
        return "true"
    # A flag is no value; one that begins like a flag is written with `=`.
    if not rest or rest[0].startswith("--"):
        raise UserError(f"--config.{field}: expected a value, as in --config.{field}=VALUE")
    return rest.pop(0)


def _unset(field: str, experiment: str) -> str:
    if field not in _booleans(experiment):
        raise UserError(f"--noconfig.{field}: expected a truth value's name, found another")
    return "false"


def _booleans(experiment: str) -> set[str]:
    from allattn import config

    return config.boolean_fields(experiment)
