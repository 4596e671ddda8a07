"""Reduced all-attention, a sublayer of pairs as wide as the model: 1,196,602 parameters.

Command:   allattn train --config=configs/ablations/wide_sublayer_tiny.py
           --workdir=runs/wide_sublayer_tiny --config.dataset.data_dir=FOLDER
Hardware:  2 CPU cores; the rest as in joint_tiny.py.
"""

from allattn.configs.ablations import sublayer_tiny


def get_config():
    c = sublayer_tiny.get_config()
    c.model.persistent_heads = 1
    # At the start, what is read from many pairs is small beside a feed-forward layer's output.
    c.model.persistent_gain = "gain"
    return c
