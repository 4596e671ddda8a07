"""Reduced all-attention, integration `head_split`: 1,196,584 parameters.

Command:   allattn train --config=configs/ablations/head_split_tiny.py
           --workdir=runs/head_split_tiny --config.dataset.data_dir=FOLDER
Hardware:  2 CPU cores; the rest as in joint_tiny.py.
"""

from allattn.configs.ablations import joint_tiny


def get_config():
    c = joint_tiny.get_config()
    c.model.integration = "head_split"
    c.model.persistent = 1152
    return c
