"""The names of the papers' own code for our parameters, and how their tensors' axes lie.

Every tensor of theirs is one of ours or several stacked by rows. Names are those of their state
dicts, without the "module." that every key of a saved one begins with.

Dimension key: X layer, L distance, N persistent pair, H head, K head width, E all heads side by
side, D model width.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from allattn.model import ModelConfig

State = dict[str, np.ndarray]


class Entry(NamedTuple):
    """Where one of our tensors, or one layer of it, lies in a state dict of theirs."""

    ours: str  # path in our parameters
    layer: int | None  # slice of a tensor that is stacked over layers
    theirs: str
    rows: slice  # of their tensor; several of ours may lie one after another in one of theirs
    to_ours: Callable[[np.ndarray], np.ndarray]
    to_theirs: Callable[[np.ndarray], np.ndarray]


def _same(x: np.ndarray) -> np.ndarray:
    return x


def _reversed(x: np.ndarray) -> np.ndarray:
    return x[::-1]


class _Table:
    """Collects entries; linear maps are (out, in) in their code."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.entries: list[Entry] = []

    def add(
        self, ours: str, theirs: str, there: Callable = _same, back: Callable = _same, layer: int | None = None,
        rows: slice = slice(None),
    ) -> None:  # fmt: skip
        self.entries.append(Entry(ours, layer, theirs, rows, there, back))

    def heads(self, ours: str, theirs: str, layer: int, rows: slice = slice(None)) -> None:
        """A projection to heads: (E, D) there, (D, H, K) here."""
        D, H, K = self.config.width, self.config.heads, self.config.head_width
        self.add(
            ours,
            theirs,
            lambda x: x.T.reshape(D, H, K),
            lambda x: x.reshape(D, H * K).T,
            layer,
            rows,
        )

    def output(self, theirs: str, layer: int) -> None:
        """The projection of all heads: (D, E) there, (H, K, D) here."""
        D, H, K = self.config.width, self.config.heads, self.config.head_width
        self.add(
            "layers/output",
            theirs,
            lambda x: x.T.reshape(H, K, D),
            lambda x: x.reshape(H * K, D).T,
            layer,
        )

    def norm(self, ours: str, theirs: str, layer: int) -> None:
        self.add(f"{ours}norm_scale", f"{theirs}.weight", layer=layer)
        self.add(f"{ours}norm_bias", f"{theirs}.bias", layer=layer)

    def linear(self, ours: str, theirs: str, layer: int) -> None:
        """A map with bias: (out, in) there, (in, out) here."""
        self.add(ours, f"{theirs}.weight", np.transpose, np.transpose, layer)
        self.add(f"{ours}_bias", f"{theirs}.bias", layer=layer)


def adaptive_span(config: ModelConfig) -> list[Entry]:
    """The table for the all-attention network and the transformer with adaptive span."""
    table = _Table(config)
    K, L = config.head_width, config.limit
    table.add(
        "position/table", "key_pe", lambda x: x[0].T[::-1], lambda x: x[::-1].T.reshape(1, K, L)
    )
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
    config, attention = table.config, f"layers.{i}.attn.attn."
    for ours, theirs in (("query", "query"), ("key", "key"), ("value", "val")):
        table.heads(f"layers/{ours}", f"layers.{i}.attn.proj_{theirs}.weight", i)
    table.output(f"layers.{i}.attn.proj_out.weight", i)
    if config.persistent:

        def swapped(x: np.ndarray) -> np.ndarray:
            return x.transpose(0, 2, 1)

        table.add("layers/persistent_key", f"{attention}persistent_memory.key", swapped, swapped, i)
        table.add("layers/persistent_value", f"{attention}persistent_memory.val", layer=i)
    if config.adaptive:
        span, shape = f"{attention}adaptive_span._mask.current_val", (config.heads, 1, 1)
        table.add("layers/span", span, lambda x: x.reshape(-1), lambda x: x.reshape(shape), i)
    table.norm("layers/", f"layers.{i}.norm1", i)
    if config.layer == "transformer":
        table.linear("layers/feed_forward/inner", f"layers.{i}.ff.fc1", i)
        table.linear("layers/feed_forward/outer", f"layers.{i}.ff.fc2", i)
        table.norm("layers/feed_forward/", f"layers.{i}.norm2", i)


def _adaptive_io(table: _Table) -> None:
    """Clusters; the tails' columns of the head come in reverse order there."""
    config = table.config
    for i in range(len(config.cutoffs) + 1):
        table.add(f"io/embedding/{i}", f"in_emb.emb_layers.{i}.weight")
        table.add(f"io/bias/{i}", f"out_emb.out_layers.{i}.bias")
        if config.division > 1:
            table.add(f"io/projection/{i}", f"in_emb.emb_projs.{i}")
        if not config.tied:
            table.add(f"io/kernel/{i}", f"out_emb.out_layers.{i}.weight")
            if config.division > 1:
                table.add(f"io/output_projection/{i}", f"out_emb.out_projs.{i}")
    table.add("io/tail_kernel", "out_emb.cluster_proj.weight", _reversed, _reversed)
    table.add("io/tail_bias", "out_emb.cluster_proj.bias", _reversed, _reversed)


