"""Reading experiment files and settings, and refusing values that cannot run."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_collections
import pytest

from allattn import config as configuration
from allattn import sharding, train
from allattn.config_checks import FIELDS
from allattn.errors import UserError
from allattn.model import ModelConfig
from allattn.train import optim
from configs import base

BASE = Path(base.__file__)


def changed(**changes: Any) -> ml_collections.ConfigDict:
    """The base configuration for that data set; a double underscore stands for a dot."""
    c = base.get_config()
    c.model.vocab_size = 2
    c.update_from_flattened_dict(
        {name.replace("__", "."): value for name, value in changes.items()}
    )
    return c


# --- reading --------------------------------------------------------------------------------------


def test_overrides_take_the_type_of_the_field() -> None:
    texts = {
        "model.width": "1_024",
        "optimizer.learning_rate": "2e-3",
        "model.span.adaptive": "False",
        "seed": "7",
    }
    c = configuration.load(str(BASE), {**texts, "dataset.name": "text8", "model.span.loss": "1"})
    assert (c.model.width, c.optimizer.learning_rate, c.model.span.adaptive, c.seed) == (
        1024,
        2e-3,
        False,
        7,
    )
    assert (
        c.dataset.name == "text8"
        and c.model.span.loss == 1.0
        and isinstance(c.model.span.loss, float)
    )
    assert (
        dict(configuration.fields(configuration.load(str(BASE)))).keys()
        == dict(configuration.fields(c)).keys()
    )


@pytest.mark.parametrize(
    ("text", "cutoffs"), [("20_000,40000,200000", (20_000, 40_000, 200_000)), ("7", (7,)), ("", ())]
)
def test_overrides_of_a_tuple(text: str, cutoffs: tuple[int, ...]) -> None:
    c = configuration.load(str(BASE), {"model.adaptive_io.cutoffs": text})
    assert c.model.adaptive_io.cutoffs == cutoffs
    again = configuration.from_json(configuration.to_json(c))
    assert again.model.adaptive_io.cutoffs == cutoffs and not configuration.changed_fields(c, again)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        *(
            ("model.adaptive_io.cutoffs", text, "whole numbers with commas")
            for text in ("3,,4", "3,", "a", "1.5")
        ),
        (
            "model.widht",
            "3",
            r"--config.model.widht: no such field; did you mean --config.model.width\?",
        ),
        ("optimiser.learning_rate", "1", r"did you mean --config.optimizer.learning_rate\?"),
        ("qqq", "1", "no such field; did you mean --config"),
        ("model", "3", "--config.model: no such field"),
        ("model.width", "wide", "--config.model.width: expected int, such as 512, found 'wide'"),
        ("model.width", "1.5", "expected int"),
        ("model.width", "", "expected int"),
        ("optimizer.learning_rate", "fast", "expected float, such as 0.07, found 'fast'"),
        ("model.span.adaptive", "maybe", "expected bool, such as True, found 'maybe'"),
    ],
)
def test_wrong_overrides(name: str, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        configuration.load(str(BASE), {name: text})


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("def get_config(:\n", "SyntaxError: .*line 1"),
        ("import nothing_of_that_name\n", "ModuleNotFoundError: .*nothing_of_that_name"),
        ("def get_config():\n    return 1 / 0\n", "ZeroDivisionError"),
        ("def get_config():\n    raise ValueError('one\\ntwo')\n", "ValueError: one.two"),
        ("x = 1\n", "expected get_config"),
        ("def get_config():\n    return 3\n", "returns a ConfigDict"),
    ],
)
def test_wrong_files(tmp_path: Path, program: str, message: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(program)
    with pytest.raises(UserError, match=f"(?s)--config: .*{message}"):
        configuration.load(str(file))


def test_missing_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none.py", tmp_path):
        with pytest.raises(UserError, match=f"found no file {path}"):
            configuration.load(str(path))


def test_file_elsewhere(tmp_path: Path) -> None:
    """A file of any name and place may build on the package's."""
    file = tmp_path / "mine"
    file.write_text(
        "from configs import base\n"
        "def get_config():\n    c = base.get_config()\n    c.seed = 3\n    return c\n"
    )
    assert configuration.load(str(file), {"model.depth": "2"}).seed == 3


