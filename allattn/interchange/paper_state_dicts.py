"""The state dicts of the papers' own code: the name and the axes of each of their tensors.

A table is a list of entries, one for each of our tensors and, where ours is stacked over layers,
each layer of it. Read a row such as

    table.add("layers/persistent_key", "layers.3.attn.attn.persistent_memory.key", swap, swap, 3)

as: layer 3 of our `layers/persistent_key` is their tensor of that name with two axes exchanged,
`swap(theirs)` in our axes and `swap(ours)` in theirs. One of theirs is one of ours, or several
stacked by rows (`rows` says which). The linear maps of their code (`nn.Linear`) are stored as (out,
in), ours as (in, out).

Besides the parameters a state dict stores some of them a second time (`copies`) and arrays that are
no parameters (`constants`). Names are those of the state dicts without the "module." that a
data-parallel wrapper puts before every key.

To add a code base: write its table, its copies and its constants, and enter them in SOURCES. Held
by tests/interchange: recorded state dicts of both code bases come in and go out bit by bit.

Dimension key: X layer, L distance, N persistent pair, H head, K head width, E all heads side by
side, D model width.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from allattn.model import ModelConfig

State = dict[str, np.ndarray]


# Brings a tensor from one arrangement of axes into the other.
Arrange = Callable[[np.ndarray], np.ndarray]


class Entry(NamedTuple):
    """Where one of our tensors, or one layer of it, lies in a state dict of theirs."""

    # Path in our parameters, and which layer of a tensor that is stacked over layers.
    ours: str
    layer: int | None
    # Name of their tensor, and its rows: several of ours may lie in one of theirs.
    theirs: str
    rows: slice
    # From their axes to ours, and from ours to theirs.
    to_ours: Arrange
    to_theirs: Arrange


def _same(x: np.ndarray) -> np.ndarray:
    return x


def _reversed(x: np.ndarray) -> np.ndarray:
    return x[::-1]


def _swapped(x: np.ndarray) -> np.ndarray:
    """The last two axes of a tensor of rank three exchanged."""
    return x.transpose(0, 2, 1)


class _Table:
    """Collects the entries of a configuration."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.entries: list[Entry] = []

    def add(
        self,
        ours: str,
        theirs: str,
        to_ours: Arrange = _same,
        to_theirs: Arrange = _same,
        layer: int | None = None,
        rows: slice = slice(None),
    ) -> None:
        """One entry; its arguments are the fields of `Entry`."""
        self.entries.append(Entry(ours, layer, theirs, rows, to_ours, to_theirs))

    def heads(self, ours: str, theirs: str, layer: int, rows: slice = slice(None)) -> None:
        """A projection to heads: theirs is (E, D), ours (D, H, K)."""
        D = self.config.width
        H = self.config.heads
        K = self.config.head_width

        def to_ours(theirs_ED: np.ndarray) -> np.ndarray:
            return theirs_ED.T.reshape(D, H, K)

        def to_theirs(ours_DHK: np.ndarray) -> np.ndarray:
            return ours_DHK.reshape(D, H * K).T

        self.add(ours, theirs, to_ours, to_theirs, layer, rows)

    def output(self, theirs: str, layer: int) -> None:
        """The projection of all heads: theirs is (D, E), ours (H, K, D)."""
        D = self.config.width
        H = self.config.heads
        K = self.config.head_width

        def to_ours(theirs_DE: np.ndarray) -> np.ndarray:
            return theirs_DE.T.reshape(H, K, D)

        def to_theirs(ours_HKD: np.ndarray) -> np.ndarray:
            return ours_HKD.reshape(H * K, D).T

        self.add("layers/output", theirs, to_ours, to_theirs, layer)

    def norm(self, ours: str, theirs: str, layer: int) -> None:
        """A layer norm; `ours` is the path before its two names."""
        self.add(f"{ours}norm_scale", f"{theirs}.weight", layer=layer)
        self.add(f"{ours}norm_bias", f"{theirs}.bias", layer=layer)

    def linear(self, ours: str, theirs: str, layer: int) -> None:
        """A map with bias: theirs is (out, in), ours (in, out)."""
        self.add(ours, f"{theirs}.weight", np.transpose, np.transpose, layer)
        self.add(f"{ours}_bias", f"{theirs}.bias", layer=layer)

    def spans(self, theirs: str, layer: int) -> None:
        """The spans of a layer's heads: theirs are (H, 1, 1), ours (H,)."""
        H = self.config.heads

        def to_ours(theirs_H11: np.ndarray) -> np.ndarray:
            return theirs_H11.reshape(-1)

        def to_theirs(ours_H: np.ndarray) -> np.ndarray:
            return ours_H.reshape(H, 1, 1)

        self.add("layers/span", theirs, to_ours, to_theirs, layer)

    def positions(self, theirs: str) -> None:
        """Position keys: theirs (1, K, L), the farthest first; ours (L, K), the nearest first."""
        K = self.config.head_width
        L = self.config.limit

        def to_ours(theirs_1KL: np.ndarray) -> np.ndarray:
            return theirs_1KL[0].T[::-1]

        def to_theirs(ours_LK: np.ndarray) -> np.ndarray:
            return ours_LK[::-1].T.reshape(1, K, L)

        self.add("position/table", theirs, to_ours, to_theirs)


