"""Every rule that a configuration must obey: one row per field, and the rules on several fields.

To add a field:
1. configs/base.py: its default, and what it means.
2. `FIELDS` below: a row, at the same place, one of `model` with `later=True`, since there are
   workdirs without it. If only some combinations with other fields can run, also a rule in one of
   the lists of rules.
3. The code that uses it; a field of `model` also enters `ModelConfig` in model/config.py.
tests/test_config_checks.py compares the rows with base.py, and breaks every rule once.

Nothing here imports JAX, so that a mistake is refused at once. The names of layers, integrations
and implementations are therefore written here too; the same tests compare them with the packages
that define them.
"""

import dataclasses
import operator
from collections.abc import Callable, Sequence
from itertools import pairwise

import ml_collections

from allattn.errors import UserError

# --- names


# model.layer, and the values of model.integration that each kind of layer has.
INTEGRATIONS = {
    "all_attention": ("joint", "split", "head_split", "single_head", "sublayer", "pattention"),
    "transformer": ("joint", "ff_attention"),
    "transformer_xl": ("joint",),
}
# Integrations whose persistent pairs are not in the softmax of the context.
APART = ("split", "head_split", "single_head", "sublayer", "pattention")
# Of these, the ones whose pairs may be as wide as the model by model.persistent_heads.
WIDENED = ("split", "sublayer")
# model.dtype
DTYPES = ("float32", "bfloat16", "float64")
# model.implementation; "" is the best for the device.
IMPLEMENTATIONS = ("", "reference", "xla", "pallas_tpu", "pallas_gpu")
# train.remat; "" recomputes nothing, on a TPU the projections (`train.recomputation`).
REMAT = ("", "projections", "layer")


# --- one field


@dataclasses.dataclass(frozen=True)
class Field:
    """What is known of one field without looking at the others."""

    # Smallest value, and a bound that the value stays below; None: no bound.
    least: float | None = None
    below: float | None = None
    # May differ between the run that made a workdir and one that resumes in it. Such a field does
    # not change what an update computes. train.steps is the exception: the cosine schedule and
    # the cooldown depend on it, and a run may nevertheless be lengthened.
    may_change: bool = False
    # Parameters of a run with another value do not fit: their shapes differ, or (model.pre_norm)
    # they stand for something else. Then train.init_from cannot start from that run.
    shapes: bool = False
    # Of a model: newer than the first stored configurations, which mean its default without it.
    later: bool = False


# Random keys are made of 32 bits: seeds that differ by this would draw the same numbers.
SEEDS = 2**32