OWN = """
from configs import {base}
def get_config():
    c = {base}.get_config()
    c.seed = 3
    return c
"""


def test_file_outside_of_the_repository(tmp_path: Path) -> None:
    """Its base is found from any folder, as by the installed command; in a folder `configs` also
    those beside it.
    """
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "allattn").symlink_to(BASE.parents[1] / "allattn")
    (tmp_path / "configs").mkdir()
    for name, base_name in (
        ("mine", "demo"),
        ("configs/first", "demo"),
        ("configs/second", "first"),
    ):
        (tmp_path / f"{name}.py").write_text(OWN.format(base=base_name))
    program = (
        "import sys; from allattn import config; c = config.load(sys.argv[1]); "
        "print(c.seed, c.model.width)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "package")}
    for name in ("mine", "configs/first", "configs/second"):
        words = [sys.executable, "-P", "-c", program, str(tmp_path / f"{name}.py")]
        done = subprocess.run(
            words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
        )
        assert done.stdout == "3 128\n", done.stderr


def test_files_of_two_folders(tmp_path: Path) -> None:
    """In one process: each imports those beside it, before ours and whatever the other has
    imported.
    """
    for folder, width in (("a", 24), ("b", 48)):
        (tmp_path / folder / "configs").mkdir(parents=True)
        text = (
            "from configs import demo\n"
            f"def get_config():\n    c = demo.get_config(); c.model.width = {width}; return c"
        )
        (tmp_path / folder / "configs" / "base_of.py").write_text(text)
        (tmp_path / folder / "configs" / "enwik8_small.py").write_text(
            "from configs.base_of import get_config"
        )
        (tmp_path / folder / "configs" / "mine.py").write_text(
            "from configs.enwik8_small import get_config"
        )
    for folder, width in (("a", 24), ("b", 48), ("a", 24)):
        assert (
            configuration.load(str(tmp_path / folder / "configs" / "mine.py")).model.width == width
        )
    assert configuration.load(str(BASE.parent / "enwik8_small.py")).model.width == 512


def test_json_holds_everything() -> None:
    c = configuration.load(str(BASE), {"model.depth": "2"})
    again = configuration.from_json(configuration.to_json(c))
    assert dict(configuration.fields(again)) == dict(configuration.fields(c))
    assert not configuration.changed_fields(c, again)


def test_changed_fields() -> None:
    """What decides an update may not change within a workdir; the rest may."""
    free = changed(
        train__steps=9,
        train__log_every=3,
        checkpoint__keep=1,
        evaluate__protocol="full",
        mesh__fsdp=2,
    )
    assert configuration.changed_fields(changed(), free) == []
    other = changed(model__width=64, optimizer__learning_rate=0.5)
    found = configuration.changed_fields(changed(), other)
    assert found == [
        "model.width: 512 in the workdir, 64 now",
        "optimizer.learning_rate: 0.07 in the workdir, 0.5 now",
    ]


# --- values that cannot run -----------------------------------------------------------------------


def start(config: ml_collections.ConfigDict) -> ModelConfig:
    """The checks of a start, in its order; returns the geometry that they let through."""
    config = configuration.with_vocabulary(config, 2, "two symbols")
    train.check(config)
    sharding.make_mesh(config)
    geometry = ModelConfig.from_config(config)
    optim.optimizer(config)
    return geometry


def test_mesh_that_does_not_fit() -> None:
    """The message has what was written."""
    for data, fsdp in ((-1, 3), (2, 3)):
        with pytest.raises(
            UserError, match=rf"^mesh: expected .* = 2 devices, found {data} x {fsdp} x 1$"
        ):
            sharding.make_mesh(changed(mesh__data=data, mesh__fsdp=fsdp), [None, None])


def test_rematerialisation() -> None:
    """A mistake is refused at the start; the geometry of a workdir does not depend on how it was
    trained.
    """
    with pytest.raises(
        UserError, match=r"train.remat: expected one of \('', 'projections', 'layer'\), found 'all'"
    ):
        start(changed(train__remat="all"))
    stored = changed().to_dict()
    stored["train"]["remat"] = False  # as workdirs from before it had names
    assert ModelConfig.from_config(configuration.from_json(json.dumps(stored))) == start(
        changed(train__remat="layer")
    )


def test_stored_before_a_field_was_there() -> None:
    """It means the default of every later field; a model without another field is refused."""
    whole = changed()
    stored = whole.to_dict()
    for name, field in FIELDS.items():
        *sections, last = name.split(".")
        section = functools.reduce(dict.__getitem__, sections, stored)
        if field.later:
            del section[last]
    again = configuration.from_json(json.dumps(stored))
    assert not configuration.changed_fields(again, whole, ())
    del stored["model"]["depth"]
    with pytest.raises(UserError, match=r"found 1 missing, model.depth the first"):
        configuration.from_json(json.dumps(stored))


def test_base_is_accepted() -> None:
    geometry = start(changed())
    assert (geometry.depth, geometry.width, geometry.vocab_size, geometry.limit) == (
        18,
        512,
        2,
        8192,
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("model.vocab_size", 3), ("train.batch", 0), ("train.block", 0), ("train.block", -8)),
        *(
            ("train.accumulation", 0),
            ("train.accumulation", 3),
            ("train.batch", 10),
            ("train.log_every", 0),
        ),
        *(("mesh.data", 3), ("mesh.fsdp", 0), ("mesh.tensor", -2)),
        *(
            ("model.span.limit", 0),
            ("model.span.ramp", 0),
            ("model.span.init", 1.5),
            ("model.span.init", -0.1),
        ),
        *(
            ("model.span.check_every", 1),
            ("model.depth", 0),
            ("model.width", 0),
            ("model.heads", 3),
        ),
        *(
            ("model.dropout", -0.1),
            ("model.dropout", 1.5),
            ("model.layer", "lstm"),
            ("model.integration", "both"),
        ),
        *(("optimizer.name", "sgd"),),
        *(("model.heads", 0), ("model.persistent", -1), ("model.dropout", 1.0)),
        *(("model.embedding_dropout", 1.0), ("model.embedding_dropout", -0.5)),
        *(("model.dtype", "float7"), ("model.dtype", "int32"), ("model.implementation", "fast")),
        *(("model.span.margin", -100), ("optimizer.clip", -1.0), ("train.steps", -1)),
        *(("train.finetune_steps", -1), ("checkpoint.every", 0), ("checkpoint.keep", 0)),
        *(("evaluate.every", 0), ("evaluate.protocol", "ful"), ("evaluate.max_tokens", -5)),
        *(
            ("model.adaptive_io.cutoffs", cutoffs)
            for cutoffs in ((2,), (0,), (-1,), (1, 1), (1, 0), (0.5,))
        ),
        *(
            ("model.feed_forward", -1),
            ("model.attention_dropout", 1.0),
            ("evaluate.target_length", 0),
        ),
        *(
            ("evaluate.memory_length", 0),
            ("evaluate.clamp_length", -1),
            ("evaluate.protocol", "xl"),
        ),
        *(
            ("optimizer.schedule", "linear"),
            ("optimizer.learning_rate", float("nan")),
            ("evaluate.batch", 0),
        ),
    ],
)
def test_values_out_of_range(field: str, value: Any) -> None:
    """Each is refused before anything is written, by a message that names the field."""
    with pytest.raises(UserError, match=rf"^({field}|mesh|train\.batch)\b"):
        start(changed(**{"train__accumulation": 4, field.replace(".", "__"): value}))