# --- the all-attention network and the transformer with adaptive span --------------------------


def adaptive_span(config: ModelConfig) -> list[Entry]:
    """The table for the all-attention network and the transformer with adaptive span."""
    table = _Table(config)
    table.positions("key_pe")
    if config.cutoffs:
        _adaptive_io(table)
    else:
        table.add("io/embedding", "in_emb.weight")
        table.add("io/kernel", "out_emb.weight")
        table.add("io/bias", "out_emb.bias")
    for i in range(config.depth):
        _adaptive_span_layer(table, i)
    return table.entries


def _adaptive_span_layer(table: _Table, i: int) -> None:
    config = table.config
    attention = f"layers.{i}.attn.attn."
    # The four projections.
    table.heads("layers/query", f"layers.{i}.attn.proj_query.weight", i)
    table.heads("layers/key", f"layers.{i}.attn.proj_key.weight", i)
    table.heads("layers/value", f"layers.{i}.attn.proj_val.weight", i)
    table.output(f"layers.{i}.attn.proj_out.weight", i)

    # Persistent pairs, (H, N, K) here; their keys are (H, K, N).
    if config.persistent:
        memory = f"{attention}persistent_memory"
        table.add("layers/persistent_key", f"{memory}.key", _swapped, _swapped, i)
        table.add("layers/persistent_value", f"{memory}.val", layer=i)
    if config.adaptive:
        table.spans(f"{attention}adaptive_span._mask.current_val", i)

    # The norm after attention, and what only the transformer has: a second sublayer.
    table.norm("layers/", f"layers.{i}.norm1", i)
    if config.layer == "transformer":
        table.linear("layers/feed_forward/inner", f"layers.{i}.ff.fc1", i)
        table.linear("layers/feed_forward/outer", f"layers.{i}.ff.fc2", i)
        table.norm("layers/feed_forward/", f"layers.{i}.norm2", i)


def _adaptive_io(table: _Table) -> None:
    """Adaptive input and softmax, cluster by cluster."""
    config = table.config
    # Cluster 0 is the head. Projections exist where clusters have widths of their own.
    for i in range(len(config.cutoffs) + 1):
        table.add(f"io/embedding/{i}", f"in_emb.emb_layers.{i}.weight")
        table.add(f"io/bias/{i}", f"out_emb.out_layers.{i}.bias")
        if config.division > 1:
            table.add(f"io/projection/{i}", f"in_emb.emb_projs.{i}")
        if not config.tied:
            table.add(f"io/kernel/{i}", f"out_emb.out_layers.{i}.weight")
            if config.division > 1:
                table.add(f"io/output_projection/{i}", f"out_emb.out_projs.{i}")
    # The head's logits for whole tails: their rows are in reverse order.
    table.add("io/tail_kernel", "out_emb.cluster_proj.weight", _reversed, _reversed)
    table.add("io/tail_bias", "out_emb.cluster_proj.bias", _reversed, _reversed)


def _adaptive_span_copies(config: ModelConfig) -> dict[str, str]:
    """Tensors that are stored under two names: second name -> name in the table."""
    copies: dict[str, str] = {}
    # Attention to persistent pairs has a reference to the spans.
    if config.persistent and config.adaptive:
        for i in range(config.depth):
            attention = f"layers.{i}.attn.attn."
            span = "adaptive_span._mask.current_val"
            copies[f"{attention}persistent_memory.{span}"] = f"{attention}{span}"
    # A tied output has the tables and projections of the input.
    if config.tied and config.cutoffs:
        for i in range(len(config.cutoffs) + 1):
            copies[f"out_emb.out_layers.{i}.weight"] = f"in_emb.emb_layers.{i}.weight"
            if config.division > 1:
                copies[f"out_emb.out_projs.{i}"] = f"in_emb.emb_projs.{i}"
    return copies


def _adaptive_span_constants(config: ModelConfig) -> State:
    """The mask's distances, stored beside every span: 1 - L for the farthest to 0."""
    constants: State = {}
    if not config.adaptive:
        return constants
    template_L = np.arange(1 - config.limit, 1, dtype=np.float32)
    for i in range(config.depth):
        attention = f"layers.{i}.attn.attn."
        constants[f"{attention}adaptive_span._mask.mask_template"] = template_L
        if config.persistent:
            memory = f"{attention}persistent_memory."
            constants[f"{memory}adaptive_span._mask.mask_template"] = template_L
    return constants


# --- Transformer-XL ----------------------------------------------------------------------------