FIELDS = {
    "seed": Field(least=0, below=SEEDS),
    # Data
    "dataset.name": Field(),
    "dataset.data_dir": Field(may_change=True),
    "dataset.unit": Field(),
    "dataset.numbering": Field(),
    "dataset.min_count": Field(least=0),
    "dataset.vocab_size": Field(least=256),
    # Layers
    "model.layer": Field(shapes=True),
    "model.integration": Field(shapes=True),
    "model.depth": Field(least=1, shapes=True),
    "model.width": Field(least=1, shapes=True),
    "model.heads": Field(least=1, shapes=True),
    "model.persistent": Field(least=0, shapes=True),
    "model.persistent_bias": Field(shapes=True, later=True),
    "model.persistent_share": Field(least=0, below=1, later=True),
    "model.persistent_gain": Field(shapes=True, later=True),
    "model.persistent_heads": Field(least=0, below=2, shapes=True, later=True),
    "model.sinks": Field(least=0, shapes=True, later=True),
    "model.feed_forward": Field(least=0, shapes=True),
    "model.pre_norm": Field(shapes=True),
    "model.qk_norm": Field(shapes=True, later=True),
    "model.residual_scalars": Field(shapes=True, later=True),
    "model.output_scale": Field(least=0, later=True),
    "model.output_gate": Field(shapes=True, later=True),
    "model.vocab_size": Field(least=1, shapes=True),
    "model.dropout": Field(least=0, below=1),
    "model.attention_dropout": Field(least=0, below=1),
    "model.embedding_dropout": Field(least=0, below=1),
    "model.dtype": Field(),
    "model.implementation": Field(may_change=True),
    # Adaptive span
    "model.span.limit": Field(least=1, shapes=True),
    "model.span.adaptive": Field(shapes=True),
    "model.span.ramp": Field(least=1),
    "model.span.init": Field(least=0),
    "model.span.epsilon": Field(least=0, later=True),
    "model.span.loss": Field(),
    "model.span.check_every": Field(least=1),
    "model.span.margin": Field(least=0),
    # Adaptive input and softmax
    "model.adaptive_io.cutoffs": Field(shapes=True),
    "model.adaptive_io.division": Field(least=1, shapes=True),
    "model.adaptive_io.tied": Field(shapes=True),
    # Update rule
    "optimizer.name": Field(),
    "optimizer.learning_rate": Field(least=0),
    "optimizer.adam_rate": Field(least=0),
    "optimizer.pairs_rate": Field(least=0),
    "optimizer.span_rate": Field(least=0),
    "optimizer.warmup": Field(least=0),
    "optimizer.schedule": Field(),
    "optimizer.cooldown": Field(least=0),
    "optimizer.clip": Field(least=0),
    "optimizer.weight_decay": Field(least=0),
    # Training; accumulation and remat save memory and leave the update as it is.
    "train.batch": Field(least=1),
    "train.block": Field(least=1),
    "train.accumulation": Field(least=1, may_change=True),
    "train.remat": Field(may_change=True),
    "train.init_from": Field(may_change=True),  # without effect once there is a checkpoint
    "train.grown_share": Field(least=0, below=1, may_change=True),  # nor has this
    "train.steps": Field(least=0, may_change=True),
    "train.finetune_steps": Field(least=0, may_change=True),
    "train.restore_on_spike": Field(least=0, may_change=True),
    "train.log_every": Field(least=1, may_change=True),
    "train.profile": Field(least=0, may_change=True),
    "train.peak_flops": Field(least=0, may_change=True),
    # Devices; a run may resume on others.
    "mesh.data": Field(may_change=True),
    "mesh.fsdp": Field(may_change=True),
    "mesh.tensor": Field(may_change=True),
    # What a run leaves behind
    "checkpoint.every": Field(least=1, may_change=True),
    "checkpoint.keep": Field(least=1, may_change=True),
    "evaluate.every": Field(least=1, may_change=True),
    "evaluate.protocol": Field(may_change=True),
    "evaluate.batch": Field(least=1, may_change=True),
    "evaluate.target_length": Field(least=1, may_change=True),
    "evaluate.memory_length": Field(least=1, may_change=True),
    "evaluate.clamp_length": Field(least=0, may_change=True),
    "evaluate.max_tokens": Field(least=0, may_change=True),
}

# Names of the fields that may change when a run resumes.
MAY_CHANGE_ON_RESUMING = tuple(name for name, field in FIELDS.items() if field.may_change)

# Names within config.model of the fields that may differ from the run that train.init_from names.
MAY_CHANGE_ON_WARM_START = tuple(
    name.removeprefix("model.")
    for name, field in FIELDS.items()
    if name.startswith("model.") and not field.shapes
)


# --- rules on several fields


@dataclasses.dataclass(frozen=True)
class Rule:
    """One rule on the whole configuration, and what it says where it is broken."""

    # The rule in a few words.
    name: str
    # Dotted name of the field that the message asks to change.
    field: str
    # Whether a configuration obeys.
    holds: Callable[[ml_collections.ConfigDict], bool]
    # What the message expects, as text or from the configuration.
    expected: str | Callable[[ml_collections.ConfigDict], str]
    # Why, for the message; begins with "so that".
    reason: str = ""


