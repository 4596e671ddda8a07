"""Reduced all-attention, pairs in a sublayer of their own: 1,196,596 parameters.

Command:   allattn train --config=configs/ablations/sublayer_tiny.py --workdir=runs/sublayer_tiny
           --config.dataset.data_dir=FOLDER
Hardware:  2 CPU cores; the rest as in joint_tiny.py.
"""

from allattn.configs.ablations import joint_tiny


def get_config():
    c = joint_tiny.get_config()
    c.model.integration = "sublayer"
    # One pair fewer, which is what the sublayer's norm costs.
    c.model.persistent = 511
    return c
