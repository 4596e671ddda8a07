"""Reduced all-attention, integration `split`: 1,196,596 parameters.

Command:   allattn train --config=configs/ablations/split_tiny.py --workdir=runs/split_tiny
           --config.dataset.data_dir=FOLDER
Hardware:  2 CPU cores; the rest as in joint_tiny.py.
"""

from allattn.configs.ablations import joint_tiny


def get_config():
    c = joint_tiny.get_config()
    c.model.integration = "split"
    return c
