"""Reduced all-attention with a feed-forward sublayer beside N 256 pairs: 1,197,352 parameters.

Command:   allattn train --config=configs/ablations/pairs_and_feed_forward_tiny.py
           --workdir=runs/pairs_and_feed_forward_tiny --config.dataset.data_dir=FOLDER
Hardware:  2 CPU cores; the rest as in joint_tiny.py.
"""

from allattn.configs.ablations import joint_tiny


def get_config():
    c = joint_tiny.get_config()
    # Half of the parameters each.
    c.model.persistent = 256
    c.model.feed_forward = 254
    return c