@pytest.mark.parametrize(
    ("division", "message"),
    [(0, "expected at least 1, found 0"), (513, "power 1 is at most .* 512")],
)
def test_division_out_of_range(division: int, message: str) -> None:
    with pytest.raises(UserError, match=f"^model.adaptive_io.division: .*{message}"):
        start(changed(model__adaptive_io__cutoffs=(1,), model__adaptive_io__division=division))
    start(changed(model__adaptive_io__cutoffs=(1,), model__adaptive_io__division=512))


TRANSFORMER = {"model__layer": "transformer", "model__persistent": 0, "model__feed_forward": 8}
XL = {**TRANSFORMER, "model__layer": "transformer_xl", "model__span__adaptive": False}


def test_combinations_that_exist() -> None:
    """The dropout of Transformer-XL is one rate for embedding, positions and final state as
    well.
    """
    for integration in ("joint", "split", "head_split", "single_head"):
        start(changed(model__integration=integration))
    start(changed(**TRANSFORMER, model__integration="ff_attention", model__span__adaptive=False))
    geometry = start(
        changed(**XL, model__dropout=0.1, model__attention_dropout=0.2, model__pre_norm=True)
    )
    assert (geometry.dropout, geometry.embedding_dropout, geometry.attention_dropout) == (
        0.1,
        0.1,
        0.2,
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model__integration": "ff_attention"},
            r"model.integration: expected one of \('joint', 'split'.*",
        ),
        (
            {**TRANSFORMER, "model__integration": "split"},
            "model.integration: .* with transformer and split, found",
        ),
        (
            {**XL, "model__integration": "single_head"},
            "model.integration: .* with transformer_xl and single_head",
        ),
        (
            {**TRANSFORMER, "model__persistent_gain": "gain"},
            "model.persistent_gain: expected '' with model.persistent 0 with transformer and joint",
        ),
        (
            {"model__persistent_gain": "norm"},
            "model.persistent_gain: expected '' or gain with all_attention and joint, found 'norm'",
        ),
        (
            {"model__integration": "single_head", "model__persistent_heads": 1},
            "model.persistent_heads: expected 0 with all_attention and single_head, found 1",
        ),
        (
            {"model__integration": "pattention"},
            "model.span.adaptive: expected False with all_attention and pattention, found True",
        ),
        (
            {**TRANSFORMER, "model__feed_forward": 0},
            "model.feed_forward: expected at least 1 with transformer",
        ),
        (
            {**XL, "model__persistent": 3},
            "model.persistent: expected 0 with transformer_xl and joint, found 3",
        ),
        (
            {"model__persistent": 0, "model__integration": "split"},
            "model.persistent: expected at least 1 with all_att",
        ),
        (
            {"model__heads": 1, "model__integration": "head_split"},
            "model.heads: expected an even number .* found 1",
        ),
        (
            {**XL, "model__width": 9, "model__heads": 3},
            "model.width: expected an even number .* found 9",
        ),
        (
            {**XL, "model__span__adaptive": True},
            "model.span.adaptive: expected False with transformer_xl",
        ),
        (
            {**XL, "model__embedding_dropout": 0.1},
            "model.embedding_dropout: expected 0, as model.dropout acts",
        ),
        (
            {"model__attention_dropout": 0.1},
            "model.attention_dropout: expected 0 with all_attention",
        ),
        (
            {"evaluate__protocol": "xl"},
            "evaluate.protocol xl: expected model.layer transformer_xl, found all_",
        ),
    ],
)
def test_combinations_that_do_not(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        start(changed(**changes))


def test_values_as_python_has_them() -> None:
    """The Python API takes numbers, truth values and tuples beside their texts."""
    values = {
        "train.steps": 300,
        "model.adaptive_io.cutoffs": (20, 40),
        "model.span.adaptive": False,
    }
    found = configuration.load("base", values)
    assert (found.train.steps, found.model.span.adaptive) == (300, False)
    assert found.model.adaptive_io.cutoffs == (20, 40)
