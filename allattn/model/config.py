"""Geometry of the network: what layers need to know of an experiment's configuration."""

import dataclasses
import operator

import ml_collections

from allattn.attention import IMPLEMENTATIONS
from allattn.config import check_clusters, check_ranges
from allattn.errors import UserError

# Of activations and products; parameters are float32.
DTYPES = ("float32", "bfloat16", "float64")
# The kinds of layers, and the values of model.integration that each of them has.
INTEGRATIONS = {
    "all_attention": ("joint", "split", "head_split", "single_head"),
    "transformer": ("joint", "ff_attention"),
    "transformer_xl": ("joint",),
}
# Integrations whose context and persistent pairs have a softmax each.
TWO_SOFTMAX_INTEGRATIONS = ("split", "head_split", "single_head")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Geometry of the network: fields of `config.model`, which configs/base.py explains in full."""

    # Size of the stack, in layers and features, and the persistent pairs of a head (N).
    depth: int
    width: int
    heads: int
    persistent: int
    vocab_size: int
    # Rates of dropout: on attention weights and inner units, and on embedding and final state.
    dropout: float
    embedding_dropout: float
    dtype: str
    # Adaptive span: the farthest distance (L), whether spans are learned, the ramp (R) and the
    # initial span as a fraction of L.
    limit: int
    adaptive: bool
    ramp: int
    init: float
    # Of the attention operation; None: the best for the device.
    implementation: str | None = None
    # Adaptive input and softmax; without cutoffs both are plain.
    cutoffs: tuple[int, ...] = ()
    division: int = 1
    tied: bool = True
    # What a layer is.
    layer: str = "all_attention"
    integration: str = "joint"
    feed_forward: int = 0
    attention_dropout: float = 0.0
    pre_norm: bool = False
    # Transformer-XL in evaluation: every query sees `limit` distances, wherever in the block it
    # is, and distances beyond `clamp` look like it (0: none does).
    same_length: bool = False
    clamp: int = 0

    @classmethod
    def from_config(cls, config: ml_collections.ConfigDict) -> "ModelConfig":
        """Read and check `config.model`.

        Args:
          config: the whole configuration; only its section `model` is read.

        Raises:
          UserError: a field is out of range, or names a model that this version does not have.
        """
        check_model(config)
        model = config.model
        # Transformer-XL has one rate for the embedding, the positions and the final state as well.
        embedding_dropout = model.embedding_dropout
        if model.layer == "transformer_xl":
            embedding_dropout = model.dropout
        return cls(
            depth=model.depth,
            width=model.width,
            heads=model.heads,
            persistent=model.persistent,
            vocab_size=model.vocab_size,
            dropout=model.dropout,
            embedding_dropout=embedding_dropout,
            dtype=model.dtype,
            limit=model.span.limit,
            adaptive=model.span.adaptive,
            ramp=model.span.ramp,
            init=model.span.init,
            implementation=model.implementation or None,
            cutoffs=model.adaptive_io.cutoffs,
            division=model.adaptive_io.division,
            tied=model.adaptive_io.tied,
            layer=model.layer,
            integration=model.integration,
            feed_forward=model.feed_forward,
            attention_dropout=model.attention_dropout,
            pre_norm=model.pre_norm,
        )

    @property
    def head_width(self) -> int:
        """Features of one head (K)."""
        return self.width // self.heads

    @property
    def context_heads(self) -> int:
        """Number of heads that attend to the context."""
        if self.integration == "head_split":
            return self.heads // 2
        return self.heads

    @property
    def drops(self) -> bool:
        """Whether training drops anything."""
        return max(self.dropout, self.embedding_dropout, self.attention_dropout) > 0


def check_model(config: ml_collections.ConfigDict) -> None:
    """Refuse a model that this version does not have.

    Args:
      config: the whole configuration; only its section `model` is read.

    Raises:
      UserError: names the field, what it must be and the value.
    """
    model = config.model
    check_ranges(config, "model.")

    # Fields whose values are names.
    choices = {
        "layer": tuple(INTEGRATIONS),
        "dtype": DTYPES,
        "implementation": ("", *IMPLEMENTATIONS),
    }
    for name, known in choices.items():
        if model[name] not in known:
            raise UserError(f"model.{name}: expected one of {known}, found {model[name]!r}")

    # Numbers that must fit others.
    if model.width % model.heads:
        raise UserError(
            f"model.heads: expected a divisor of model.width {model.width}, found {model.heads}"
        )
    if model.span.init > 1:
        raise UserError(f"model.span.init: expected a number in [0, 1], found {model.span.init}")
    check_clusters(config)

    # What the layer and the integration require: (field, whether it holds, what is expected).
    known = INTEGRATIONS[model.layer]
    has_feed_forward = model.layer != "all_attention"
    relative = model.layer == "transformer_xl"
    two_softmaxes = model.integration in TWO_SOFTMAX_INTEGRATIONS
    expected_units = "at least 1" if has_feed_forward else "0"
    rules = (
        ("integration", model.integration in known, f"one of {known}"),
        ("feed_forward", (model.feed_forward > 0) == has_feed_forward, expected_units),
        ("persistent", not (has_feed_forward and model.persistent), "0"),
        ("persistent", not two_softmaxes or model.persistent > 0, "at least 1"),
        ("heads", model.integration != "head_split" or model.heads % 2 == 0, "an even number"),
        ("width", not relative or model.width % 2 == 0, "an even number"),
        ("span.adaptive", not (relative and model.span.adaptive), "False"),
        (
            "embedding_dropout",
            not (relative and model.embedding_dropout),
            "0, as model.dropout acts there too,",
        ),
        ("attention_dropout", relative or not model.attention_dropout, "0"),
        ("pre_norm", relative or not model.pre_norm, "False"),
        ("adaptive_io.tied", model.adaptive_io.tied or not relative, "True"),
    )
    for field, holds, expected in rules:
        if not holds:
            value = operator.attrgetter(field)(model)
            raise UserError(
                f"model.{field}: expected {expected} with {model.layer} and "
                f"{model.integration}, found {value!r}"
            )
