"""Reading the golden numbers: ../shared when it is there, otherwise the small copies beside this
file.

Dimension key: B batch, T query position, S context key, L distance, N persistent pair, H head, K
head width.
"""

import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from allattn.model import ModelConfig

HERE = Path(__file__).parents[1]
SHARED = HERE.parent.parent / "shared"

# The largest error that float32 may have, as a share of the largest entry.
OUTPUT = 2e-5
GRADIENT = 1e-4
# What the authors add to the sum of the weights after the mask of learned spans.
EPSILON = 1e-8


def load(name: str, folder: str = "golden") -> dict[str, np.ndarray]:
    """All arrays of one golden file; skips the test if neither place has it."""
    for place in (SHARED / folder, HERE / folder):
        if (place / f"{name}.npz").exists():
            with np.load(place / f"{name}.npz") as file:
                return dict(file)
    pytest.skip(f"{folder}/{name}.npz: needs the shared golden numbers")


def layer_config(g: dict[str, np.ndarray], **changes: Any) -> ModelConfig:
    """The geometry of a layer_*, model_* or traj_* file."""
    known = {
        k: int(g[k])
        for k in ("heads", "span_max", "ramp", "pers_mem_size", "vocab", "n_layers")
        if k in g
    }
    width = g[_first(g, "proj_query.weight")].shape[1]
    adaptive = any("current_val" in k for k in g)
    fields = dict(
        depth=known.get("n_layers", 1),
        width=width,
        heads=known["heads"],
        vocab_size=known.get("vocab", 2),
    )
    fields |= dict(
        persistent=known["pers_mem_size"], dropout=0.0, embedding_dropout=0.0, dtype="float32"
    )
    fields |= dict(limit=known["span_max"], adaptive=adaptive, ramp=max(known["ramp"], 1), init=0.0)
    fields |= dict(epsilon=EPSILON if adaptive else 0.0)
    if any("ff.fc1" in k for k in g):
        fields |= dict(layer="transformer", feed_forward=len(g[_first(g, "ff.fc1.bias")]))
    if "cutoffs" in g:
        fields |= dict(
            cutoffs=tuple(g["cutoffs"].tolist()), division=int(g["div_val"]), tied=bool(g["tied"])
        )
    return ModelConfig(**{**fields, **changes})


def _first(g: dict[str, np.ndarray], ending: str) -> str:
    return next(k for k in g if k.endswith(ending))


def params(
    g: dict[str, np.ndarray], config: ModelConfig, prefix: str, dtype: Any = np.float32
) -> dict[str, Any]:
    """Our parameter tree from the authors' names: prefix `p.`, `g.`, `p0.`, `s1.` and so on."""
    take = {k.removeprefix(prefix): v.astype(dtype) for k, v in g.items() if k.startswith(prefix)}
    depth = 1 + max(int(m[1]) for k in take if (m := re.match(r"layers\.(\d+)\.", k)))
    layers = [layer(take, config, f"layers.{i}.", "attn.") for i in range(depth)]
    return {
        "io": adaptive_io(take) if config.cutoffs else plain_io(take),
        "position": {"table": position(take["key_pe"])},
        "layers": stack(layers),
    }


def plain_io(take: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Embedding and softmax over the whole vocabulary."""
    return {
        "embedding": take["in_emb.weight"],
        "kernel": take["out_emb.weight"],
        "bias": take["out_emb.bias"],
    }


def adaptive_io(take: dict[str, np.ndarray]) -> dict[str, Any]:
    """Embedding and softmax by clusters; the tails' columns of the head come in reverse order
    there.
    """
    names = {
        "embedding": r"in_emb\.emb_layers\.(\d+)\.weight",
        "projection": r"in_emb\.emb_projs\.(\d+)",
        "kernel": r"out_emb\.out_layers\.(\d+)\.weight",
        "output_projection": r"out_emb\.out_projs\.(\d+)",
        "bias": r"out_emb\.out_layers\.(\d+)\.bias",
    }
    ours: dict[str, Any] = {name: _numbered(take, pattern) for name, pattern in names.items()}
    ours |= {"tail_kernel": take["out_emb.cluster_proj.weight"][::-1]}
    ours |= {"tail_bias": take["out_emb.cluster_proj.bias"][::-1]}
    return {name: value for name, value in ours.items() if len(value)}


def xl_io(take: dict[str, np.ndarray], cutoffs: tuple[int, ...]) -> dict[str, Any]:
    """Transformer-XL's; what is not in `take` is left out. Division 1 has one table for all
    clusters there.
    """
    names = {
        "embedding": r"word_emb\.emb_layers\.(\d+)\.weight",
        "projection": r"word_emb\.emb_projs\.(\d+)",
        "output_projection": r"crit\.out_projs\.(\d+)",
        "bias": r"crit\.out_layers\.(\d+)\.bias",
    }
    ours: dict[str, Any] = {name: _numbered(take, pattern) for name, pattern in names.items()}
    for name in ("embedding", "bias"):
        if len(ours[name]) < 1 + len(cutoffs):
            ours[name] = dict(enumerate(np.split(ours[name][0], cutoffs)))
    if cutoffs:
        ours |= {
            "tail_kernel": take["crit.cluster_weight"][::-1],
            "tail_bias": take["crit.cluster_bias"][::-1],
        }
    return {name: value for name, value in ours.items() if len(value)}


def _numbered(take: dict[str, np.ndarray], pattern: str) -> dict[int, np.ndarray]:
    """The arrays whose whole name matches, by the number in it."""
    return {int(m[1]): take[name] for name in take if (m := re.fullmatch(pattern, name))}


def position(key_pe: np.ndarray) -> np.ndarray:
    """(1, K, L), farthest first, to (L, K), nearest first."""
    return np.ascontiguousarray(key_pe[0].T[::-1])


def layer(
    take: dict[str, np.ndarray], config: ModelConfig, start: str, attn: str
) -> dict[str, np.ndarray]:
    """One layer's tensors; linear weights are (out, in) in the golden files and (in, heads, head
    width) here.
    """
    D = config.width
    H = config.heads
    K = config.head_width
    attn = start + attn
    ours = {}
    for short, name in (("query", "query"), ("key", "key"), ("val", "value")):
        ours[name] = take[f"{attn}proj_{short}.weight"].T.reshape(D, H, K)
    ours["output"] = take[f"{attn}proj_out.weight"].T.reshape(H, K, D)
    if f"{attn}attn.persistent_memory.key" in take:
        ours["persistent_key"] = take[f"{attn}attn.persistent_memory.key"].transpose(0, 2, 1)
        ours["persistent_value"] = take[f"{attn}attn.persistent_memory.val"]
    if f"{attn}attn.adaptive_span._mask.current_val" in take:
        ours["span"] = take[f"{attn}attn.adaptive_span._mask.current_val"][:, 0, 0]
    if f"{start}norm1.weight" in take:
        ours["norm_scale"] = take[f"{start}norm1.weight"]
        ours["norm_bias"] = take[f"{start}norm1.bias"]
    if f"{start}ff.fc1.weight" in take:
        ours["feed_forward"] = feed_forward(
            take, *(f"{start}{name}" for name in ("ff.fc1", "ff.fc2", "norm2"))
        )
    return ours


def feed_forward(
    take: dict[str, np.ndarray], inner: str, outer: str, norm: str
) -> dict[str, np.ndarray]:
    """The feed-forward sublayer's tensors from the names of its two maps and its norm."""
    return {
        **{"inner": take[f"{inner}.weight"].T, "inner_bias": take[f"{inner}.bias"]},
        **{"outer": take[f"{outer}.weight"].T, "outer_bias": take[f"{outer}.bias"]},
        **{"norm_scale": take[f"{norm}.weight"], "norm_bias": take[f"{norm}.bias"]},
    }