def transformer_xl(config: ModelConfig) -> list[Entry]:
    """The table for Transformer-XL."""
    table = _Table(config)
    table.add("position/content", "r_w_bias")
    table.add("position/distance", "r_r_bias")
    _transformer_xl_io(table)
    E = config.heads * config.head_width
    for i in range(config.depth):
        attention, inner = f"layers.{i}.dec_attn.", f"layers.{i}.pos_ff."
        for part, ours in enumerate(("query", "key", "value")):
            rows = slice(part * E, (part + 1) * E)
            table.heads(f"layers/{ours}", f"{attention}qkv_net.weight", i, rows)
        table.heads("layers/relative", f"{attention}r_net.weight", i)
        table.output(f"{attention}o_net.weight", i)
        table.norm("layers/", f"{attention}layer_norm", i)
        table.linear("layers/feed_forward/inner", f"{inner}CoreNet.0", i)
        table.linear("layers/feed_forward/outer", f"{inner}CoreNet.3", i)
        table.norm("layers/feed_forward/", f"{inner}layer_norm", i)
    return table.entries


def _one_table(config: ModelConfig) -> bool:
    """Whether Transformer-XL keeps the vectors of all clusters in one table."""
    return config.division == 1 or not config.cutoffs


def _transformer_xl_io(table: _Table) -> None:
    """Clusters; where they have tables of their own there, the head alone has an output projection of its own."""
    config, whole = table.config, _one_table(table.config)
    for i, (low, high) in enumerate(pairwise((0, *config.cutoffs, config.vocab_size))):
        number, rows = (0, slice(low, high)) if whole else (i, slice(None))
        table.add(f"io/embedding/{i}", f"word_emb.emb_layers.{number}.weight", rows=rows)
        table.add(f"io/bias/{i}", f"crit.out_layers.{number}.bias", rows=rows)
        if not whole:
            table.add(f"io/projection/{i}", f"word_emb.emb_projs.{i}")
    if not whole:
        table.add("io/output_projection/0", "crit.out_projs.0")
    if config.cutoffs:
        table.add("io/tail_kernel", "crit.cluster_weight", _reversed, _reversed)
        table.add("io/tail_bias", "crit.cluster_bias", _reversed, _reversed)


def _adaptive_span_copies(config: ModelConfig) -> dict[str, str]:
    """Tensors that are stored under two names there: the spans, and what a tied output shares with the input."""
    attention = [f"layers.{i}.attn.attn." for i in range(config.depth)]
    spans = "adaptive_span._mask.current_val"
    copies = {
        f"{a}persistent_memory.{spans}": f"{a}{spans}"
        for a in attention
        if config.persistent and config.adaptive
    }
    if config.tied and config.cutoffs:
        clusters = range(len(config.cutoffs) + 1)
        copies |= {
            f"out_emb.out_layers.{i}.weight": f"in_emb.emb_layers.{i}.weight" for i in clusters
        }
        copies |= {
            f"out_emb.out_projs.{i}": f"in_emb.emb_projs.{i}"
            for i in clusters
            if config.division > 1
        }
    return copies


def _transformer_xl_copies(config: ModelConfig) -> dict[str, str]:
    clusters = range(1 if _one_table(config) else len(config.cutoffs) + 1)
    copies = {f"crit.out_layers.{i}.weight": f"word_emb.emb_layers.{i}.weight" for i in clusters}
    return copies | {f"crit.out_projs.{i}": f"word_emb.emb_projs.{i}" for i in clusters if i}


def _adaptive_span_constants(config: ModelConfig) -> State:
    """The mask's distances, stored beside every span: 1 - L for the farthest to 0."""
    places = ("", "persistent_memory.") if config.persistent else ("",)
    masks = [
        f"layers.{i}.attn.attn.{place}adaptive_span._mask"
        for i in range(config.depth)
        for place in places
    ]
    template_L = np.arange(1 - config.limit, 1, dtype=np.float32)
    return {f"{mask}.mask_template": template_L for mask in masks if config.adaptive}


def _transformer_xl_constants(config: ModelConfig) -> State:
    """The frequencies of the sinusoids."""
    return {
        "pos_emb.inv_freq": (10_000.0 ** (-np.arange(0, config.width, 2) / config.width)).astype(
            np.float32
        )
    }


class Source(NamedTuple):
    """One code base: which of our layers it has, and what its state dicts hold."""

    layers: tuple[str, ...]
    prefix: str  # of every name
    entries: Callable[[ModelConfig], list[Entry]]
    copies: Callable[[ModelConfig], dict[str, str]]  # second names of tensors
    constants: Callable[[ModelConfig], State]  # what is no parameter


SOURCES = {
    "adaptive-span": Source(
        ("all_attention", "transformer"),
        "module.",
        adaptive_span,
        _adaptive_span_copies,
        _adaptive_span_constants,
    ),
    "transformer-xl": Source(
        ("transformer_xl",), "", transformer_xl, _transformer_xl_copies, _transformer_xl_constants
    ),
}
