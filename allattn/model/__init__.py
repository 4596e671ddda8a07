"""The network: layers of one kind between an embedding and a softmax."""

from allattn.model.network import (
    RECOMPUTED,
    Forward,
    KeyValue,
    Model,
    ModelConfig,
    Network,
    Params,
    forward_flops,
)

__all__ = [
    "RECOMPUTED",
    "Forward",
    "KeyValue",
    "Model",
    "ModelConfig",
    "Network",
    "Params",
    "forward_flops",
]
