"""Reduced all-attention with learned offsets of the pairs, N 504: 1,196,404 parameters.

Context and pairs share the weight equally at the start; without offsets the context has 3% of it.

Command:   allattn train --config=configs/ablations/joint_bias_tiny.py
           --workdir=runs/joint_bias_tiny --config.dataset.data_dir=FOLDER
Hardware:  2 CPU cores; the rest as in joint_tiny.py.
"""

from allattn.configs.ablations import joint_tiny


def get_config():
    c = joint_tiny.get_config()
    # So many fewer pairs as their offsets are parameters.
    c.model.persistent = 504
    c.model.persistent_bias = True
    c.model.persistent_share = 0.5
    return c