# Names and sizes of the model, whatever its kind of layer.
MODEL_RULES = (
    Rule(
        name="a layer that exists",
        field="model.layer",
        holds=lambda c: c.model.layer in INTEGRATIONS,
        expected=f"one of {tuple(INTEGRATIONS)}",
    ),
    Rule(
        name="a dtype that the model has",
        field="model.dtype",
        holds=lambda c: c.model.dtype in DTYPES,
        expected=f"one of {DTYPES}",
    ),
    Rule(
        name="an implementation that exists",
        field="model.implementation",
        holds=lambda c: c.model.implementation in IMPLEMENTATIONS,
        expected=f"one of {IMPLEMENTATIONS}",
    ),
    Rule(
        name="heads of equal width",
        field="model.heads",
        holds=lambda c: c.model.width % c.model.heads == 0,
        expected=lambda c: f"a divisor of model.width {c.model.width}",
    ),
    Rule(
        name="an initial span within the limit",
        field="model.span.init",
        holds=lambda c: c.model.span.init <= 1,
        expected="a number in [0, 1]",
    ),
    Rule(
        name="a normaliser of soft spans",
        field="model.span.epsilon",
        holds=lambda c: not c.model.span.epsilon or c.model.span.adaptive,
        expected="0 with model.span.adaptive False",
    ),
    Rule(
        name="an implementation with the papers' normaliser",
        field="model.implementation",
        holds=lambda c: (
            not c.model.span.epsilon or c.model.implementation in ("", "reference", "xla")
        ),
        expected=lambda c: f"reference or xla with model.span.epsilon {c.model.span.epsilon}",
    ),
)

# Clusters of the adaptive input and softmax: cutoffs cut the vocabulary, and each cluster's
# vectors are narrower than those of the one before by the factor `division`.
CLUSTER_RULES = (
    Rule(
        name="cutoffs that cut the vocabulary",
        field="model.adaptive_io.cutoffs",
        holds=lambda c: _increases((0, *c.model.adaptive_io.cutoffs, c.model.vocab_size)),
        expected=lambda c: (
            f"increasing whole numbers between 0 and model.vocab_size {c.model.vocab_size}"
        ),
    ),
    Rule(
        name="a last cluster that has a width",
        field="model.adaptive_io.division",
        holds=lambda c: (
            c.model.adaptive_io.division ** len(c.model.adaptive_io.cutoffs) <= c.model.width
        ),
        expected=lambda c: (
            f"a number whose power {len(c.model.adaptive_io.cutoffs)} is at most "
            f"model.width {c.model.width}"
        ),
    ),
)