def stack(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """Trees of layers as one tree of arrays with a leading layer axis."""
    return jax.tree.map(lambda *arrays: np.stack(arrays), *layers)


def xl_config(g: dict[str, np.ndarray], **changes: Any) -> ModelConfig:
    """The geometry of a txl_* file."""
    inner = [len(g[k]) for k in g if k.endswith("CoreNet.0.bias") and k.startswith("p.")] or [1]
    width = g["w"].shape[2] if "w" in g else g["p.word_emb.emb_layers.0.weight"].shape[1]
    fields = dict(
        layer="transformer_xl", depth=int(g.get("n_layers", 1)), width=width, heads=int(g["heads"])
    )
    fields |= dict(
        persistent=0, feed_forward=inner[0], vocab_size=int(g.get("vocab", 2)), dtype="float32"
    )
    fields |= dict(dropout=0.0, embedding_dropout=0.0, adaptive=False, ramp=1, init=0.0)
    fields |= dict(limit=int(g.get("mem_len", 1)), pre_norm=bool(g.get("pre_lnorm", False)))
    if "cutoffs" in g and g["cutoffs"].any():
        fields |= dict(cutoffs=tuple(g["cutoffs"].tolist()), division=int(g["div_val"]))
    if g.get("same_length", False):
        fields |= dict(same_length=True, clamp=int(g["clamp_len"]))
    return ModelConfig(**{**fields, **changes})


def xl_params(
    g: dict[str, np.ndarray], config: ModelConfig, prefix: str, dtype: Any = np.float32
) -> dict[str, Any]:
    """Our parameter tree from the authors' names in a txl_lm_* file."""
    take = {k.removeprefix(prefix): v.astype(dtype) for k, v in g.items() if k.startswith(prefix)}
    return {
        "io": xl_io(take, config.cutoffs),
        "position": {"content": take["r_w_bias"], "distance": take["r_r_bias"]},
        "layers": stack(
            [xl_layer(take, config, f"layers.{i}.dec_attn.") for i in range(config.depth)]
        ),
    }


def xl_layer(take: dict[str, np.ndarray], config: ModelConfig, attn: str) -> dict[str, Any]:
    """One layer's tensors; those of the feed-forward sublayer if the file has them."""
    D = config.width
    H = config.heads
    K = config.head_width
    parts = take[f"{attn}qkv_net.weight"].reshape(3, H * K, D)
    ours = {
        name: part.T.reshape(D, H, K)
        for name, part in zip(("query", "key", "value"), parts, strict=True)
    }
    if f"{attn}r_net.weight" in take:
        ours["relative"] = take[f"{attn}r_net.weight"].T.reshape(D, H, K)
    ours["output"] = take[f"{attn}o_net.weight"].T.reshape(H, K, D)
    ours["norm_scale"] = take[f"{attn}layer_norm.weight"]
    ours["norm_bias"] = take[f"{attn}layer_norm.bias"]
    ff = attn.replace("dec_attn", "pos_ff") if attn else "none"
    if f"{ff}CoreNet.0.weight" in take:
        ours["feed_forward"] = feed_forward(
            take, f"{ff}CoreNet.0", f"{ff}CoreNet.3", f"{ff}layer_norm"
        )
    return ours


def error(ours: Any, theirs: Any) -> float:
    """Largest difference over the largest entry of theirs."""
    ours = np.asarray(ours, np.float64)
    theirs = np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, f"shape {ours.shape} against {theirs.shape}"
    return float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-30))
