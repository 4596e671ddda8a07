"""The network: layers of one kind between an embedding and a softmax.

Start reading at network.py.
"""

from allattn.model.config import ModelConfig
from allattn.model.flops import forward_flops
from allattn.model.network import RECOMPUTED, Forward, KeyValue, Model, Network, Params

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