# What each kind of layer and each integration requires of the other fields. The messages end with
# the names of both.
LAYER_RULES = (
    Rule(
        name="an integration that the layer has",
        field="model.integration",
        holds=lambda c: c.model.integration in INTEGRATIONS[c.model.layer],
        expected=lambda c: f"one of {INTEGRATIONS[c.model.layer]}",
    ),
    # Persistent pairs replace the feed-forward sublayer; all-attention may have it beside them.
    Rule(
        name="feed-forward units in transformers",
        field="model.feed_forward",
        holds=lambda c: not _has_feed_forward(c) or c.model.feed_forward > 0,
        expected="at least 1",
    ),
    Rule(
        name="no persistent pairs in transformers",
        field="model.persistent",
        holds=lambda c: not _has_feed_forward(c) or c.model.persistent == 0,
        expected="0",
    ),
    Rule(
        name="persistent pairs for a softmax of their own",
        field="model.persistent",
        holds=lambda c: c.model.integration not in APART or c.model.persistent > 0,
        expected="at least 1",
    ),
    Rule(
        name="a gain that exists",
        field="model.persistent_gain",
        holds=lambda c: c.model.persistent_gain in ("", "gain", "norm"),
        expected="'', gain or norm",
    ),
    Rule(
        name="a gain of pairs that there are",
        field="model.persistent_gain",
        holds=lambda c: not c.model.persistent_gain or c.model.persistent > 0,
        expected=lambda c: f"'' with model.persistent {c.model.persistent}",
    ),
    # What is read from pairs can be normalised where it is not summed with the context's part.
    Rule(
        name="a norm of pairs that are apart",
        field="model.persistent_gain",
        holds=lambda c: c.model.persistent_gain != "norm" or c.model.integration in APART,
        expected="'' or gain",
    ),
    Rule(
        name="wide pairs in a softmax of their own",
        field="model.persistent_heads",
        holds=lambda c: not c.model.persistent_heads or c.model.integration in WIDENED,
        expected="0",
    ),
    # TokenFormer's layer, in which all tokens are seen and logits have no offset.
    Rule(
        name="no adaptive span beside pattention",
        field="model.span.adaptive",
        holds=lambda c: not (_is_pattention(c) and c.model.span.adaptive),
        expected="False",
    ),
    Rule(
        name="no offsets in pattention",
        field="model.persistent_bias",
        holds=lambda c: not (_is_pattention(c) and c.model.persistent_bias),
        expected="False",
    ),
    # What offsets say of the shares of two parts needs one softmax over both.
    Rule(
        name="offsets of pairs that there are",
        field="model.persistent_bias",
        holds=lambda c: not c.model.persistent_bias or c.model.persistent > 0,
        expected=lambda c: f"False with model.persistent {c.model.persistent}",
    ),
    Rule(
        name="a share that offsets make",
        field="model.persistent_share",
        holds=lambda c: not c.model.persistent_share or c.model.persistent_bias,
        expected="0 with model.persistent_bias False",
    ),
    Rule(
        name="a share of one softmax",
        field="model.persistent_share",
        holds=lambda c: not c.model.persistent_share or c.model.integration not in APART,
        expected="0",
    ),
    # One half of the heads attends to the context, the other to the persistent pairs.
    Rule(
        name="heads that can be halved",
        field="model.heads",
        holds=lambda c: c.model.integration != "head_split" or c.model.heads % 2 == 0,
        expected="an even number",
    ),
    # Sines fill one half of a position's encoding, cosines the other.
    Rule(
        name="a width that can be halved",
        field="model.width",
        holds=lambda c: not _is_transformer_xl(c) or c.model.width % 2 == 0,
        expected="an even number",
    ),
    # Transformer-XL has a memory of fixed length, one dropout rate for everything except the
    # attention weights, and the same vectors for input and output.
    Rule(
        name="no adaptive span in Transformer-XL",
        field="model.span.adaptive",
        holds=lambda c: not (_is_transformer_xl(c) and c.model.span.adaptive),
        expected="False",
    ),
    Rule(
        name="one dropout rate in Transformer-XL",
        field="model.embedding_dropout",
        holds=lambda c: not (_is_transformer_xl(c) and c.model.embedding_dropout),
        expected="0, as model.dropout acts there too,",
    ),
    Rule(
        name="a rate for attention weights in Transformer-XL only",
        field="model.attention_dropout",
        holds=lambda c: _is_transformer_xl(c) or not c.model.attention_dropout,
        expected="0",
    ),
    Rule(
        name="tied input and output in Transformer-XL",
        field="model.adaptive_io.tied",
        holds=lambda c: not _is_transformer_xl(c) or c.model.adaptive_io.tied,
        expected="True",
    ),
)

