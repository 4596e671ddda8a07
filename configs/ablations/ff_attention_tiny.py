"""Reduced transformer whose ReLU is a softmax: 1,197,084 parameters.

Command:   allattn train --config=configs/ablations/ff_attention_tiny.py
           --workdir=runs/ff_attention_tiny --config.dataset.data_dir=FOLDER
Hardware:  2 CPU cores; the rest as in joint_tiny.py.
"""

from allattn.configs.ablations import transformer_tiny


def get_config():
    c = transformer_tiny.get_config()
    c.model.integration = "ff_attention"
    return c
