"""Reduced all-attention with N 128: 606,772 parameters.

The other sizes are those of joint_tiny.py.

Command:   allattn train --config=configs/ablations/n128_tiny.py --workdir=runs/n128_tiny
           --config.dataset.data_dir=FOLDER
Hardware:  2 CPU cores; the rest as in joint_tiny.py.
"""

from allattn.configs.ablations import joint_tiny


def get_config():
    c = joint_tiny.get_config()
    c.model.persistent = 128
    return c