# Names that train/optim.py knows, and fields that only some of them or some models have.
OPTIMIZER_RULES = (
    Rule(
        name="a schedule that exists",
        field="optimizer.schedule",
        holds=lambda c: c.optimizer.schedule in ("constant", "cosine"),
        expected="constant or cosine",
    ),
    Rule(
        name="an update rule that exists",
        field="optimizer.name",
        holds=lambda c: c.optimizer.name in ("adagrad", "adam", "adamw", "muon"),
        expected="adagrad, adam, adamw or muon",
    ),
    Rule(
        name="weight decay in adamw and muon only",
        field="optimizer.weight_decay",
        holds=lambda c: c.optimizer.name in ("adamw", "muon") or not c.optimizer.weight_decay,
        expected=lambda c: f"0 with optimizer.name {c.optimizer.name}",
    ),
    Rule(
        name="a second rate in muon only",
        field="optimizer.adam_rate",
        holds=lambda c: c.optimizer.name == "muon" or not c.optimizer.adam_rate,
        expected=lambda c: f"0 with optimizer.name {c.optimizer.name}",
    ),
    Rule(
        name="a cooldown within the run",
        field="optimizer.cooldown",
        holds=lambda c: c.optimizer.cooldown <= 1,
        expected="a number in [0, 1]",
    ),
    Rule(
        name="one fall of the rate",
        field="optimizer.cooldown",
        holds=lambda c: c.optimizer.schedule == "constant" or not c.optimizer.cooldown,
        expected=lambda c: f"0 with optimizer.schedule {c.optimizer.schedule}",
    ),
    Rule(
        name="a rate of pairs where there are some",
        field="optimizer.pairs_rate",
        holds=lambda c: c.model.persistent > 0 or c.optimizer.pairs_rate == 1,
        expected="1 with model.persistent 0",
    ),
    Rule(
        name="a rate of spans that are learned",
        field="optimizer.span_rate",
        holds=lambda c: c.model.span.adaptive or c.optimizer.span_rate == 1,
        expected="1 with model.span.adaptive False",
    ),
)

# How a run trains, apart from its optimizer. A rule on the model that stands here is asked of new
# runs alone: a stored model that breaks it can still be evaluated.
TRAINING_RULES = (
    Rule(
        name="a choice of recomputation that exists",
        field="train.remat",
        holds=lambda c: c.train.remat in REMAT,
        expected=f"one of {REMAT}",
    ),
    Rule(
        name="a ramp within the limit",
        field="model.span.ramp",
        holds=lambda c: not c.model.span.adaptive or c.model.span.ramp <= c.model.span.limit,
        expected=lambda c: f"at most model.span.limit {c.model.span.limit}",
    ),
    Rule(
        name="a start for a share of pairs",
        field="train.grown_share",
        holds=lambda c: not c.train.grown_share or bool(c.train.init_from),
        expected="0 without train.init_from",
    ),
    Rule(
        name="offsets for a share of pairs",
        field="train.grown_share",
        holds=lambda c: not c.train.grown_share or c.model.persistent_bias,
        expected="0 with model.persistent_bias False",
    ),
    # The papers' normaliser depends on the largest span of a layer.
    Rule(
        name="all heads on a device for the papers' normaliser",
        field="mesh.tensor",
        holds=lambda c: not c.model.span.epsilon or c.mesh.tensor == 1,
        expected=lambda c: f"1 with model.span.epsilon {c.model.span.epsilon}",
    ),
    # The cache gains one block per step: after this many even the longest one holds only real
    # states, and the context may grow.
    Rule(
        name="time to fill the cache between choices of the context length",
        field="model.span.check_every",
        holds=lambda c: (
            not c.model.span.adaptive or c.model.span.check_every >= _steps_to_fill_cache(c)
        ),
        expected=lambda c: f"at least span.limit / train.block = {_steps_to_fill_cache(c)} steps",
        reason="so that a grown context holds real states",
    ),
)

RULES = (*MODEL_RULES, *CLUSTER_RULES, *LAYER_RULES, *OPTIMIZER_RULES, *TRAINING_RULES)


def _has_feed_forward(config: ml_collections.ConfigDict) -> bool:
    return config.model.layer != "all_attention"


