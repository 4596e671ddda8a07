"""The table of fields, the rules on several fields, and what experiment files state."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_collections
import pytest

from allattn import attention, config_checks
from allattn import config as configuration
from allattn.errors import UserError
from allattn.model import RECOMPUTED
from allattn.model.network import LAYERS
from configs import base

BASE = Path(base.__file__)

# What a reader wants to know of any experiment.
EXPERIMENT_FIELDS = {
    "dataset.name",
    "model.layer",
    "model.depth",
    "model.width",
    "model.heads",
    "model.persistent",
    "model.vocab_size",
    "model.dropout",
    "model.span.limit",
    "optimizer.name",
    "optimizer.learning_rate",
    "optimizer.warmup",
    "train.batch",
    "train.block",
    "train.steps",
    "train.finetune_steps",
}
EXPERIMENTS = sorted(
    path.stem for path in BASE.parent.glob("*.py") if path.stem not in ("__init__", "base")
)

# By the name of each rule, changes to configs/base.py that break it and no rule before it.
XL = {
    "model.layer": "transformer_xl",
    "model.persistent": 0,
    "model.feed_forward": 8,
    "model.span.adaptive": False,
}
BROKEN = {
    "a layer that exists": {"model.layer": "lstm"},
    "a dtype that the model has": {"model.dtype": "int32"},
    "an implementation that exists": {"model.implementation": "fast"},
    "heads of equal width": {"model.heads": 3},
    "an initial span within the limit": {"model.span.init": 1.5},
    "a normaliser of soft spans": {"model.span.epsilon": 1e-8, "model.span.adaptive": False},
    "an implementation with the papers' normaliser": {
        "model.span.epsilon": 1e-8,
        "model.implementation": "pallas_tpu",
    },
    "cutoffs that cut the vocabulary": {"model.adaptive_io.cutoffs": (300,)},
    "a last cluster that has a width": {
        "model.adaptive_io.cutoffs": (100,),
        "model.adaptive_io.division": 513,
    },
    "an integration that the layer has": {"model.integration": "ff_attention"},
    "feed-forward units in transformers": {"model.layer": "transformer", "model.persistent": 0},
    "no persistent pairs in transformers": {"model.layer": "transformer", "model.feed_forward": 8},
    "persistent pairs for a softmax of their own": {
        "model.integration": "split",
        "model.persistent": 0,
    },
    "a gain that exists": {"model.persistent_gain": "both"},
    "a gain of pairs that there are": {"model.persistent_gain": "gain", "model.persistent": 0},
    "a norm of pairs that are apart": {"model.persistent_gain": "norm"},
    "wide pairs in a softmax of their own": {"model.persistent_heads": 1},
    "no adaptive span beside pattention": {"model.integration": "pattention"},
    "no offsets in pattention": {
        "model.integration": "pattention",
        "model.span.adaptive": False,
        "model.persistent_bias": True,
    },
    "offsets of pairs that there are": {"model.persistent_bias": True, "model.persistent": 0},
    "a share that offsets make": {"model.persistent_share": 0.5},
    "a share of one softmax": {
        "model.persistent_share": 0.5,
        "model.persistent_bias": True,
        "model.integration": "split",
    },
    "heads that can be halved": {"model.integration": "head_split", "model.heads": 1},
    "a width that can be halved": {**XL, "model.width": 9, "model.heads": 3},
    "no adaptive span in Transformer-XL": {**XL, "model.span.adaptive": True},
    "one dropout rate in Transformer-XL": {**XL, "model.embedding_dropout": 0.1},
    "a rate for attention weights in Transformer-XL only": {"model.attention_dropout": 0.1},
    "tied input and output in Transformer-XL": {**XL, "model.adaptive_io.tied": False},
    "a schedule that exists": {"optimizer.schedule": "linear"},
    "an update rule that exists": {"optimizer.name": "sgd"},
    "weight decay in adamw and muon only": {"optimizer.weight_decay": 0.1},
    "a second rate in muon only": {"optimizer.adam_rate": 0.1},
    "a cooldown within the run": {"optimizer.cooldown": 1.5},
    "one fall of the rate": {"optimizer.schedule": "cosine", "optimizer.cooldown": 0.5},
    "a rate of pairs where there are some": {
        "model.persistent": 0,
        "optimizer.pairs_rate": 2.0,
    },
    "a rate of spans that are learned": {
        "model.span.adaptive": False,
        "optimizer.span_rate": 0.5,
    },
    "a choice of recomputation that exists": {"train.remat": "all"},
    "a ramp within the limit": {"model.span.limit": 16},
    "a start for a share of pairs": {"train.grown_share": 0.1, "model.persistent_bias": True},
    "offsets for a share of pairs": {"train.grown_share": 0.1, "train.init_from": "runs/x"},
    "all heads on a device for the papers' normaliser": {
        "model.span.epsilon": 1e-8,
        "mesh.tensor": 2,
    },
    "time to fill the cache between choices of the context length": {"model.span.check_every": 15},
}


def changed(changes: dict[str, Any]) -> ml_collections.ConfigDict:
    """The base configuration with other values of some fields, by dotted name."""
    c = base.get_config()
    c.update_from_flattened_dict(changes)
    return c


# --- one row per field


def test_rows_and_comments() -> None:
    """config_checks has the fields of base.py in its order, and base.py says what each means."""
    names = dict(configuration.fields(base.get_config())).keys()
    comments = {n: text for n, text in configuration.field_comments().items() if n in names}
    assert list(config_checks.FIELDS) == list(comments)
    assert comments.keys() == names
    assert all(comments.values())


def test_comments_above_and_behind() -> None:
    comments = configuration.field_comments()
    assert comments["model.depth"] == "layers"
    assert comments["dataset.data_dir"] == (
        "folder or bucket URL of prepared data, or for `files` a text, a file or folder; "
        '"": $ALLATTN_DATA_DIR or ~/.cache/allattn'
    )


def test_names_of_the_packages() -> None:
    """config_checks repeats them, since it stands below the packages and needs no JAX."""
    integrations = {name: kind.INTEGRATIONS for name, kind in LAYERS.items()}
    assert integrations == config_checks.INTEGRATIONS
    assert ("", *attention.IMPLEMENTATIONS) == config_checks.IMPLEMENTATIONS
    assert ("", *RECOMPUTED) == config_checks.REMAT


def test_no_jax() -> None:
    """A configuration is read and checked without it, and so at once."""
    program = (
        "import sys; from allattn import config, config_checks; "
        "config_checks.check_experiment(config.load(sys.argv[1])); print('jax' in sys.modules)"
    )
    words = [sys.executable, "-c", program, str(BASE)]
    done = subprocess.run(words, cwd=BASE.parents[1], capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n", done.stderr


# --- rules on several fields


def test_every_rule_has_a_case() -> None:
    assert list(BROKEN) == [rule.name for rule in config_checks.RULES]


@pytest.mark.parametrize("rule", config_checks.RULES, ids=lambda rule: rule.name)
def test_broken_rule(rule: config_checks.Rule) -> None:
    """It refuses its case by a message on its field; configs/base.py obeys it."""
    changes = BROKEN[rule.name]
    assert rule.holds(base.get_config())
    assert not rule.holds(changed(changes))
    with pytest.raises(UserError, match=f"^{rule.field}: expected .* found "):
        config_checks.check_experiment(changed(changes))


def test_reason_in_the_message() -> None:
    expected = "at least span.limit / train.block = 16 steps"
    message = f"{expected}, so that a grown context holds real states; found 15"
    with pytest.raises(UserError, match=f"^model.span.check_every: expected {message}$"):
        config_checks.check_training(changed({"model.span.check_every": 15}))


@pytest.mark.parametrize("seed", [-1, 2**32, 2**80])
def test_seeds(seed: int) -> None:
    """Every whole number of 32 bits; seeds 2^32 apart would be the same seed."""
    config_checks.check_training(changed({"seed": 0}))
    config_checks.check_training(changed({"seed": 2**32 - 1}))
    with pytest.raises(UserError, match=f"^seed: expected .* found {seed}$"):
        config_checks.check_training(changed({"seed": seed}))


def test_stored_models_that_break_a_new_rule() -> None:
    """They are not trained further, but they are evaluated."""
    stored = changed({"model.span.limit": 16})
    config_checks.check_model(stored)
    with pytest.raises(UserError, match="^model.span.ramp: expected at most model.span.limit 16"):
        config_checks.check_training(stored)


def test_vocabulary_of_the_data() -> None:
    """An experiment file may leave its size open; a training run may not."""
    c = changed({"model.vocab_size": 0, "model.adaptive_io.cutoffs": (1, 500)})
    config_checks.check_experiment(c)
    assert c.model.vocab_size == 0
    with pytest.raises(UserError, match="^model.vocab_size: expected at least 1, found 0"):
        config_checks.check_training(c)


# --- experiment files


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_file(name: str) -> None:
    """It states the fields that make the model and its training, in the order of base.py."""
    file = BASE.parent / f"{name}.py"
    stated = re.findall(r"^    c\.(.*) = ", file.read_text(), re.MULTILINE)
    assert set(stated) >= EXPERIMENT_FIELDS
    assert stated == [field for field in config_checks.FIELDS if field in stated]
    config_checks.check_experiment(configuration.load(str(file)))


def test_description() -> None:
    """One line per field in the order of base.py, and a mark where a value differs from it."""
    c = configuration.load(str(BASE), {"model.depth": "2", "dataset.data_dir": "# no comment"})
    lines = configuration.describe(c).splitlines()
    assert [line[2:].split(" = ")[0] for line in lines] == list(config_checks.FIELDS)
    marked = [line for line in lines if line.startswith("*")]
    assert len(marked) == 2
    data_dir = marked[0]
    depth = marked[1]
    assert data_dir.startswith("* dataset.data_dir = '# no comment'  # folder")
    assert re.fullmatch(r"\* model\.depth = 2 +  # layers", depth)
    assert depth.index("#") == data_dir.index("# folder")