def transformer_xl(config: ModelConfig) -> list[Entry]:
    """The table for Transformer-XL."""
    table = _Table(config)
    # u and v of the paper, shared by all layers.
    table.add("position/content", "r_w_bias")
    table.add("position/distance", "r_r_bias")
    _transformer_xl_io(table)
    for i in range(config.depth):
        _transformer_xl_layer(table, i)
    return table.entries


def _transformer_xl_layer(table: _Table, i: int) -> None:
    E = table.config.heads * table.config.head_width
    # Attention. Their queries, keys and values are one map, whose rows lie one after another.
    attention = f"layers.{i}.dec_attn."
    table.heads("layers/query", f"{attention}qkv_net.weight", i, slice(0, E))
    table.heads("layers/key", f"{attention}qkv_net.weight", i, slice(E, 2 * E))
    table.heads("layers/value", f"{attention}qkv_net.weight", i, slice(2 * E, 3 * E))
    table.heads("layers/relative", f"{attention}r_net.weight", i)
    table.output(f"{attention}o_net.weight", i)
    table.norm("layers/", f"{attention}layer_norm", i)

    # Feed-forward.
    inner = f"layers.{i}.pos_ff."
    table.linear("layers/feed_forward/inner", f"{inner}CoreNet.0", i)
    table.linear("layers/feed_forward/outer", f"{inner}CoreNet.3", i)
    table.norm("layers/feed_forward/", f"{inner}layer_norm", i)


def _one_table(config: ModelConfig) -> bool:
    """Whether Transformer-XL keeps the vectors of all clusters in one table."""
    return config.division == 1 or not config.cutoffs


def _transformer_xl_io(table: _Table) -> None:
    """Adaptive input and softmax, cluster by cluster."""
    config = table.config
    # First id of each cluster, and the end.
    bounds = (0, *config.cutoffs, config.vocab_size)
    if _one_table(config):
        # Our clusters are stretches of their one table.
        for i, (low, high) in enumerate(pairwise(bounds)):
            rows = slice(low, high)
            table.add(f"io/embedding/{i}", "word_emb.emb_layers.0.weight", rows=rows)
            table.add(f"io/bias/{i}", "crit.out_layers.0.bias", rows=rows)
    else:
        for i in range(len(config.cutoffs) + 1):
            table.add(f"io/embedding/{i}", f"word_emb.emb_layers.{i}.weight")
            table.add(f"io/bias/{i}", f"crit.out_layers.{i}.bias")
            table.add(f"io/projection/{i}", f"word_emb.emb_projs.{i}")
        # The head alone has an output projection of its own; the tails share the input's.
        table.add("io/output_projection/0", "crit.out_projs.0")
    # The head's logits for whole tails: their rows are in reverse order.
    if config.cutoffs:
        table.add("io/tail_kernel", "crit.cluster_weight", _reversed, _reversed)
        table.add("io/tail_bias", "crit.cluster_bias", _reversed, _reversed)


def _transformer_xl_copies(config: ModelConfig) -> dict[str, str]:
    """Tensors that are stored under two names: second name -> name in the table."""
    clusters = 1 if _one_table(config) else len(config.cutoffs) + 1
    copies: dict[str, str] = {}
    for i in range(clusters):
        copies[f"crit.out_layers.{i}.weight"] = f"word_emb.emb_layers.{i}.weight"
        if i > 0:
            copies[f"crit.out_projs.{i}"] = f"word_emb.emb_projs.{i}"
    return copies


def _transformer_xl_constants(config: ModelConfig) -> State:
    """The frequencies of the sinusoids."""
    exponent = np.arange(0, config.width, 2) / config.width
    return {"pos_emb.inv_freq": (10_000.0**-exponent).astype(np.float32)}


# --- both --------------------------------------------------------------------------------------


class Source(NamedTuple):
    """One code base: which of our layers it has, and what its state dicts hold."""

    # Values of model.layer.
    layers: tuple[str, ...]
    # Of every name in a saved state dict.
    prefix: str
    # The table of a configuration.
    entries: Callable[[ModelConfig], list[Entry]]
    # Second name of a tensor -> its name in the table.
    copies: Callable[[ModelConfig], dict[str, str]]
    # Arrays that are no parameters, by name.
    constants: Callable[[ModelConfig], State]
    # What their weights' sum gains where spans are learned (docs/method.md).
    epsilon: float = 0.0


SOURCES = {
    "adaptive-span": Source(
        layers=("all_attention", "transformer"),
        prefix="module.",
        entries=adaptive_span,
        copies=_adaptive_span_copies,
        constants=_adaptive_span_constants,
        epsilon=1e-8,
    ),
    "transformer-xl": Source(
        layers=("transformer_xl",),
        prefix="",
        entries=transformer_xl,
        copies=_transformer_xl_copies,
        constants=_transformer_xl_constants,
    ),
}
