"""Geometry of the network: what layers need to know of an experiment's configuration."""

import dataclasses

import ml_collections

from allattn.config_checks import check_model


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
    # Norms, and what else keeps a deep stack stable.
    pre_norm: bool = False
    qk_norm: bool = False
    residual_scalars: bool = False
    output_scale: float = 1.0
    output_gate: bool = False
    # Transformer-XL in evaluation: every query sees `limit` distances, wherever in the block it
    # is, and distances beyond `clamp` look like it (0: none does).
    same_length: bool = False
    clamp: int = 0
    # Whether persistent pairs have learned offsets, and the share of the weight that these give
    # them at the start; 0: the offsets start at 0.
    persistent_bias: bool = False
    persistent_share: float = 0.0
    # Of the papers' normaliser; 0: weights add up to 1.
    epsilon: float = 0.0
    # What multiplies or normalises what is read from pairs ("": nothing), and 1 where they are as
    # wide as the model.
    persistent_gain: str = ""
    persistent_heads: int = 0
    # Pairs of every head whose key and value are 0, so that only their offset is learned.
    sinks: int = 0

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
            persistent_bias=model.persistent_bias,
            persistent_share=model.persistent_share,
            persistent_gain=model.persistent_gain,
            persistent_heads=model.persistent_heads,
            sinks=model.sinks,
            qk_norm=model.qk_norm,
            residual_scalars=model.residual_scalars,
            output_scale=model.output_scale,
            output_gate=model.output_gate,
            epsilon=model.span.epsilon,
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
    def wide_pairs(self) -> bool:
        """Whether persistent pairs are as wide as the model."""
        return self.integration in ("single_head", "pattention") or self.persistent_heads == 1

    @property
    def pair_width(self) -> int:
        """Features of a persistent key, as its logit has them."""
        if self.wide_pairs:
            return self.width
        return self.head_width

    @property
    def stored_heads(self) -> int:
        """Number of heads by which persistent pairs are stored: those that attend to them."""
        if self.integration == "head_split":
            return self.heads - self.context_heads
        return self.heads

    @property
    def pair_heads(self) -> int:
        """Number of heads whose softmax has persistent pairs."""
        if self.wide_pairs:
            return 1
        return self.stored_heads

    @property
    def drops(self) -> bool:
        """Whether training drops anything."""
        return max(self.dropout, self.embedding_dropout, self.attention_dropout) > 0