def _is_pattention(config: ml_collections.ConfigDict) -> bool:
    return config.model.integration == "pattention"


def _is_transformer_xl(config: ml_collections.ConfigDict) -> bool:
    return config.model.layer == "transformer_xl"


def _increases(numbers: Sequence[int]) -> bool:
    """Whether all but the first are whole numbers that are greater than the one before."""
    return all(isinstance(high, int) and low < high for low, high in pairwise(numbers))


def _steps_to_fill_cache(config: ml_collections.ConfigDict) -> int:
    """model.span.limit / train.block, rounded up."""
    return -(-config.model.span.limit // config.train.block)


# --- the checks


def check_ranges(config: ml_collections.ConfigDict, prefix: str = "") -> None:
    """Refuse numbers out of range.

    Args:
      config: the whole configuration.
      prefix: what the names of the fields to check begin with.

    Raises:
      UserError: names the field, the bound and the value.
    """
    for name, field in FIELDS.items():
        if not name.startswith(prefix):
            continue
        value = operator.attrgetter(name)(config)
        # `not >=` instead of `<`: a bound refuses what is not a number, too.
        if field.least is not None and not value >= field.least:
            raise UserError(f"{name}: expected at least {field.least}, found {value}")
        if field.below is not None and not value < field.below:
            raise UserError(f"{name}: expected less than {field.below}, found {value}")


def check_model(config: ml_collections.ConfigDict) -> None:
    """Refuse a model that this version does not have.

    Args:
      config: the whole configuration; only its section `model` is read.

    Raises:
      UserError: names the field, what it must be and the value.
    """
    check_ranges(config, "model.")
    _check_rules(config, MODEL_RULES)
    check_clusters(config)
    model = config.model
    _check_rules(config, LAYER_RULES, f" with {model.layer} and {model.integration}")


def check_clusters(config: ml_collections.ConfigDict) -> None:
    """Refuse cutoffs that do not cut the vocabulary, and a last cluster without width.

    Raises:
      UserError: names the field, what it must fit and the value.
    """
    _check_rules(config, CLUSTER_RULES)


def check_optimizer(config: ml_collections.ConfigDict) -> None:
    """Refuse an unknown schedule or update rule.

    Raises:
      UserError: names the field, the choices and the value.
    """
    _check_rules(config, OPTIMIZER_RULES)


def check_training(config: ml_collections.ConfigDict) -> None:
    """Refuse a run that cannot start, as far as that shows without data and devices.

    Args:
      config: the whole configuration, with the size of the vocabulary. The model is checked where
        it is made (`check_model`), the protocol of evaluation by `evaluation`.

    Raises:
      UserError: names the field, what it must be and the value.
    """
    check_ranges(config)
    check_optimizer(config)
    _check_rules(config, TRAINING_RULES)


def check_experiment(config: ml_collections.ConfigDict) -> None:
    """Refuse an experiment file whose model or run would be refused.

    Args:
      config: the whole configuration; its vocabulary may have the size 0, which the data set.

    Raises:
      UserError: names the field, what it must be and the value.
    """
    config = config.copy_and_resolve_references()
    # Until the data say how large it is, any vocabulary large enough for the cutoffs will do.
    if config.model.vocab_size == 0:
        config.model.vocab_size = max((0, *config.model.adaptive_io.cutoffs)) + 1
    check_training(config)
    check_model(config)


def _check_rules(
    config: ml_collections.ConfigDict, rules: Sequence[Rule], combination: str = ""
) -> None:
    """Raise the message of the first rule that is broken; `combination` follows what it expects."""
    for rule in rules:
        if rule.holds(config):
            continue
        expected = rule.expected if isinstance(rule.expected, str) else rule.expected(config)
        reason = f", {rule.reason};" if rule.reason else ","
        value = operator.attrgetter(rule.field)(config)
        raise UserError(f"{rule.field}: expected {expected}{combination}{reason} found {value!r}")
