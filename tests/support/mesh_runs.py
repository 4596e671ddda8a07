"""Runs that train on one device and on a mesh, as settings of the tiny run."""

from typing import Any

# Adam and its clip of all gradients together, then what that does not have.
SHARED = {
    "model__depth": 2,
    "model__width": 32,
    "model__heads": 4,
    "model__dropout": 0.2,
    "model__span__init": 0.3,
}
SHARED |= {"model__span__loss": 1e-3, "optimizer__learning_rate": 1e-3, "optimizer__clip": 0.3}
SHARED |= {"train__batch": 8, "train__accumulation": 2}
MUON = {"optimizer__name": "muon", "optimizer__adam_rate": 1e-3, "optimizer__weight_decay": 0.1}
ADAGRAD = {"optimizer__name": "adagrad", "optimizer__learning_rate": 0.07, "optimizer__clip": 0.03}
FEEDS = {"model__persistent": 0, "model__feed_forward": 24}
XL = {
    "model__layer": "transformer_xl",
    "model__span__adaptive": False,
    "model__attention_dropout": 0.2,
}
WHOLE = {"mesh__tensor": 1, "train__accumulation": 1}  # 4 x 2 x 1 devices, as many as rows
STABLE = {"model__pre_norm": True, "model__qk_norm": True, "model__residual_scalars": True}
STABLE |= {"model__output_gate": True, "model__output_scale": 0.3, "model__sinks": 1}
KINDS: dict[str, dict[str, Any]] = {
    "joint": {"model__embedding_dropout": 0.2, "model__persistent_bias": True, **MUON},
    "adaptive_io": {
        "model__adaptive_io__cutoffs": (4, 7),
        "model__adaptive_io__division": 2,
        **ADAGRAD,
    },
    "head_split": {"model__integration": "head_split", **WHOLE},
    "single_head": {"model__integration": "single_head", **WHOLE, **ADAGRAD},
    "transformer": {"model__layer": "transformer", **FEEDS},
    "stable": STABLE,
    "sublayer": {"model__integration": "sublayer", "model__persistent_gain": "norm", **WHOLE},
    "transformer_xl": {**XL, **FEEDS},
}
