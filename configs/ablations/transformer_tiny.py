"""Reduced transformer: 1,197,084 parameters.

Command:   allattn train --config=configs/ablations/transformer_tiny.py
           --workdir=runs/transformer_tiny --config.dataset.data_dir=FOLDER
Hardware:  2 CPU cores; the rest as in joint_tiny.py.
"""

from allattn.configs.ablations import joint_tiny


def get_config():
    c = joint_tiny.get_config()
    c.model.layer = "transformer"
    c.model.depth = 4
    c.model.persistent = 0
    c.model.feed_forward = 892
    return c
